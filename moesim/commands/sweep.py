"""`moesim sweep`: many runs at once, their results in one data set, and what they show."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moesim.output import emit, progress, remark

if TYPE_CHECKING:
    from moesim.plan.sweep import Progress, Tally
    from moesim.plan.work import Executor

FAILED, INTERRUPTED = 1, 130
EVERY_S = 15  # between two lines about the progress, where stderr is no terminal


class _RunByDefault(TyperGroup):
    """`moesim sweep SPEC.yaml` is `moesim sweep run SPEC.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_RunByDefault, no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(
    spec: Annotated[Path, typer.Argument(help="What to run (.yaml), or a trace (.parquet) to run --set axes over.")],
    axes: Annotated[
        list[str] | None, typer.Option("--set", help="An axis: key=a,b,c, such as slots_per_layer=2,4,8; repeatable.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the data set; default: the file's name + .sweep")
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Local processes; default: one per core.")] = None,
    executor: Annotated[str, typer.Option("--executor", help="processes, or ray: a cluster that runs.")] = "processes",
    address: Annotated[str | None, typer.Option("--address", help="Of the Ray cluster, if not this machine's.")] = None,
    anchors: Annotated[bool, typer.Option("--anchors", help="Anchors and error bars of every point: 7 runs.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Run points again that are recorded as failed.")] = False,
    as_json: Json = False,
) -> None:
    """Run every point of a sweep that its data set does not hold yet. The same command goes on after a kill."""
    from moesim.plan.spec import points_of, read_spec, with_axes
    from moesim.plan.sweep import sweep

    given = {"base": {"trace": str(spec)}} if spec.suffix == ".parquet" else read_spec(spec)
    points = points_of(with_axes(given, axes or []) | ({"anchors": True} if anchors else {}), spec.name)
    folder = output or Path(f"{spec.stem}.sweep")
    chosen = _executor(executor, jobs, address, folder)
    try:
        with _watched(len(points)) as on_progress:
            tally = sweep(points, folder, chosen, retry, on_progress)
    except KeyboardInterrupt:
        remark(f"interrupted; finished points are in {folder}, and the same command goes on from there")
        raise SystemExit(INTERRUPTED) from None
    result = {"output": str(folder), **vars(tally)}
    emit(result, _text(tally, folder), as_json)
    if tally.failed or tally.refused == tally.points:
        raise typer.Exit(FAILED)


def _executor(name: str, jobs: int | None, address: str | None, folder: Path) -> Executor:
    from moesim.errors import SweepError, nearest

    if name not in ("processes", "ray"):
        raise SweepError(f"--executor {name}: unknown{nearest(name, ['processes', 'ray'])}")
    if name == "ray":
        if jobs is not None:
            raise SweepError(f"--jobs {jobs}: a Ray cluster decides by its cores; leave it out with --executor ray")
        from moesim.plan.ray_cluster import RayCluster

        return RayCluster(address)
    if address is not None:
        raise SweepError(f"--address {address}: needs --executor ray")
    from moesim.plan.processes import Processes

    return Processes(jobs or len(os.sched_getaffinity(0)), folder)


@contextmanager
def _watched(points: int) -> Iterator[Progress]:
    """A bar for people; where stderr is no terminal, a line now and then."""
    with progress("points", points) as advance:
        began = said = time.monotonic()
        seen: int | None = None

        def on_progress(done: int, total: int) -> None:
            nonlocal said, seen
            advance(done - seen if seen is not None else points - total + done)
            seen, now = done, time.monotonic()
            if now - said >= EVERY_S and 0 < done < total and not sys.stderr.isatty():
                left = (now - began) / done * (total - done)
                remark(f"sweep: {done} of {total} points, about {left / 60:.0f} min {left % 60:.0f} s left")
                said = now

        yield on_progress


def _text(tally: Tally, folder: Path) -> str:
    lines = [f"{folder}: {tally.points} points, {tally.points - tally.before} of them run now"]
    if tally.refused:
        lines.append(f"{tally.refused} make no sense and say why (status REFUSED)")
    if tally.failed:
        lines.append(f"{tally.failed} failed (status FAILED); --retry runs them again")
    if tally.first:
        lines.append(f"the first reason: {tally.first}")
    return "\n".join([*lines, f"moesim sweep show {folder}"])


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Directory of a sweep's data set.")],
    by: Annotated[str, typer.Option("--by", help="Metric to rank by, such as mean_tpot_ms.")] = "output_throughput",
    x: Annotated[str | None, typer.Option("--x", help="Axis to look along, such as slots_per_layer.")] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Points to list.")] = 20,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw it as one HTML page.")] = None,
    as_json: Json = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the result here.")] = None,
) -> None:
    """Rank a sweep's points, show the best along an axis, and plot them."""
    from moesim.plan.view import figures, text, to_dict, view

    found = view(folder, by)
    printed = text(found, x, top)
    if plot is not None:
        from moesim.plots import write_page

        lead = printed.partition("\n")[0] + "; lines join the best of the points above one another"
        write_page(plot, f"Sweep {folder.name}", lead, figures(found, x), printed)
        remark(f"{plot}: written")
    emit(to_dict(found, top), printed, as_json, output)
