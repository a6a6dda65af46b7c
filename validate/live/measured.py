"""Costs of this machine, measured in slices between the runs they are to predict, as the table the simulator asks."""

from __future__ import annotations

import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validate.live.loader import Job, Loader
from validate.live.runtime import Cores, HostExecutor
from validate.live.weights import HIGH_BITS, LOW_BITS, Stage

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

    def curve(self, *names: str) -> tuple[list[float], list[float]]:
        """(sizes, ns): the mean over `names` of the medians at each size."""
        sizes = sorted({size for what, size in self._all if what in names})
        values = [
            statistics.fmean(statistics.median(self._all[n, size]) for n in names if self._all.get((n, size)))
            for size in sizes
        ]
        return [float(size) for size in sizes], values

    def median(self, what: str) -> float:
        """Over all sizes; 0 where there is none."""
        values = [v for (name, _), own in self._all.items() if name == what for v in own]
        return statistics.median(values) if values else 0.0


class MeasuredTable:
    """What the engine asks of a cost table (moesim.costs.table.CostTable), answered from `samples` of one stage.

    Between sizes measured, costs are interpolated; the mean number of tokens stands for each expert of a group, whose
    first costs what one alone does and whose others what they add. A copy costs what it takes in a row of copies and
    the hand-offs around one that is waited for: exact for the only copy of a layer, and that hand-off too much for each
    further one. Copies and kernels are measured alone and beside each other, and the mean of the two medians is used.
    """

    unified = False
    matrices = 3
    dram_gbps = duplex_gbps = _NO_LIMIT

    def __init__(self, stage: Stage, samples: Samples) -> None:
        self._shape, self._samples = stage.shape, samples
        self.model: Any = SimpleNamespace(kv_bytes=lambda context: 0, layers=stage.shape.layers)
        self._copy = samples.curve("copy", "copy beside kernels")
        self._expert = {
            HIGH_BITS: samples.curve("expert", "expert beside copies"),
            LOW_BITS: samples.curve("low expert"),
        }
        self._further = {HIGH_BITS: samples.curve("further expert"), LOW_BITS: samples.curve("further low expert")}
        self._host = samples.curve("host expert")
        self._mixer, self._overhead = samples.curve("mixer"), samples.curve("bookkeeping")
        self.handoff_ns = round(samples.median("host hand-off"))
        self._handoff = samples.median("copy hand-off")
        self.copy_rate = stage.shape.nbytes() / self.copy_ns(stage.shape.nbytes())
        self.read_rate = self.host_rate = self.copy_rate

    @property
    def interference(self) -> dict[str, float]:
        """How much slower copies and kernels are beside each other than alone, as factors."""
        pairs = {"copies": ("copy", "copy beside kernels"), "kernels": ("expert", "expert beside copies")}
        out = {}
        for what, (alone, beside) in pairs.items():
            sizes = set(self._samples.curve(beside)[0]) & set(self._samples.curve(alone)[0])
            one, other = (dict(zip(*self._samples.curve(name), strict=True)) for name in (alone, beside))
            out[what] = statistics.median(other[s] / one[s] for s in sizes) if sizes else 1.0
        return out

    def step_ns(self, tokens: int, sequences: int) -> int:
        return 0

    def layers_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        rows = len(decode_context) + sum(new for new, _ in prefill)
        return [round(_at(self._mixer, rows) + _at(self._overhead, rows))] * self._shape.layers

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
        return round(first + (active - 1) * _at(self._further[kept], tokens / active))

    def expert_ns(self, tokens: int, bits: float | None = None) -> int:
        return self.grouped_ns(1, tokens, bits)

    def host_expert_ns(self, tokens: int, bits: float | None = None) -> int:
        return round(_at(self._host, tokens))

    def network_ns(self, params: float, tokens: int) -> int:
        return 0

    def expert_bytes(self, layer_index: int = 0, bits: float | None = None, expert: int | None = None) -> int:
        return self._shape.nbytes(HIGH_BITS if bits is None else bits)

    def copy_ns(self, nbytes: int, matrices: int = 1) -> int:
        return round(_at(self._copy, nbytes) + self._handoff)

    copy_back_ns = read_ns = copy_ns

    def miss_costs(self, tokens: int) -> tuple[int, int]:
        """(fetch and compute, compute on the host), ns: what the rule `cheaper` weighs."""
        return self.copy_ns(self._shape.nbytes()) + self.expert_ns(tokens), self.host_expert_ns(tokens)

    def summary_us(self) -> dict[str, float]:
        """The costs that matter most, for reports."""
        return {
            "copy": self.copy_ns(self._shape.nbytes()) / 1e3,
            "copy_hand_off": self._handoff / 1e3,
            "expert_1_token": self.expert_ns(1) / 1e3,
            "host_expert_1_token": self.host_expert_ns(1) / 1e3,
            "host_hand_off": self.handoff_ns / 1e3,
            "mixer_1_row": _at(self._mixer, 1) / 1e3,
            "bookkeeping_1_row": _at(self._overhead, 1) / 1e3,
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
                samples.note("copy hand-off", 1, self._round_trip(loader, lock, landed))
        finally:
            loader.close()

    def _round_trip(self, loader: Loader, lock: threading.Condition, landed: list[int]) -> float:
        job = self._job()
        with lock:
            loader.log.clear()
            landed.clear()
            began = time.perf_counter_ns()
            loader.submit(job)
            while not landed:
                lock.wait()
        passed, copied = time.perf_counter_ns() - began, loader.log[0]
        return max(0.0, passed - (copied.end - copied.start))

    def _beside(self, samples: Samples) -> None:
        """Kernels while the loader copies all the time, and those copies."""
        lock, landed = threading.Condition(), list[int]()
        loader = self._loader(lock, landed)
        try:
            with lock:
                for _ in range(64):
                    loader.submit(self._job())
            for tokens in self._tokens:
                with lock:
                    before = len(landed)
                ns = self._experts(HIGH_BITS, tokens, 1)
                with lock:
                    if before + 1 < 64 and len(landed) < 64:
                        samples.note("expert beside copies", tokens, ns)
            with lock:
                ends = [copied.end for copied in loader.log]
            for earlier, later in pairwise(ends[1:]):
                samples.note("copy beside kernels", self._stage.shape.nbytes(), later - earlier)
        finally:
            loader.close()

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
