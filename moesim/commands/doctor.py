"""`moesim doctor`: what this machine can do, and the next command to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.errors import MoesimError
from moesim.output import emit


def doctor(
    directory: Annotated[Path, typer.Argument(help="Where profiles lie: this folder and those in it.")] = Path("."),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """What this machine can do (GPU, link, memory, profile freshness), and the next command to run."""
    from moesim.doctor import examine, format_doctor

    if not directory.is_dir():
        raise MoesimError(f"{directory}: not a directory; name the one your profiles lie in")
    found = examine(directory)
    emit(found, format_doctor(found), as_json, output)
