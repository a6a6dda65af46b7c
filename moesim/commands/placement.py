"""`moesim placement export`: where experts are, as serving engines read it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.errors import PolicyError, nearest
from moesim.output import emit

if TYPE_CHECKING:
    from moesim.question import Scene
    from moesim.systems import System

app = typer.Typer(no_args_is_help=True, help="Which GPU has which experts, in serving engines' files.")
FORMATS = ("eplb", "trtllm", "llama.cpp")


@app.callback()
def _root() -> None:
    """Keeps `export` a word of its own while there is one command."""


@app.command()
def export(
    trace: Annotated[
        Path | None,
        typer.Argument(help="Routing trace (.parquet); without one, routing is drawn for --model.", show_default=False),
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="eplb (JSON), trtllm (YAML) or llama.cpp (-ot).")] = "eplb",
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="System: EPLB, or llama.cpp for the last format.")
    ] = "EPLB",
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model; default: what the trace says.")] = None,
    machine: Annotated[str, typer.Option("--machine", help="Machine name, YAML file, or 'this'.")] = "8xh200",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one choice, such as parallel.placement=exact.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of routing that is drawn.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: the file, and what it rests on.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the file here.")] = None,
) -> None:
    """Write the placement a system starts with: by the loads of the first tenth of the trace's requests."""
    from moesim.cli import drawn
    from moesim.question import Question, Scene, compose
    from moesim.trace.io import read

    if format_ not in FORMATS:
        raise PolicyError(f"--format '{format_}': unknown{nearest(format_, FORMATS)}")
    routing = read(trace) if trace else drawn(model, None, 16, 256, 64, seed)
    system = compose(policy, settings or [])
    scene = Scene(routing, Question(model=model, machine=machine, seed=seed)).under(system)
    text, source = _text(format_, system, scene)
    emit({"format": format_, "text": text, "moesim": source}, text, as_json, output)


def _text(format_: str, system: System, scene: Scene) -> tuple[str, dict[str, Any]]:
    from moesim import __version__
    from moesim.engine.simulate import calibration_popularity
    from moesim.placement_files import eplb_json, llamacpp_override, trtllm_yaml
    from moesim.plan.flags import on_cpu
    from moesim.policies.balance import first_slots

    info, gpus = scene.trace.info, scene.machine.gpus
    source = {
        "version": __version__, "policy": system.name, "model": scene.model.name, "machine": scene.machine.name,
        "routing": info.provenance, "trace_sha256": scene.trace.content_hash,
    }  # fmt: skip
    if format_ == "llama.cpp":
        return llamacpp_override(on_cpu(system, scene)), source
    if gpus < 2 or system.parallel.experts != "expert":
        raise PolicyError(
            f"--format {format_}: {system.name} on {scene.machine.name} has no whole experts on several GPUs; take "
            "--policy EPLB and a machine such as 8xh200"
        )
    slots = first_slots(system.parallel, calibration_popularity(scene.trace), gpus)
    if format_ == "trtllm":
        return trtllm_yaml(slots, info.moe_layers, source), source
    return eplb_json(slots, info.experts, info.moe_layers, gpus, source), source
