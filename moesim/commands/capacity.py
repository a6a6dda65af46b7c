"""`moesim capacity`: how many requests a second keep their promises."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.output import emit, progress

UNMET = 3


def capacity(
    trace: Annotated[Path, typer.Argument(help="Routing trace (.parquet); its requests are sent at other times.")],
    goodput: Annotated[list[str], typer.Option("--goodput", help="An SLO in ms to keep, such as ttft:2000.")],
    policy: Annotated[str, typer.Option("--policy", "-p", help="System.")] = "LRU",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model; default: what the trace says.")] = None,
    machine: Annotated[str, typer.Option("--machine", help="Machine name, YAML file, or 'this'.")] = "rtx-4090",
    slots_per_layer: Annotated[
        int | None, typer.Option("--slots-per-layer", help="Expert slots per MoE layer.")
    ] = None,
    expert_memory: Annotated[str | None, typer.Option("--expert-memory", help="GPU memory for experts.")] = None,
    attainment: Annotated[float, typer.Option("--attainment", help="Share of requests that must keep all SLOs.")] = 0.9,
    burstiness: Annotated[float, typer.Option("--burstiness", help="Shape of the gaps; 1 is Poisson.")] = 1.0,
    max_num_seqs: Annotated[int, typer.Option("--max-num-seqs", help="Sequences the server batches at once.")] = 256,
    preemption: Annotated[
        str, typer.Option("--preemption", help="none, or recompute: requests come in by the KV memory they need now.")
    ] = "none",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one choice, such as eviction.scope=global.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the arrivals.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """Find the highest request rate that keeps every SLO, and which breaks first. Exits 3 where none does."""
    from moesim.capacity import capacity as find
    from moesim.question import Question, compose, parse_slo
    from moesim.trace.io import read
    from moesim.units import parse_size

    question = Question(
        model=model,
        machine=machine,
        slots_per_layer=slots_per_layer,
        expert_memory=None if expert_memory is None else parse_size(expert_memory, "--expert-memory"),
        burstiness=burstiness,
        max_num_seqs=max_num_seqs,
        preemption=preemption,
        seed=seed,
        goodput=tuple(parse_slo(text) for text in goodput),
    )
    with progress("rates tried", 30) as advance:
        result = find(read(trace), compose(policy, settings or []), question, attainment, advance)
    slos = ", ".join(f"{name} {ms:g} ms" for name, ms in result["slos_ms"].items())
    if result["rate"]:
        text = (
            f"{result['rate']:.4g} requests/s ({result['low']:.4g} to {result['high']:.4g} over three draws of the "
            f"arrivals) keep {slos} for {attainment:.0%} of {result['requests']} requests; "
            + (f"{result['breaks_first']} breaks first" if result["breaks_first"] else "nothing breaks")
        )
    else:
        text = f"not one request at a time keeps {slos} for {attainment:.0%}: {result['breaks_first']}"
    emit(result, "\n".join([text, *(f"note: {note}" for note in result["notes"])]), as_json, output)
    if not result["rate"]:
        raise typer.Exit(UNMET)
