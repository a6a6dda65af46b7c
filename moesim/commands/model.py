"""`moesim model`: what a model is, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.output import emit

app = typer.Typer(no_args_is_help=True, help="Models: sizes from a name, config.json or GGUF.")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Report = Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here instead of printing it.")]


@app.command()
def info(
    spec: Annotated[str, typer.Argument(help="Name, config.json, directory with one, or .gguf file.")],
    as_json: Json = False,
    output: Report = None,
) -> None:
    """Parameters, bytes per expert, KV cache and MoE layers of a model."""
    from moesim.model import load_model
    from moesim.model_report import describe, format_model

    model = load_model(spec)
    emit(describe(model), format_model(model), as_json, output)


@app.command("list")
def list_(as_json: Json = False, output: Report = None) -> None:
    """The models known by name."""
    from moesim.model import catalogue, load_model
    from moesim.model_report import format_table, summary

    models = [load_model(name) for name in catalogue()]
    emit({"models": [summary(model) for model in models]}, format_table(models), as_json, output)
