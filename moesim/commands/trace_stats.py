"""`moesim trace stats` and `moesim trace synth`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.errors import TraceError
from moesim.output import emit, remark
from moesim.units import format_size

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from moesim.trace.routing_model import RoutingModel
    from moesim.trace.stats import TraceStats
    from moesim.trace.trace import Trace

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn at random.")]


def register(app: typer.Typer) -> None:
    """Add both commands to the `moesim trace` group."""
    app.command()(stats)
    app.command()(synth)


def stats(
    file: Annotated[Path, typer.Argument(help="Trace file (.parquet).")],
    *,
    as_json: Json = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the statistics as one HTML page.")] = None,
    seed: Seed = 0,
) -> None:
    """Say whether a trace's experts can be cached and predicted: skew, reuse, LRU curve, tasks."""
    from dataclasses import asdict

    from moesim.trace.io import read
    from moesim.trace.stats import describe
    from moesim.trace.summary import headline, text, verdict

    result = describe(read(file), seed)
    if plot is not None:
        from moesim.plots import write_page

        title = f"{result.provenance.capitalize()} routing of {result.model}"
        write_page(plot, title, verdict(result), figures(result), text(result))
        remark(f"{plot}: written")
    emit(
        {"file": str(file), "verdict": verdict(result), "headline": headline(result), **asdict(result)},
        text(result),
        as_json,
        output,
    )


def figures(stats: TraceStats) -> list[Figure]:
    """The figures of a statistics page, without those the trace has no data for."""
    from moesim import plots

    drawn = [
        plots.miss_ratio_curve(
            stats.lru.capacities, stats.lru.miss_ratio, stats.lru.belady, stats.lru.static, stats.lru.random
        ),
        plots.reuse_curve(stats.reuse.within, stats.reuse.chance),
        plots.distance_curve(stats.lru.distances),
        plots.unique_experts(stats.unique.batches, stats.unique.mean, stats.unique.independent, stats.experts),
        plots.popularity_heatmap(stats.popularity, stats.moe_layers),
    ]
    if stats.predictability:
        found = stats.predictability
        drawn.append(plots.predictability(stats.moe_layers, found.from_layer, found.from_popularity))
    if stats.tasks:
        drawn.append(plots.task_distances(stats.tasks.names, stats.tasks.distance, stats.tasks.noise))
    return drawn


def synth(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Trace file to write (.parquet).")],
    fit: Annotated[Path | None, typer.Option(help="Fit to this trace.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Or: model name, or path of its config.json, and statistics.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests to draw.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=0, help="Prompt tokens of each.")] = 128,
    output_tokens: Annotated[int, typer.Option(min=0, help="Output tokens of each.")] = 256,
    tasks: Annotated[str | None, typer.Option(help="Tasks to draw from (--fit) or to make up (--model): a,b")] = None,
    skew: Annotated[float | None, typer.Option(help="Zipf exponent of popularity (default 0.5).")] = None,
    reuse: Annotated[float | None, typer.Option(help="Share of experts the previous token used (0.4).")] = None,
    layer_correlation: Annotated[
        float | None, typer.Option(help="Share of the next layer's experts one can guess (0.5).")
    ] = None,
    task_shift: Annotated[float | None, typer.Option(help="Share of experts each task ranks anew (0.5).")] = None,
    request_spread: Annotated[float | None, typer.Option(help="How much requests differ, in log-weight (0.7).")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="With --fit: draw the same requests again and compare statistics.")
    ] = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Draw synthetic routing, fitted to a trace or made from a model's shape and a few statistics."""
    from moesim.trace.io import read, write
    from moesim.trace.routing_model import draw

    parameters = {
        "skew": skew, "reuse": reuse, "layer_correlation": layer_correlation, "task_shift": task_shift,
        "request_spread": request_spread,
    }  # fmt: skip
    given = {name: value for name, value in parameters.items() if value is not None}
    _refuse_contradictions(fit, model, given, compare, output)
    names = tuple(name.strip() for name in tasks.split(",")) if tasks else ()
    original = read(fit) if fit else None
    routing = _fitted(original, names, seed) if original else _from_parameters(str(model), names, given, seed)
    drawn = draw(routing, requests, prompt_tokens, output_tokens, seed=seed, tasks=names)
    write(drawn, output)
    size, rows = output.stat().st_size, _comparison(routing, original, seed) if original and compare else []
    result = {
        "output": str(output), "bytes": size, "tokens": drawn.tokens, "requests": len(drawn.requests),
        "provenance": drawn.info.provenance, "source": drawn.info.source, "extra": drawn.info.extra,
        "comparison": rows,
    }  # fmt: skip
    emit(result, _synth_text(output, size, drawn, rows), as_json)


def _refuse_contradictions(
    fit: Path | None, model: str | None, parameters: dict[str, float], compare: bool, output: Path
) -> None:
    if (fit is None) == (model is None):
        raise TraceError("give --fit with a trace or --model with a model name: one of the two says what to draw")
    if fit is not None and parameters:
        option = next(iter(parameters)).replace("_", "-")
        raise TraceError(f"--{option} is for --model; with --fit the statistics come from {fit}")
    if compare and fit is None:
        raise TraceError("--compare needs --fit: there is no trace to compare with")
    if fit is not None and output.exists() and output.samefile(fit):
        raise TraceError(f"{output}: is the trace to fit itself; choose another --output")


def _fitted(trace: Trace, tasks: tuple[str, ...], seed: int) -> RoutingModel:
    from moesim.trace.routing_model import task_index
    from moesim.trace.synth import fit

    for name in tasks:  # before the fit, which can take a minute
        task_index(name, sorted(set(trace.requests.task)))
    model = fit(trace, seed)
    if phase := model.info.extra.get("unfitted_phase"):
        remark(f"the trace has no {phase} tokens; drawn {phase} tokens choose like the others")
    return model


def _from_parameters(name: str, tasks: tuple[str, ...], parameters: dict[str, float], seed: int) -> RoutingModel:
    from moesim.model import load_model
    from moesim.trace.synth import from_parameters

    model = load_model(name)
    return from_parameters(
        model.experts, model.top_k, len(model.moe_layers), model=model.name, moe_layers=model.moe_layers,
        tasks=tasks or ("",), seed=seed, **parameters,
    )  # fmt: skip


def _comparison(model: RoutingModel, original: Trace, seed: int) -> list[dict[str, float | str]]:
    from moesim.trace.routing_model import redraw
    from moesim.trace.stats import describe
    from moesim.trace.summary import compare

    return compare(describe(original, seed), describe(redraw(model, original, seed), seed))


def _synth_text(output: Path, size: int, drawn: Trace, rows: list[dict[str, float | str]]) -> str:
    from moesim.trace.summary import comparison_text

    line = f"{output}: {drawn.tokens} tokens of {len(drawn.requests)} requests, synthetic, {format_size(size)}"
    if not rows:
        return line
    return f"{line}\n\nThe fitted trace and its requests drawn again:\n{comparison_text(rows)}"
