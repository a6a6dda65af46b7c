"""Timers: how a CPU and a CUDA GPU are held still, emptied of cached inputs, and read."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from moesim.calibrate.clocks import Clocks
from moesim.calibrate.device import Device
from moesim.calibrate.timing import Sample, Timer, Work

_RESOLUTION_S = 50e-6  # a sample of something shorter is several runs: clocks cost and jitter by about a microsecond
_BUSY = 1.05  # wall over thread time: above it, another program had the core
_WAITED = 0.05  # share of the time a thread may have stood ready without a core
_WAKING_S = 50e-6  # what waking a thread costs anyway
_HOLD_CYCLES_PER_S = 2e9  # a GPU's clock, roughly: only decides how far ahead launches are queued
_TASKS = Path("/proc/self/task")


def timer_for(device: Device) -> Timer:
    """The timer of a device."""
    return CudaTimer(device, Clocks(device.index)) if device.kind == "cuda" else CpuTimer()


class CpuTimer:
    """Thread time for computation in one thread, wall time for the rest.

    Inputs rotate through a pool larger than the caches, so nothing is flushed. Samples during which others had a core
    are disturbed.
    """

    robust = True

    def __init__(self) -> None:
        self._repeats = 1

    def check(self, work: Work) -> bool:
        return _finite(work.run(*work.fresh()))

    def warm_up(self, work: Work) -> float:
        self._repeats = 1
        once = min(self._sample(work)[0] for _ in range(2))
        self._repeats = max(1, min(1000, int(_RESOLUTION_S / max(once, 1e-8))))
        return once * self._repeats

    def samples(self, work: Work, count: int) -> list[Sample]:
        return [Sample(*self._sample(work)) for _ in range(count)]

    def _sample(self, work: Work) -> tuple[float, bool]:
        """Seconds, and whether others had a core meanwhile."""
        inputs = [work.fresh() for _ in range(self._repeats)]
        waited = _waited_s() if work.wall else 0.0
        wall, own = time.perf_counter(), time.thread_time()
        for arguments in inputs:
            work.run(*arguments)
        own, wall = time.thread_time() - own, time.perf_counter() - wall
        if work.wall:
            return wall / self._repeats, _waited_s() - waited > work.threads * (_WAITED * wall + _WAKING_S)
        return own / self._repeats, wall > _BUSY * own + 20e-6


class CudaTimer:
    """CUDA events around each run, behind a kernel that holds the stream until every run of a batch is queued.

    Before each run a buffer larger than the L2 is zeroed. A batch during which the driver reports a thermal or
    hardware slowdown is discarded.
    """

    robust = False

    def __init__(self, device: Device, clocks: Clocks) -> None:
        import torch

        self._torch, self._device, self._clocks = torch, device, clocks
        self._flush = torch.empty(2 * device.cache_bytes, dtype=torch.uint8, device=device.where)
        self._enqueue_s = 0.0
        self._replay: Any = None

    def check(self, work: Work) -> bool:
        return _finite(work.run(*work.fresh()))

    def warm_up(self, work: Work) -> float:
        self._replay = self._capture(work) if work.graph else None
        for _ in range(2):
            work.run(*work.fresh())
        self._device.synchronize()
        started = time.perf_counter()
        run, arguments = self._launch(work)
        run(*arguments)
        self._enqueue_s = time.perf_counter() - started
        self._device.synchronize()
        return time.perf_counter() - started

    def samples(self, work: Work, count: int) -> list[Sample]:
        seconds = [self._wall(work) for _ in range(count)] if work.wall else self._events(work, count)
        throttled = self._clocks.throttled()
        return [Sample(s, throttled) for s in seconds]

    def _events(self, work: Work, count: int) -> list[float]:
        event = self._torch.cuda.Event
        marks = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(count)]
        launches = [self._launch(work) for _ in range(count)]
        hold_s = min(0.1, 1.5 * count * self._enqueue_s + 1e-4)
        self._torch.cuda._sleep(int(hold_s * _HOLD_CYCLES_PER_S))
        for (start, end), (run, arguments) in zip(marks, launches, strict=True):
            self._flush.zero_()
            start.record()
            run(*arguments)
            end.record()
        self._device.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in marks]

    def _wall(self, work: Work) -> float:
        self._flush.zero_()
        arguments = work.fresh()
        self._device.synchronize()
        started = time.perf_counter()
        work.run(*arguments)
        return time.perf_counter() - started

    def _launch(self, work: Work) -> tuple[Any, tuple[Any, ...]]:
        return (self._replay.replay, ()) if self._replay is not None else (work.run, work.fresh())

    def _capture(self, work: Work) -> Any:
        """The work as a CUDA graph over one set of inputs; they are cold because the L2 is flushed."""
        torch = self._torch
        arguments = work.fresh()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their workspaces outside the capture
            work.run(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work.run(*arguments)
        return graph


def _finite(result: Any) -> bool:
    """Nothing to say of results that are no floating-point tensor."""
    import torch

    if not isinstance(result, torch.Tensor) or not result.is_floating_point():
        return True
    return bool(torch.isfinite(result).all())


def _waited_s() -> float:
    """Seconds the threads of this program have stood ready without a core; 0 where the kernel does not say."""
    total = 0
    try:
        for task in _TASKS.iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError):  # no such accounting, or a thread that has just ended
        return 0.0
    return total * 1e-9
