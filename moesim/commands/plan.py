"""`moesim plan`: which machine, precision, system and concurrency for a model and a wish."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.errors import WorkloadError
from moesim.output import emit, progress

UNMET = 3
SHOWN = 5  # of the ways composed anew


def plan(
    model: Annotated[str, typer.Option("--model", "-m", help="Model name, config.json or .gguf.")],
    machine: Annotated[
        str | None,
        typer.Option("--machine", help="Machines, YAML files or 'this', separated by commas; default: rtx-4090."),
    ] = None,
    bits: Annotated[str, typer.Option("--bits", help="Bits per weight to consider, scales included.")] = "16,8.5,4.85",
    policies: Annotated[
        str, typer.Option("--policies", help="Systems to consider; default: those one can download.")
    ] = "",
    concurrency: Annotated[str, typer.Option("--max-concurrency", help="Requests at once to consider.")] = "1,8",
    kv_share: Annotated[
        str,
        typer.Option("--kv-share", help="KV memory for this share of the requests at once; experts get the rest."),
    ] = "1,0.5,0.25",
    random_input_len: Annotated[int, typer.Option("--random-input-len", help="Prompt tokens of each request.")] = 512,
    random_output_len: Annotated[int, typer.Option("--random-output-len", help="Output tokens of each request.")] = 64,
    goodput: Annotated[
        list[str] | None, typer.Option("--goodput", help="An SLO in ms to keep, such as tpot:50.")
    ] = None,
    objective: Annotated[str, typer.Option("--objective", help="throughput, latency or cost.")] = "throughput",
    budget: Annotated[
        float | None,
        typer.Option("--budget", help="At most so many $ per hour; without --machine, all that are rented for less."),
    ] = None,
    prices: Annotated[
        Path | None, typer.Option("--prices", help="CSV of prices in place of moesim's (docs/prices.md).")
    ] = None,
    workload: Annotated[
        Path | None, typer.Option("--workload", help="Requests with arrivals and lengths (docs/bring-a-workload.md).")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option("--num-prompts", help="Only the first N of the workload.")] = None,
    compose: Annotated[
        str, typer.Option("--compose", help="Also vary parts of these systems: eviction, start, prediction, misses.")
    ] = "",
    trials: Annotated[
        int, typer.Option("--trials", min=1, help="Ways to draw of more than so many, and of those composed.")
    ] = 200,
    study: Annotated[
        Path | None, typer.Option("--study", help="Keep what is drawn in this file; a second run goes on from it.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """Search machines, precisions, systems and concurrency for the best way to serve a model.

    Exits 3 where nothing keeps the SLOs.
    """
    from moesim.model import load_model
    from moesim.plan import search
    from moesim.question import parse_slo
    from moesim.systems import load_system, split_specs

    known = load_model(model)
    chosen = split_specs(policies) if policies else list(search.POLICIES)
    anew = split_specs(compose)
    for policy in [*chosen, *anew]:
        load_system(policy)
    space = search.Space(
        _machines(machine, budget, prices), _numbers("--bits", bits, float), chosen,
        _numbers("--max-concurrency", concurrency, int), _numbers("--kv-share", kv_share, float),
    )  # fmt: skip
    asked = search.Asked(
        random_input_len, random_output_len, tuple(parse_slo(text) for text in goodput or ()), objective, budget, seed,
        workload, num_prompts,
    )  # fmt: skip
    if max(space.kv_shares) > 1:
        raise WorkloadError(f"--kv-share '{kv_share}': a share of the requests at once is at most 1")
    total = min(len(space.choices()), trials) + (trials if anew else 0)
    with progress("candidates", total) as advance:
        result = search.plan(known, space, asked, True, advance, trials, anew, study)
    emit(result, _page(result), as_json, output)
    if result["best"] is None:
        raise typer.Exit(UNMET)


def _machines(names: str | None, budget: float | None, file: Path | None) -> list[Any]:
    """Those named; without a name those of the catalogue with one GPU that are rented for at most `budget` per hour."""
    from moesim.machine import catalogue, load_machine, priced
    from moesim.prices import read_prices

    own = read_prices(file) if file else {}
    if names is None and budget is not None:
        prices = {name: priced(known, own).prices.known for name, known in catalogue().items()}
        within = [name for name, price in prices.items() if price is not None and price <= budget]
        if not within:
            cheapest = min((price, name) for name, price in prices.items() if price is not None)
            raise WorkloadError(f"--budget {budget:g}: no machine costs less than $ {cheapest[0]:g} ({cheapest[1]})")
        return [priced(load_machine(name), own) for name in within]
    return [priced(load_machine(name.strip()), own) for name in (names or "rtx-4090").split(",")]


def _numbers(option: str, text: str, kind: Any) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise WorkloadError(f"{option} '{text}': write numbers separated by commas") from None
    if not all(0 < value <= 1 << 20 for value in values):
        raise WorkloadError(f"{option} '{text}': every number must be above 0")
    return values


def _page(result: dict[str, Any]) -> str:
    lines = [f"{result['model']}: {len(result['candidates'])} ways simulated, {len(result['excluded'])} excluded"]
    if result["best"] is None:
        lines.append("nothing keeps the SLOs" if result["candidates"] else "nothing fits")
    else:
        lines += _best(result["best"])
    lines += ["", *_table(result), *_excluded(result["excluded"])]
    lines += [f"note: {note}" for machine in result["machines"].values() for note in machine["notes"]]
    lines.append("routing is drawn, not recorded; quality at fewer bits is not modelled")
    return "\n".join(lines)


def _best(best: dict[str, Any]) -> list[str]:
    low, high = best["p10_p90"]
    anchors = ", ".join(
        f"{name} {row['output_throughput']:.4g}" if "output_throughput" in row else f"{name}: {row['error']}"
        for name, row in best["anchors"].items()
    )
    than = {"difference": "the next", "over_published": "the best published", "over_composed": "the best composed"}
    return [
        f"best: {way(best)}: {best['output_throughput']:.4g} tok/s (P10 to P90: {low:.4g} to {high:.4g})",
        f"  limited by {best['limited_by']}; anchors, tok/s: {anchors}; ceiling {best['ceiling']:.4g}",
        *(f"  {engine}: {line}" for engine, line in best["flags"].items()),
        *(_gap(than[name], gap) for name in than if (gap := best.get(name))),
    ]


def _table(result: dict[str, Any]) -> list[str]:
    front = [way(row) for row in result["pareto"]]
    composed = [row for row in result["candidates"] if row["settings"]]
    hidden = [id(row) for row in composed[SHOWN:] if way(row) not in front]
    rows = [row for row in result["candidates"] if id(row) not in hidden]
    width = max([len(way(row)) for row in rows], default=0) + 2
    lines = [f"{'  way':{width}}{'tok/s':>9}{'TTFT ms':>10}{'TPOT ms':>10}{'$/Mtok':>9}  SLOs"]
    for row in rows:
        price = row["usd_per_million_output_tokens"]
        cost = "-" if price is None else f"{price:.3g}"
        tpot = "-" if row["mean_tpot_ms"] is None else f"{row['mean_tpot_ms']:.4g}"
        name = f"{'*' if way(row) in front else ' '} {way(row)}"
        lines.append(
            f"{name:{width}}{row['output_throughput']:>9.4g}{row['mean_ttft_ms']:>10.4g}{tpot:>10}{cost:>9}  "
            + ("kept" if row["keeps_slos"] else f"kept by {row['slo_attainment']:.0%}")
        )
    lines += [f"  and {len(hidden)} more that were composed (--json has all)"] if hidden else []
    return [*lines, "* no other is better in throughput, TPOT and price at once"]


def _gap(than: str, gap: dict[str, Any]) -> str:
    exceeds = "more" if gap["exceeds"] else "no more"
    return (
        f"  better by {gap['value']:.1%} than {than}, {way(gap['of'])} (P10 to P90: {gap['p10']:+.1%} to "
        f"{gap['p90']:+.1%}): {exceeds} than the costs are unsure"
    )


def _excluded(rows: list[dict[str, Any]]) -> list[str]:
    """Those left out for one reason together."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row["reason"], []).append(way(row))
    return [f"excluded: {'; '.join(names)}: {reason}" for reason, names in by_reason.items()]


def way(row: dict[str, Any]) -> str:
    policy = " with ".join([row["policy"], *([", ".join(row["settings"])] if row["settings"] else [])])
    kept = math.ceil(row["kv_share"] * row["concurrency"])
    memory = f", memory for {kept}" if row["kv_share"] < 1 else ""
    return f"{policy} on {row['machine']}, {row['bits']:g} bits, {row['concurrency']} at once{memory}"
