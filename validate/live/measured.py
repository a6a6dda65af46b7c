"""Costs of this machine, measured in slices between the runs they are to predict, as the table the simulator asks."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from validate.live.loader import Job, Loader
from validate.live.runtime import Cores, HostExecutor, Log
from validate.live.weights import HIGH_BITS, LOW_BITS, Shape, Stage

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # of one expert
ROWS = (1, 8, 32, 64, 128)  # of a step
_NO_LIMIT = 1e9  # GB/s: what is shared is measured together, so the simulator need not share it out

Point = tuple[str, int]  # what was measured, at how many tokens or bytes


class Samples:
    """Nanoseconds by point, of all slices that were clean."""

    def __init__(self) -> None:
        self._all: dict[Point, list[float]] = defaultdict(list)

    def add(self, other: Samples) -> None:
        for point, values in other._all.items():
            self._all[point] += values

    def __bool__(self) -> bool:
        return bool(self._all)

    def note(self, what: str, size: int, ns: float) -> None:
        self._all[what, size].append(ns)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """(sizes, medians of ns)."""
        sizes = sorted({size for what, size in self._all if what == name})
        return [float(size) for size in sizes], [statistics.median(self._all[name, size]) for size in sizes]

    def medians_us(self) -> dict[str, list[tuple[int, float]]]:
        """(size, median) of everything, for reports."""
        found: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for (what, size), values in sorted(self._all.items()):
            found[what].append((size, statistics.median(values) / 1e3))
        return dict(found)

    def median(self, what: str) -> float:
        """Over all sizes; 0 where there is none."""
        values = [v for (name, _), own in self._all.items() if name == what for v in own]
        return statistics.median(values) if values else 0.0


@dataclass(frozen=True)
class Decisions:
    """What a runtime in Python takes beside its work. The simulated system is not Python, so this is read off the very
    runs it is held against.

    layer_ns: of a layer, until its experts are asked for; compute_ns: the rest, per call of kernels; reserve_ns: to
    look for slots, per transfer; woken, slept: shares of transfers and of arrivals for which the thread that copies or
    computes has to be woken.
    """

    layer_ns: float = 0.0
    compute_ns: float = 0.0
    reserve_ns: float = 0.0
    woken: float = 1.0
    slept: float = 1.0

    @classmethod
    def of(cls, logs: Sequence[Log]) -> Decisions:
        """Means over layers, calls and transfers of the medians over runs."""
        took, kernels, waiting, deciding, computes = np.median(
            [[row[6:] for row in log.layers] for log in logs], axis=0
        ).T
        rest = (took - kernels - waiting - deciding).sum() / max(computes.sum(), 1)
        transfers = max(len(logs[0].transfers), 1)
        reserving = statistics.median(log.reserving for log in logs) / transfers
        woken = statistics.median(sum(copied.woken for copied in log.transfers) for log in logs) / transfers
        slept = statistics.median(log.slept for log in logs) / max(logs[0].arrivals, 1)
        return cls(float(deciding.mean()), float(rest), reserving, woken, slept)


@dataclass(frozen=True)
class Overlap:
    """Shares of time in which copies and kernels go on side by side: of mixers, of experts that were there, of those
    that have come, of copies."""

    mixer: float = 0.0
    resident: float = 0.0
    arrived: float = 0.0
    copies: float = 0.0


class MeasuredTable:
    """What the engine asks of a cost table (moesim.costs.table.CostTable), answered from `samples` of one stage.

    Between sizes measured, costs are interpolated; the mean number of tokens stands for each expert of a group, whose
    first costs what one alone does and whose others what they add. A copy costs what it takes in a row of copies, more
    where its thread has to be woken; an expert that arrives costs its kernels, right after it has come, and more where
    that thread has to be woken.

    own: what the decisions of the case take, in Python. overlap: shares of the time of its kernels and copies in which
    the other kind is under way, where they are as much slower as slices have found.
    """

    unified = False
    matrices = 3
    dram_gbps = duplex_gbps = _NO_LIMIT

    def __init__(
        self, shape: Shape, samples: Samples, own: Decisions = Decisions(), overlap: Overlap = Overlap()
    ) -> None:
        self._shape, self.samples, self.own = shape, samples, own
        self.model: Any = SimpleNamespace(kv_bytes=lambda context: 0, layers=shape.layers)
        self._copy, self._copy_beside = samples.curve("copy"), samples.curve("copy beside kernels")
        self._expert = {HIGH_BITS: samples.curve("expert"), LOW_BITS: samples.curve("low expert")}
        self._arrived = samples.curve("arrived expert")
        self._further = {HIGH_BITS: samples.curve("further expert"), LOW_BITS: samples.curve("further low expert")}
        self._host = samples.curve("host expert")
        self._mixer = samples.curve("mixer")
        self.handoff_ns = round(samples.median("host hand-off"))
        self._wake_loader, self._wake_compute = samples.median("wake loader"), samples.median("wake compute")
        slower = self.interference
        self._slower_mixer = 1 + overlap.mixer * (slower["kernels"] - 1)
        self._slower_expert = 1 + overlap.resident * (slower["kernels"] - 1)
        self._slower_arrived = 1 + overlap.arrived * (slower["arrived"] - 1)
        self._copies_overlap = overlap.copies if self._copy_beside[0] else 0.0
        self.copy_rate = shape.nbytes() / self.copy_ns(shape.nbytes())
        self.read_rate = self.host_rate = self.copy_rate

    def of(self, own: Decisions) -> MeasuredTable:
        """The same for a case whose decisions take that long."""
        return MeasuredTable(self._shape, self.samples, own)

    def overlapping(self, overlap: Overlap) -> MeasuredTable:
        """The same for a case in which that much happens at once."""
        return MeasuredTable(self._shape, self.samples, self.own, overlap)

    @property
    def interference(self) -> dict[str, float]:
        """How much slower copies and kernels are beside each other than alone, as factors."""
        pairs = {
            "copies": ("copy", "copy beside kernels"),
            "kernels": ("expert", "expert beside copies"),
            "arrived": ("arrived expert", "arrived expert beside copies"),
        }
        out = {}
        for what, (alone, beside) in pairs.items():
            sizes = set(self.samples.curve(beside)[0]) & set(self.samples.curve(alone)[0])
            one, other = (dict(zip(*self.samples.curve(name), strict=True)) for name in (alone, beside))
            out[what] = statistics.median(other[s] / one[s] for s in sizes) if sizes else 1.0
        return out

    def step_ns(self, tokens: int, sequences: int) -> int:
        return 0

    def layers_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        rows = len(decode_context) + sum(new for new, _ in prefill)
        return [round(_at(self._mixer, rows) * self._slower_mixer + self.own.layer_ns)] * self._shape.layers

    @property
    def layer_kinds(self) -> list[int]:
        return [0] * self._shape.layers

    def kinds_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        return self.layers_ns(prefill, decode_context)[:1]

    def passes_ns(self, contexts: Sequence[int], passes: int) -> NDArray[np.int64]:
        return np.full((passes, 1), self.layers_ns([], contexts)[0])

    def grouped_ns(self, active: int, tokens: int, bits: float | None = None) -> int:
        kept = HIGH_BITS if bits is None else int(bits)
        first = _at(self._expert[kept], tokens / active)
        further = (active - 1) * _at(self._further[kept], tokens / active)
        return round((first + further) * self._slower_expert + self.own.compute_ns)

    def expert_ns(self, tokens: int, bits: float | None = None) -> int:
        kernels = _at(self._arrived, tokens) * self._slower_arrived
        if bits == LOW_BITS:
            kernels *= _at(self._expert[LOW_BITS], tokens) / _at(self._expert[HIGH_BITS], tokens)
        return round(kernels + self.own.compute_ns + self.own.slept * self._wake_compute)

    def host_expert_ns(self, tokens: int, bits: float | None = None) -> int:
        return round(_at(self._host, tokens))

    def network_ns(self, params: float, tokens: int) -> int:
        return 0

    def expert_bytes(self, layer_index: int = 0, bits: float | None = None, expert: int | None = None) -> int:
        return self._shape.nbytes(HIGH_BITS if bits is None else bits)

    def copy_ns(self, nbytes: int, matrices: int = 1) -> int:
        moved = _at(self._copy, nbytes)
        if self._copies_overlap:
            moved += self._copies_overlap * (_at(self._copy_beside, nbytes) - moved)
        return round(moved + self.own.reserve_ns + self.own.woken * self._wake_loader)

    copy_back_ns = read_ns = copy_ns

    def miss_costs(self, tokens: int) -> tuple[int, int]:
        """(fetch and compute, compute on the host), ns: what the rule `cheaper` weighs."""
        return self.copy_ns(self._shape.nbytes()) + self.expert_ns(tokens), self.host_expert_ns(tokens)

    def summary_us(self) -> dict[str, float | None]:
        """The costs that matter most, for reports."""
        return {
            "copy": self.copy_ns(self._shape.nbytes()) / 1e3,
            "wake_loader": self._wake_loader / 1e3,
            "wake_compute": self._wake_compute / 1e3,
            "expert_1_token": self.grouped_ns(1, 1) / 1e3,
            "host_expert_1_token": self.host_expert_ns(1) / 1e3 if self._host[0] else None,
            "host_hand_off": self.handoff_ns / 1e3,
            "mixer_1_row": _at(self._mixer, 1) / 1e3,
        }


def _at(curve: tuple[list[float], list[float]], size: float) -> float:
    """Interpolated between the sizes measured, in proportion beyond the largest."""
    sizes, values = curve
    if size > sizes[-1]:
        return values[-1] * size / sizes[-1]
    return float(np.interp(size, sizes, values))


class Slice:
    """One short calibration of a stage: kernels and copies alone and beside each other, host experts, hand-offs."""

    def __init__(self, stage: Stage, where: Cores, pace_gbps: float, largest: int) -> None:
        self._stage, self._where, self._pace = stage, where, pace_gbps
        self._rows = [n for n in ROWS if n <= largest] or [1]
        self._tokens = [n for n in TOKENS if n <= largest]
        self._turn = 0

    def take(self) -> Samples:
        """Measure everything once; a point takes the time of one or a few runs."""
        samples = Samples()
        self._kernels(samples)
        self._copies(samples)
        self._beside(samples)
        if not self._stage.shape.sparse:  # no CPU multiplies packed weights
            self._host(samples)
        return samples

    def _next(self) -> int:
        self._turn += 1
        return self._turn

    def _kernels(self, samples: Samples) -> None:
        for rows in self._rows:
            for _ in range(2):
                samples.note("mixer", rows, _timed(partial(self._stage.mixer, rows)))
        for name, bits in (("expert", HIGH_BITS), ("low expert", LOW_BITS)):
            if self._stage.slots[bits]:
                for tokens in self._tokens:
                    one, five = self._experts(bits, tokens, 1), self._experts(bits, tokens, 5)
                    samples.note(name, tokens, one)
                    samples.note(f"further {name}", tokens, max(0.0, five - one) / 4)

    def _experts(self, bits: int, tokens: int, count: int) -> float:
        slots, rows = self._stage.slots[bits], list(range(tokens))
        parts = [(slots[self._next() % len(slots)], rows) for _ in range(count + 1)]
        self._stage.compute(parts[:1])  # in a run, work of the same kind was done a moment ago
        return _timed(lambda: self._stage.compute(parts[1:]))

    def _loader(self, lock: threading.Condition, landed: list[int]) -> Loader:
        def copy(job: Job) -> None:
            bits = HIGH_BITS if job.nbytes == self._stage.shape.nbytes() else LOW_BITS
            slots = self._stage.slots[bits]
            self._stage.copy(slots[job.key % len(slots)], bits, job.layer, job.expert, job.copied, job.parts)

        def arrived(job: Job) -> None:
            landed.append(job.key)

        return Loader(
            lock, lambda job: True, lambda job: False, copy, arrived, lambda job: None, self._where.loader, self._pace
        )

    def _job(self, parts: int = 1, low: bool = False) -> Job:
        shape, turn = self._stage.shape, self._next()
        nbytes = shape.nbytes(LOW_BITS if low else HIGH_BITS)
        return Job(turn % shape.layers, turn % shape.experts, turn, nbytes, parts, True, 0, True)

    def _copies(self, samples: Samples) -> None:
        """Rows of copies by size, and round trips of single ones: what the thread that waits loses around a copy."""
        lock, landed = threading.Condition(), list[int]()
        loader = self._loader(lock, landed)
        try:
            kinds = [(1, False), (3, False)] + ([(1, True)] if self._stage.slots[LOW_BITS] else [])
            for parts, low in kinds:
                jobs = [self._job(parts, low) for _ in range(4)]
                with lock:
                    loader.log.clear()
                    landed.clear()
                    for job in jobs:
                        loader.submit(job)
                    while len(landed) < len(jobs):
                        lock.wait()
                    ends = [copied.end for copied in loader.log]
                for earlier, later in pairwise(ends):
                    samples.note("copy", jobs[0].nbytes // parts, later - earlier)
            for _ in range(3):
                for what, ns in zip(
                    ("wake loader", "wake compute"), self._round_trip(loader, lock, landed), strict=True
                ):
                    samples.note(what, 1, ns)
        finally:
            loader.close()

    def _round_trip(self, loader: Loader, lock: threading.Condition, landed: list[int]) -> tuple[float, float]:
        """ns from asking for a copy to its start, and from its end until the thread that waits goes on."""
        job = self._job()
        with lock:
            loader.log.clear()
            landed.clear()
            began = time.perf_counter_ns()
            loader.submit(job)
            while not landed:
                lock.wait()
        copied = loader.log[0]
        return copied.start - began, time.perf_counter_ns() - copied.end

    def _beside(self, samples: Samples) -> None:
        """Kernels and copies as a layer has them: an expert that is there while the first of two copies starts, that
        one when it has come, the second when it has come and nothing flies any more. Caches still hold what has just
        come, and both threads want the interpreter's lock at these moments."""
        lock, landed = threading.Condition(), list[int]()
        loader = self._loader(lock, landed)
        try:
            for parts in (1, 3):
                for tokens in self._tokens:
                    with lock:
                        landed.clear()
                        loader.log.clear()
                    rows, other = list(range(tokens)), self._slot(self._next())
                    self._stage.compute([(other, rows)])
                    with lock:
                        for _ in range(2):
                            loader.submit(self._job(parts))
                    resident = self._compute_ns(self._slot(self._next()), rows)
                    first, came = self._arrived_ns(lock, landed, 1, rows)
                    second, _ = self._arrived_ns(lock, landed, 2, rows)
                    if parts == 1:
                        samples.note("expert beside copies", tokens, resident)
                        samples.note("arrived expert", tokens, second)
                        if not came:  # the second copy flew all the while
                            samples.note("arrived expert beside copies", tokens, first)
                    for earlier, later in pairwise(copied.end for copied in loader.log):
                        samples.note("copy beside kernels", self._stage.shape.nbytes() // parts, later - earlier)
        finally:
            loader.close()

    def _slot(self, key: int) -> Tensor:
        slots = self._stage.slots[HIGH_BITS]
        return slots[key % len(slots)]

    def _compute_ns(self, slot: Tensor, rows: list[int]) -> float:
        return _timed(lambda: self._stage.compute([(slot, rows)]))

    def _arrived_ns(
        self, lock: threading.Condition, landed: list[int], count: int, rows: list[int]
    ) -> tuple[float, bool]:
        """ns of the expert that came as number `count`, and whether others came meanwhile."""
        with lock:
            while len(landed) < count:
                lock.wait()
        ns = self._compute_ns(self._slot(landed[count - 1]), rows)
        with lock:
            return ns, len(landed) > count

    def _host(self, samples: Samples) -> None:
        """Experts on the CPU through the executor: the last of a few, and what the first took longer."""
        lock = threading.Condition()
        executor = HostExecutor(self._stage, lock, self._where.host)
        try:
            for tokens in self._tokens:
                one, three = (self._hosted_ns(executor, lock, tokens, count) for count in (1, 3))
                samples.note("host expert", tokens, (three - one) / 2)
                samples.note("host hand-off", 1, max(0.0, one - (three - one) / 2))
        finally:
            executor.close()

    def _hosted_ns(self, executor: HostExecutor, lock: threading.Condition, tokens: int, count: int) -> float:
        shape, began = self._stage.shape, time.perf_counter_ns()
        with lock:
            for _ in range(count):
                turn = self._next()
                executor.submit(turn % shape.layers, turn % shape.experts, list(range(tokens)))
            while executor.pending:
                lock.wait()
        for rows, values in executor.results:
            self._stage.add(rows, values)
        executor.results.clear()
        return time.perf_counter_ns() - began


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - began
