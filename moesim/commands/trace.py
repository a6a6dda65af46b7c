"""`moesim trace`: import, describe, check and cut routing traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.commands.trace_stats import register
from moesim.errors import TraceError
from moesim.output import emit
from moesim.units import format_size

if TYPE_CHECKING:
    from moesim.trace.trace import Trace

app = typer.Typer(no_args_is_help=True, help="Import, describe, check and cut routing traces.")

File = Annotated[Path, typer.Argument(help="Trace file (.parquet).")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Trace file to write (.parquet).")]
Report = Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here instead of printing it.")]
Model = Annotated[str, typer.Option("--model", help="Model name, or path of its config.json.")]


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="File to import.")],
    *,
    model: Model,
    output: Output,
    format_name: Annotated[str, typer.Option("--format", help="numpy, csv or counts.")] = "numpy",
    phase: Annotated[str | None, typer.Option(help="What the rows are: prefill, decode, or both.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Prompt length, where the file has none.")] = None,
    task: Annotated[str | None, typer.Option(help="Task label of all requests, where the file has none.")] = None,
    engine: Annotated[str | None, typer.Option(help="What recorded the routing, with its version.")] = None,
    source: Annotated[str | None, typer.Option(help="Where the routing comes from.")] = None,
    tokens: Annotated[int | None, typer.Option(help="counts: tokens to draw.")] = None,
    seed: Annotated[int | None, typer.Option(help="counts: seed of the draw (default 0).")] = None,
    as_json: Json = False,
) -> None:
    """Make a trace from routing recorded by another tool."""
    from moesim.model import load_model
    from moesim.trace.importers import import_trace

    given = {
        "phase": phase, "prompt_tokens": prompt_tokens, "task": task, "engine": engine, "source": source,
        "tokens": tokens, "seed": seed,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    _refuse_same(file, output)
    _write(import_trace(format_name, file, load_model(model), **options), output, as_json)


@app.command()
def info(file: File, as_json: Json = False, output: Report = None) -> None:
    """Describe a trace: model, sizes, requests, tasks, phases."""
    from moesim.trace.io import read

    result = describe(read(file), file)
    emit(result, _text(result), as_json, output)


@app.command()
def check(
    file: File,
    model: Annotated[str | None, typer.Option("--model", help="Also compare with this model.")] = None,
    as_json: Json = False,
) -> None:
    """Check a trace against the schema and, if given, a model. Exits 2 with the first fault found."""
    from moesim.trace.io import read

    trace = read(file)
    if model is not None:
        from moesim.model import load_model
        from moesim.trace.check import check_matches

        check_matches(trace, load_model(model))
    result = {"file": str(file), "ok": True, "tokens": trace.tokens, "model": model or trace.info.model}
    matches = f", matches {model}" if model else ""
    emit(result, f"{file}: OK, {_size(trace)}{matches}", as_json)


@app.command()
def cut(
    file: File,
    *,
    output: Output,
    requests: Annotated[int | None, typer.Option(help="Keep the first N requests.")] = None,
    first_tokens: Annotated[int | None, typer.Option(help="Keep the first N tokens of the whole.")] = None,
    task: Annotated[str | None, typer.Option(help="Keep requests of this task.")] = None,
    request_id: Annotated[list[str] | None, typer.Option(help="Keep this request; may be repeated.")] = None,
    phase: Annotated[str | None, typer.Option(help="Keep prefill or decode tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Keep a part of a trace; conditions add up."""
    from moesim.trace.cut import cut as cut_trace
    from moesim.trace.io import read

    conditions: dict[str, Any] = {
        "requests": requests, "first_tokens": first_tokens, "task": task, "request_ids": tuple(request_id or ()),
        "phase": phase,
    }  # fmt: skip
    if not any(value not in (None, ()) for value in conditions.values()):
        raise TraceError(
            "nothing to cut; give --requests, --first-tokens, --task, --request-id or --phase (moesim trace cut --help)"
        )
    _refuse_same(file, output)
    _write(cut_trace(read(file), **conditions), output, as_json)


def describe(trace: Trace, file: Path) -> dict[str, Any]:
    """What `moesim trace info` prints."""
    from moesim.trace.trace import DECODE, PREFILL

    info, requests = trace.info, trace.requests
    tasks = {task: requests.task.count(task) for task in sorted(set(requests.task)) if task}
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "content_hash": trace.content_hash,
        "model": info.model,
        "experts": info.experts,
        "top_k": info.top_k,
        "moe_layers": list(info.moe_layers),
        "tokens": trace.tokens,
        "prefill_tokens": int((trace.phase == PREFILL).sum()),
        "decode_tokens": int((trace.phase == DECODE).sum()),
        "requests": len(requests),
        "tasks": tasks,
        "arrivals": requests.arrival_ns is not None,
        "weights": trace.weights is not None,
        "probabilities": trace.probabilities is not None,
        "provenance": info.provenance,
        "engine": info.engine,
        "sampling": info.sampling,
        "source": info.source,
        "extra": info.extra,
    }


def _text(result: dict[str, Any]) -> str:
    layers = result["moe_layers"]
    has = [name for name in ("arrivals", "weights", "probabilities") if result[name]]
    lines = {
        "model": f"{result['model']}: top-{result['top_k']} of {result['experts']} experts, {len(layers)} MoE layers "
        f"({layers[0]} to {layers[-1]})",
        "tokens": f"{result['tokens']} ({result['prefill_tokens']} prefill, {result['decode_tokens']} decode)",
        "requests": result["requests"],
        "tasks": ", ".join(f"{task} ({count})" for task, count in result["tasks"].items()) or "none",
        "also has": ", ".join(has) or "nothing beyond expert ids",
        "provenance": result["provenance"],
        **{name: result[name] for name in ("engine", "sampling", "source") if result[name]},
        **{f"extra.{name}": value for name, value in result["extra"].items()},
        "file": f"{result['file']}, {format_size(result['bytes'])}",
        "hash": f"sha256 {result['content_hash']}",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in lines.items())


def _refuse_same(file: Path, output: Path) -> None:
    if file.exists() and output.exists() and output.samefile(file):
        raise TraceError(f"{output}: is the input itself; choose another --output")


def _write(trace: Trace, output: Path, as_json: bool) -> None:
    from moesim.trace.io import write

    write(trace, output)
    size, provenance = output.stat().st_size, trace.info.provenance
    result = {
        "output": str(output),
        "bytes": size,
        "tokens": trace.tokens,
        "requests": len(trace.requests),
        "provenance": provenance,
    }
    emit(result, f"{output}: {_size(trace)}, {provenance}, {format_size(size)}", as_json)


def _size(trace: Trace) -> str:
    many = len(trace.requests)
    return f"{trace.tokens} tokens of {many} request{'s' if many > 1 else ''}"


register(app)
