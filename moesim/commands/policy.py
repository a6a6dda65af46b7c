"""`moesim policy`: whether a policy, built in or your own, keeps what every policy must."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesim.output import emit

if TYPE_CHECKING:
    from moesim.contracts import Ground, Verdict

app = typer.Typer(no_args_is_help=True, help="Policies: check one, built in or your own.")
BROKEN = 1


@app.callback()
def _root() -> None:
    pass


@app.command()
def check(
    policy: Annotated[str, typer.Argument(help="System, such as LRU, or my_policy.py:MyPolicy, whose file is run.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="Change one choice first.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Check on this trace; default: a small drawn one.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Its model; default: what the trace says.")] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", help="Requests of the trace to check on.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """Try every contract on a policy; exit 0 where all hold, 1 where one is broken."""
    from moesim.contracts import check as verdicts_of
    from moesim.contracts import small_ground
    from moesim.systems import load_system, with_settings

    system = with_settings(load_system(policy), settings or ())
    ground = small_ground() if trace is None else _ground(trace, model, num_prompts)
    verdicts = list(verdicts_of(system, ground))
    broken = [v.contract for v in verdicts if v.held is False]
    body = {
        "policy": policy,
        "settings": settings or [],
        "trace": {"tokens": ground.trace.tokens, "layers": ground.trace.layers, "experts": ground.trace.info.experts},
        "contracts": [asdict(v) for v in verdicts],
        "broken": broken,
    }
    emit(body, _format(policy, ground, verdicts), as_json, output)
    if broken:
        raise typer.Exit(BROKEN)


def _ground(path: Path, model: str | None, requests: int) -> Ground:
    from moesim.contracts import Ground
    from moesim.machine import load_machine
    from moesim.model import load_model
    from moesim.trace.cut import cut
    from moesim.trace.io import check_matches, read

    trace = read(path)
    trace = cut(trace, requests=min(requests, len(trace.requests)))
    known = load_model(model or trace.info.model)
    check_matches(trace, known)
    return Ground(trace, known, load_machine("rtx-4090"), slots=max(1, trace.info.experts // 4))


def _format(policy: str, ground: Ground, verdicts: list[Verdict]) -> str:
    trace = ground.trace
    lines = [f"{policy} on {trace.tokens} tokens, {trace.layers} layers of {trace.info.experts} experts"]
    for v in verdicts:
        word = {True: "holds", False: "BROKEN", None: "-"}[v.held]
        lines.append(f"  {word:7} {v.contract:26} {v.detail or v.what}")
    held, broken = (sum(v.held is value for v in verdicts) for value in (True, False))
    lines.append(f"{held} hold, {broken} broken, {len(verdicts) - held - broken} do not apply")
    return "\n".join(lines)
