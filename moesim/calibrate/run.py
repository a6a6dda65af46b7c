"""A whole calibration: measure within the budget, fit, report. Needs no command-line library (__main__.py)."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import CalibrationError
from moesim.output import emit, remark

if TYPE_CHECKING:
    from moesim.calibrate.session import Outcome
    from moesim.calibrate.store import Store

OK, INTERRUPTED = 0, 130
_UNITS = {"s": 1, "m": 60, "h": 3600}
_FIT_SHARE = 0.03  # of the budget, kept for fitting


def calibrate(
    device: str | None, budget: str, only: str | None, output: Path | None, seed: int, fit_only: bool, as_json: bool
) -> int:
    """Measure, write the profile and print what it holds; the exit code. Raises CalibrationError."""
    from moesim.calibrate.finish import finish

    if fit_only:
        if output is None:
            raise CalibrationError("--fit-only: needs -o DIR, the directory whose measurements are to be fitted")
        report = finish(output)
        emit(report, page(report), as_json)
        return OK
    outcome, directory = _measure(device, budget, only, output, seed)
    report = finish(directory) | _this_run(outcome)
    emit(report, page(report), as_json)
    if outcome.interrupted:
        remark(f"interrupted: {report['measured']} new points are kept; the same command goes on from there")
        return INTERRUPTED
    return OK


def _measure(device: str | None, budget: str, only: str | None, output: Path | None, seed: int) -> tuple[Outcome, Path]:
    """Spend the budget; whatever ends it, the rows and the conditions at the end are on disk."""
    started = time.monotonic()
    seconds = parse_duration(budget)
    from moesim.calibrate.conditions import describe, under_load
    from moesim.calibrate.device import open_device
    from moesim.calibrate.families import select
    from moesim.calibrate.session import run
    from moesim.calibrate.store import Store
    from moesim.calibrate.timers import timer_for

    families = select(only)
    target = open_device(device, seed)
    directory = output or Path("profile-" + re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-"))
    store = Store(directory, describe(target))
    deadline = started + seconds * (1 - _FIT_SHARE)
    with _closing(store, lambda: {"cost_s": time.monotonic() - started, **under_load(target)}), _bar(seconds) as show:
        return run(families, target, timer_for(target), store, deadline, show), directory


@contextmanager
def _closing(store: Store, session: Callable[[], dict[str, Any]]) -> Iterator[None]:
    try:
        yield
    finally:
        store.close(session())


def _this_run(outcome: Outcome) -> dict[str, Any]:
    """What was measured now, and what was not and why."""
    return {
        "interrupted": outcome.interrupted,
        "measured": sum(track.measured for track in outcome.tracks),
        "spent_s": {t.family.name: round(t.spent_s, 2) for t in outcome.tracks},
        "left": {t.family.name: len(t.candidates) for t in outcome.tracks if len(t.candidates)},
        "skipped": {t.family.name: t.skipped for t in outcome.tracks if t.skipped},
    }


def page(report: dict[str, Any]) -> str:
    """A table of families, then what could not be measured."""
    lines = [f"{report['profile']}: {report['points']} points in {report['cost_s']:.0f} s", ""]
    lines.append(f"{'family':20}{'points':>7}{'hold-out error':>16}{'P90':>8}")
    for name, facts in report["families"].items():
        error, p90 = facts["holdout_median_error"], facts["p90"]
        cells = ("-", "-") if error is None else (f"{error:.1%}", f"{p90:.0%}" if p90 is not None else "-")
        lines.append(f"{name:20}{facts['points']:>7}{cells[0]:>16}{cells[1]:>8}")
    if report["contaminated"]:
        lines.append(
            f"contaminated: {report['contaminated']} points were taken while other programs had the cores; "
            "their times are thread time, about right; measure again on a quiet machine for better"
        )
    for name, reasons in report.get("skipped", {}).items():
        lines += [f"not measured: {name}, {count} points: {reason}" for reason, count in reasons.items()]
    return "\n".join(lines)


@contextmanager
def _bar(budget_s: float) -> Iterator[Callable[[str], None]]:
    """Yield `show(what)`: a bar of the budget on stderr for people, nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:60.60}"), BarColumn(), TimeRemainingColumn(compact=True))
    # No refreshing thread: it would run beside what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task, started = bar.add_task("", total=budget_s), time.monotonic()

        def show(what: str) -> None:
            bar.update(task, description=what, completed=min(budget_s, time.monotonic() - started))
            bar.refresh()

        yield show


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `5m`, `1h30m` or a bare number of seconds. Raises CalibrationError."""
    compact = text.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d*)?)([smh]?)", compact)
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != compact or not 1 <= seconds <= 7 * 24 * 3600:
        raise CalibrationError(f"--budget '{text}': not a time between 1s and a week; write such as 90s, 5m or 1h30m")
    return seconds
