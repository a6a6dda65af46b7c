"""How one point is measured: check, warm up, sample until stable, discard what was disturbed, median and MAD.

A timer knows its device: how to hold the stream, how to empty caches, how to read a clock, and when a sample was
disturbed (timers.py). The method here knows only timers, so tests run it with a scripted one.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from moesim.errors import CalibrationError


@dataclass(frozen=True)
class Work:
    """One measured action: `run(*fresh())`, where `fresh` (not timed) hands out inputs that no cache holds.

    wall: `run` returns when all is done and is timed by the wall clock, as whatever waits for a link, a drive or
    another thread must be; otherwise the device's own clock is read. threads: of the CPU that take part.
    graph: many small kernels, replayed as a CUDA graph where there is one.
    """

    run: Callable[..., Any]
    fresh: Callable[[], tuple[Any, ...]] = tuple
    wall: bool = False
    threads: int = 1
    graph: bool = False


@dataclass(frozen=True)
class Sample:
    """Seconds of one run; disturbed: clocks were throttled or another program had the CPU."""

    seconds: float
    disturbed: bool = False


class Timer(Protocol):
    """What the method asks of a device.

    robust: its own clock stays about right while other programs run, as thread time does. Samples kept only for that
    are marked contaminated; samples by the wall clock never are kept.
    """

    robust: bool

    def check(self, work: Work) -> bool:
        """Run once; whether what came out is finite."""

    def warm_up(self, work: Work) -> float:
        """Run until warm; seconds of one run."""

    def samples(self, work: Work, count: int) -> list[Sample]:
        """`count` samples, each with cold caches."""


@dataclass(frozen=True)
class Rule:
    """Sample until the median's 95 % interval is within `half_width` of it, or until one of the limits."""

    half_width: float = 0.02
    min_samples: int = 6
    max_samples: int = 60
    max_seconds: float = 0.25

    def is_finished(self, kept: list[float], tried: int, elapsed: float) -> bool:
        """`tried` counts disturbed samples too."""
        enough = len(kept) >= self.min_samples
        if enough and half_width(kept) <= self.half_width:
            return True
        if not kept and tried >= 2 * self.min_samples:
            return True  # a busy moment: better another point now and this one later
        patience = 1 if enough else 3  # slow or partly disturbed points may take longer
        return tried >= patience * self.max_samples or elapsed >= patience * self.max_seconds

    def batch(self, kept: list[float], once: float) -> int:
        """Samples to take before looking again: the fewest at first, then as many again, never past the time."""
        return max(1, min(max(self.min_samples, len(kept)), int(self.max_seconds / max(once, 1e-9))))


@dataclass(frozen=True)
class Timing:
    """Median and median absolute deviation of the kept samples, which are all here; discarded: disturbed ones.

    contaminated: nearly all were disturbed, so the disturbed ones were kept.
    """

    seconds: float
    mad_s: float
    samples: tuple[float, ...]
    discarded: int = 0
    contaminated: bool = False

    @property
    def n(self) -> int:
        return len(self.samples)


class Disturbed(Exception):
    """Too few samples were left: other programs or throttling took the rest. Worth another try."""


def measure(work: Work, timer: Timer, rule: Rule | None = None) -> Timing:
    """Time `work`. Raises Disturbed, or CalibrationError where its result is not finite."""
    rule = rule or Rule()
    if not timer.check(work):
        raise CalibrationError(
            "the result is not finite; a time of a wrong result is no measurement, so look at the kernel"
        )
    once = timer.warm_up(work)
    kept: list[float] = []
    disturbed: list[float] = []
    started = time.perf_counter()
    while not rule.is_finished(kept, len(kept) + len(disturbed), time.perf_counter() - started):
        for sample in timer.samples(work, rule.batch(kept, once)):
            (disturbed if sample.disturbed else kept).append(sample.seconds)
    if len(kept) >= min(3, len(kept) + len(disturbed)):
        return summarize(kept, discarded=len(disturbed))
    if work.wall or not timer.robust:
        raise Disturbed(f"{len(disturbed)} of {len(kept) + len(disturbed)} samples were disturbed")
    return summarize(kept + disturbed, contaminated=True)


def summarize(samples: list[float], discarded: int = 0, contaminated: bool = False) -> Timing:
    """Median and MAD of `samples`, in the order taken."""
    median = statistics.median(samples)
    mad = statistics.median(abs(sample - median) for sample in samples)
    return Timing(median, mad, tuple(samples), discarded, contaminated)


def half_width(samples: list[float]) -> float:
    """Half of the median's 95 % interval (order statistics, normal approximation), as a share of the median."""
    ordered, n = sorted(samples), len(samples)
    reach = 1.96 * math.sqrt(n) / 2
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach) - 1)
    median = statistics.median(ordered)
    return (ordered[high] - ordered[low]) / 2 / median if median else 0.0
