"""A whole validation: runs and calibration slices in turn, gates on what disturbs them, and the comparison."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moesim.calibrate.conditions import describe
from moesim.calibrate.device import open_device
from moesim.trace import Trace
from validate.live.cases import Prepared, check_memory, chosen, play, prepare, shapes, stage_for
from validate.live.compare import RATIO, TOTAL, decisions, simulated, summary, times, verdict
from validate.live.measured import Decisions, MeasuredTable, Samples, Slice
from validate.live.runtime import Cores, Log, cores
from validate.live.weights import Backend, Stage

REPEATS, TRIES = 5, 3  # clean runs of a case; tries per run that is needed
PRESSURE, STRETCH = 0.10, 1.05  # of a clean run at most: time that others waited for a core; wall over thread time
PACE_GBPS = 1.5  # of the loader where the cores are shared: a quarter of what memory gives, or less
_PRESSURE_FILE = Path("/proc/pressure/cpu")


@dataclass(eq=False)
class Track:
    """A case during a session: clean runs, and all others, which only their decisions are taken from."""

    prepared: Prepared
    stage: Stage
    repeats: int
    clean: list[Log] = field(default_factory=list)
    disturbed: list[Log] = field(default_factory=list)

    def open(self) -> bool:
        tried = len(self.clean) + len(self.disturbed)
        return len(self.clean) < self.repeats and tried < TRIES * self.repeats


@dataclass(eq=False)
class Bench:
    """A stage with its slices and what the clean and the disturbed ones have found."""

    stage: Stage
    slice: Slice
    samples: Samples = field(default_factory=Samples)
    disturbed: Samples = field(default_factory=Samples)


class Gate:
    """CPU pressure since it was opened: the share of time in which some thread stood ready without a core."""

    def __init__(self) -> None:
        self._began, self._some = time.perf_counter(), _some_us()

    def pressure(self) -> float:
        if self._some is None or (now := _some_us()) is None:
            return 0.0
        return (now - self._some) / 1e6 / max(time.perf_counter() - self._began, 1e-9)


def _some_us() -> int | None:
    try:
        return int(_PRESSURE_FILE.read_text().split("total=")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None


def validate(
    trace: Trace, device: str = "cpu", budget_s: float = 600.0, on_disk: bool = False, quick: bool = False,
    pace_gbps: float | None = None, only: str | None = None, repeats: int = REPEATS,
    show: Callable[[str, float], None] = lambda what, share: None,
) -> dict[str, Any]:  # fmt: skip
    """Run every case for real, `repeats` times or while the budget lasts, and hold the simulator against it.

    device: `cpu`, or `cuda` (also `cuda:1`). on_disk: experts in a file instead of in memory. pace_gbps: hold the copy
    thread to that; None: only where the cores are shared. only: groups of cases, separated by commas. show(what, share
    of the budget) follows progress. Raises ValidationError or CalibrationError where it cannot be run.
    """
    began = time.monotonic()
    with _left_as_it_was(), ExitStack() as open_stages:
        conditions = describe(open_device(device))
        where = _one_thread()
        selected = chosen(quick, only, device)
        by_shape = {n: s for n, s in shapes(trace, quick).items() if n in {case.shape for case in selected}}
        ready = [prepare(case, by_shape[case.shape], trace) for case in selected]
        check_memory(by_shape, ready, on_disk)
        backend = Backend(device)
        stages: dict[str, Stage] = {}
        for name, shape in by_shape.items():
            show(f"weights of {shape.experts * shape.layers} {name} experts", 0.0)
            stage = stage_for(shape, ready, backend, on_disk)
            open_stages.callback(stage.close)
            stages[name] = stage
        if pace_gbps is None:
            pace_gbps = PACE_GBPS if _shared_cores() else 0.0
        session = Session(ready, stages, where, pace_gbps, repeats)
        session.run(began + 0.95 * budget_s, lambda what: show(what, (time.monotonic() - began) / budget_s))
        return session.result() | {
            "device": device,
            "experts_on": "disk" if on_disk else "memory",
            "pace_gbps": pace_gbps,
            "seconds": time.monotonic() - began,
            "conditions": conditions,
        }


@contextmanager
def _left_as_it_was() -> Iterator[None]:
    """Threads of torch, cores of this thread and the collector, which would pause runs, are the caller's again
    afterwards."""
    threads, before, collecting = torch.get_num_threads(), os.sched_getaffinity(0), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def _one_thread() -> Cores:
    """This thread computes on a core of its own, with one thread in torch."""
    where = cores()
    torch.set_num_threads(1)
    if where.compute is not None:
        os.sched_setaffinity(0, {where.compute})
    return where


def _shared_cores(seconds: float = 1.0) -> bool:
    """Whether others use the cores: CPU pressure while this thread is busy for a moment."""
    gate, end = Gate(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
    return gate.pressure() > PRESSURE


class Session:
    """Rounds of runs and slices until every case has its clean runs or the time is over."""

    def __init__(
        self, ready: list[Prepared], stages: dict[str, Stage], where: Cores, pace_gbps: float, repeats: int
    ) -> None:
        self._where, self._pace = where, pace_gbps
        self._tracks = [Track(p, stages[p.case.shape], repeats) for p in ready]
        self._benches = {name: self._bench(stage) for name, stage in stages.items()}

    def _bench(self, stage: Stage) -> Bench:
        rows = max(t.prepared.case.batch * max(t.prepared.case.prompt, 1) for t in self._tracks if t.stage is stage)
        return Bench(stage, Slice(stage, self._where, self._pace, rows))

    def run(self, deadline: float, show: Callable[[str], None]) -> None:
        """Whatever the deadline, every case runs once and every stage has a slice."""
        for bench in self._benches.values():
            self._warm(bench)
        turn = 0
        while turn == 0 or (time.monotonic() < deadline and any(track.open() for track in self._tracks)):
            for track in self._tracks:
                if turn and (time.monotonic() >= deadline or not track.open()):
                    continue
                show(f"{track.prepared.case.group}: {track.prepared.case.name}")
                self._play(track)
                self._calibrate(self._benches[track.prepared.case.shape])
            turn += 1

    def _warm(self, bench: Bench) -> None:
        """The first slice of all is not kept; the rule `cheaper` needs costs before the first run."""
        bench.slice.take()
        self._calibrate(bench)

    def _table(self, bench: Bench) -> MeasuredTable:
        """From clean slices; from disturbed ones as well where there is none."""
        return MeasuredTable(bench.stage.shape, bench.samples or bench.disturbed)

    def _calibrate(self, bench: Bench) -> None:
        gate = Gate()
        found = bench.slice.take()
        (bench.samples if gate.pressure() <= PRESSURE else bench.disturbed).add(found)

    def _play(self, track: Track) -> None:
        gate = Gate()
        table = self._table(self._benches[track.prepared.case.shape])
        log = play(track.prepared, track.stage, table.miss_costs, self._where, self._pace)
        stretched = not track.stage.backend.cuda and log.compute_wall > STRETCH * log.compute_cpu
        clean = gate.pressure() <= PRESSURE and not stretched
        (track.clean if clean else track.disturbed).append(log)

    def result(self) -> dict[str, Any]:
        """Rows by case, the summary over them, and the costs they were predicted with."""
        tables = {name: self._table(bench) for name, bench in self._benches.items()}
        rows = [_row(track, tables[track.prepared.case.shape]) for track in self._tracks]
        found = summary(rows)
        missing = [row for row in rows if row["clean_runs"] < REPEATS]
        missing_slices = [name for name, bench in self._benches.items() if not bench.samples]
        return {
            "status": verdict(found, len(missing) + len(missing_slices)),
            **found,
            "inconclusive_cases": len(missing),
            "tolerances": {"policy_ratio_error": RATIO, "total_error": TOTAL},
            "cases": rows,
            "costs_us": {name: table.summary_us() for name, table in tables.items()},
            "interference": {name: table.interference for name, table in tables.items()},
            "samples_us": {name: table.samples.medians_us() for name, table in tables.items()},
        }


def _row(track: Track, table: MeasuredTable) -> dict[str, Any]:
    """One case: decisions of every run, times of the clean ones where there are enough."""
    case = track.prepared.case
    table = table.of(Decisions.of(track.clean or track.disturbed))
    outcome, overlap = simulated(track.prepared, table)
    row: dict[str, Any] = {"group": case.group, "case": case.name, "policy": case.policy, "settings": case.settings}
    row |= {"shape": case.shape, "slots": case.slots, "clean_runs": len(track.clean)}
    row |= {"disturbed_runs": len(track.disturbed)}
    row |= {
        "deciding_us": table.own.layer_ns / 1e3,
        "computing_us": table.own.compute_ns / 1e3,
        "reserving_us": table.own.reserve_ns / 1e3,
        "overlap": asdict(overlap),
    }
    row |= decisions(track.prepared, track.clean + track.disturbed, outcome, table)
    if len(track.clean) >= REPEATS:
        row |= times(track.clean, outcome)
    elif track.disturbed:
        row["disturbed"] = times(track.clean + track.disturbed, outcome)
    return row
