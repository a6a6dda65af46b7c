"""`moesim validate`: predictions against reality. What runs lies in `validate/` of a checkout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import moesim
from moesim.errors import ValidationError
from moesim.output import emit

app = typer.Typer(no_args_is_help=True, help="Predictions against reality.")

ROOT = Path(moesim.__file__).parents[1]
EXIT = {"passed": 0, "inconclusive": 1, "failed": 4}


@app.callback()
def _root() -> None:
    """Predictions against reality."""


@app.command()
def live(
    device: Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")] = "cpu",
    budget: Annotated[str, typer.Option("--budget", help="Time to spend, such as 90s or 10m.")] = "10m",
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Routing to replay; default: the shipped tiny-moe-8x16.")
    ] = None,
    disk: Annotated[bool, typer.Option("--disk", help="Experts lie in a file instead of in memory.")] = False,
    pace: Annotated[
        float | None,
        typer.Option("--pace", help="Hold the copy thread to GB/s; 0 never; default: where the cores are shared."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Five small cases in seconds, to see that it works.")] = False,
    only: Annotated[str | None, typer.Option("--only", help="Groups of cases, such as 'batch 1,prefill'.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=5, help="Clean runs of each case.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for the report.")] = None,
) -> None:
    """Run real experts through a real cache on this machine, and hold the simulator against it.

    Exits 0 where all is within its tolerance, 4 where something is not, 1 where too much disturbed the runs to say.
    """
    from moesim.calibrate.run import parse_duration
    from moesim.trace.io import read

    if pace is not None and not 0 <= pace < 1e6:
        raise ValidationError(f"--pace {pace:g} must be at least 0 GB/s")
    seconds = parse_duration(budget)
    session, report = _checkout()
    routing = read(trace or ROOT / "traces" / "tiny-moe-8x16.parquet")
    with _bar(seconds) as show:
        result = session.validate(routing, device, seconds, disk, quick, pace, only, repeats, show)
    if output is not None:
        report.save(result, output)
    emit(result, report.text(result), as_json)
    if result["status"] != "passed":
        raise typer.Exit(EXIT[result["status"]])


@app.command()
def published(
    cases: Annotated[
        Path | None, typer.Option("--cases", help="CSV of measured values; default: those that come with moesim.")
    ] = None,
    only: Annotated[str | None, typer.Option("--only", help="Groups of cases, such as 'ktv3,ubg'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for the report.")] = None,
) -> None:
    """Predict published measurements, none of them fitted to, and score the predictions by source.

    Exits 0 where every group of a source is within its tolerance, 4 where one is not.
    """
    from moesim import published_report
    from moesim.output import progress
    from moesim.published import SHIPPED, choose, read_cases, validate

    chosen = choose(read_cases(cases or SHIPPED), only)
    with progress("published cases", len(chosen)) as advance:
        result = validate(chosen, advance)
    if output is not None:
        published_report.save(result, output)
    emit(result, published_report.text(result), as_json)
    if result["status"] != "passed":
        raise typer.Exit(EXIT[result["status"]])


@app.command()
def papers(
    only: Annotated[str | None, typer.Option("--only", help="Systems, such as 'EEP,MC'.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Directory for tables and a picture.")] = None,
) -> None:
    """Set up what the papers of twelve systems report, run system and baselines, and hold the ratios beside theirs.

    Exits 0 where 8 main claims are within a factor 1.25 and every direction is right, 4 where not. Three minutes.
    """
    _reach_checkout("papers")
    from moesim.output import progress
    from validate.papers import report, systems

    chosen = systems.choose(only)
    with progress("papers", len(chosen)) as advance:
        result = systems.validate(chosen, advance)
    if output is not None:
        report.save(result, output)
    emit(result, report.text(result), as_json)
    if result["status"] != "passed":
        raise typer.Exit(EXIT[result["status"]])


def _checkout() -> tuple[Any, Any]:
    """validate.live.session and validate.live.report, which are no part of the installed package."""
    _reach_checkout("live")
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValidationError("validate live needs torch, which is not installed; pip install 'moesim[gpu]'") from None
    from validate.live import report, session

    return session, report


def _reach_checkout(part: str) -> None:
    """Make validate/ beside the package importable."""
    if not (ROOT / "validate" / part).is_dir():
        raise ValidationError(f"{ROOT}: no validate/ beside the package; validate runs from a checkout of moesim")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


@contextmanager
def _bar(budget_s: float) -> Iterator[Callable[[str, float], None]]:
    """Yield `show(what, share of the budget)`: a bar on stderr for people, nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:60.60}"), BarColumn(), TimeElapsedColumn())
    # No refreshing thread: it would run beside what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task, shown = bar.add_task("", total=budget_s), 0.0

        def show(what: str, share: float) -> None:
            nonlocal shown
            if time.monotonic() - shown > 0.5:
                bar.update(task, description=what, completed=min(budget_s, share * budget_s))
                bar.refresh()
                shown = time.monotonic()

        yield show
