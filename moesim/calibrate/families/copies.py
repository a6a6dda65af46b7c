"""Links: copies between host and device, and the round trip of a layer whose experts run on the CPU.

Without a GPU a copy from one buffer of main memory to another stands for the link; the profile's conditions say so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from queue import SimpleQueue
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.timing import Rule, Timer, Timing, Work, measure
from moesim.units import GIB, KIB, MIB

_WAKING = Rule(min_samples=30)  # how long a thread or a stream takes to wake varies from one time to the next


def copy_points(device: Device, budget_s: float) -> list[Point]:
    """Sizes first, then at the sizes of experts: parts, concurrency, and the other direction busy."""
    on_gpu = device.kind == "cuda"
    largest = GIB if on_gpu else 64 * MIB
    sizes = [KIB << i for i in range(21) if KIB << i <= largest]
    directions = ("h2d", "d2h", "d2d") if on_gpu else ("h2d",)
    found = [_point(d, s, p) for d in directions for s in sizes for p in ((0, 1) if d != "d2d" and on_gpu else (0,))]
    pinned = int(on_gpu)
    for size in (256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB):
        found += [_point("h2d", size, pinned, parts=parts) for parts in (3, 8, 32)]
        found += [_point("h2d", size, pinned, concurrent=streams) for streams in (2, 4, 8)]
        found += [_point(d, size, pinned, both=1) for d in directions if d != "d2d"]
    moved = [int(p["nbytes"]) * (1 + int(p["both"])) for p in found]
    return [p for p, n in zip(found, moved, strict=True) if n <= largest and device.affords(4 * budget_s, 0, n)]


def _point(direction: str, nbytes: int, pinned: int, concurrent: int = 1, parts: int = 1, both: int = 0) -> Point:
    return {"direction": direction, "nbytes": nbytes, "pinned": pinned, "concurrent": concurrent, "parts": parts,
            "both": both}  # fmt: skip


def copy_runnable(device: Device, point: Point) -> str | None:
    """Copies beside one another in main memory take a core each."""
    workers = int(point["concurrent"]) + int(point["both"])
    if device.kind == "cpu" and workers > device.cores:
        return f"{workers} copies at a time need {workers} cores, of which there are {device.cores}"
    return None


def measure_copy(point: Point, device: Device, timer: Timer) -> Timing:
    """Seconds until nbytes have arrived: over `concurrent` streams, on each in `parts` pieces one after another."""
    measured = _measure_cuda if device.kind == "cuda" else _measure_memory
    return measured(point, device, timer)


def _measure_cuda(point: Point, device: Device, timer: Timer) -> Timing:
    nbytes, pinned, concurrent, parts, both = number(point, "nbytes", "pinned", "concurrent", "parts", "both")
    direction = str(point["direction"])
    each = nbytes // concurrent
    lanes = [_pieces(_ends(device, direction, each, bool(pinned)), parts) for _ in range(concurrent)]
    if direction == "d2d" or (pinned and concurrent == 1 and not both):
        return measure(Work(lambda: _transfer(lanes[0])), timer)

    def run() -> None:
        waits = [device.apart(lambda lane=lane: _transfer(lane)) for lane in lanes]  # type: ignore[misc]
        for wait in waits:
            wait()

    # A pageable copy keeps the host busy, and several streams end when the last of them does: by the wall clock.
    with _busy(device, _ends(device, "d2h" if direction == "h2d" else "h2d", nbytes, True)) if both else nullcontext():
        return measure(Work(run, wall=True), timer)


def _ends(device: Device, direction: str, nbytes: int, pinned: bool) -> tuple[Any, Any]:
    """(to, from) of a copy."""
    near = device.empty("int8", nbytes)
    if direction == "d2d":
        return near, device.empty("int8", nbytes)
    far = device.host(nbytes, pinned)
    return (near, far) if direction == "h2d" else (far, near)


def _pieces(ends: tuple[Any, Any], parts: int) -> list[tuple[Any, Any]]:
    return list(zip(ends[0].chunk(parts), ends[1].chunk(parts), strict=True))


def _transfer(pieces: list[tuple[Any, Any]]) -> None:
    for to, source in pieces:
        to.view(-1).copy_(source.view(-1), non_blocking=True)


def _measure_memory(point: Point, device: Device, timer: Timer) -> Timing:
    nbytes, concurrent, parts, both = number(point, "nbytes", "concurrent", "parts", "both")

    def fresh() -> tuple[Any, ...]:
        ends = device.take("int8", 2 * nbytes).chunk(2 * concurrent)
        return tuple(_pieces(pair, parts) for pair in zip(ends[::2], ends[1::2], strict=True))

    if concurrent == 1:
        with _busy(device, fresh()[0][0]) if both else nullcontext():
            return measure(Work(_transfer, fresh, wall=True, threads=1 + both), timer)
    with ThreadPoolExecutor(concurrent) as pool:
        return measure(
            Work(lambda *lanes: list(pool.map(_transfer, lanes)), fresh, wall=True, threads=concurrent), timer
        )


@contextmanager
def _busy(device: Device, ends: tuple[Any, Any]) -> Iterator[None]:
    """Another thread copies all the while."""
    with background(lambda: device.wait_for(lambda: _transfer([ends]))):
        yield


@contextmanager
def background(work: Callable[[], Any]) -> Iterator[None]:
    """Repeat `work` in a thread until the block ends; what it raises is raised here."""
    stop = threading.Event()

    def loop() -> None:
        while not stop.is_set():
            work()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop)
        try:
            yield
        finally:
            stop.set()
        running.result()


def handoff_points(device: Device, budget_s: float) -> list[Point]:
    """Activations of a layer: one token to a batch."""
    return [{"tokens": tokens, "hidden": hidden} for hidden in (2048, 4096, 7168) for tokens in (1, 4, 16, 64, 256)]


def handoff_runnable(device: Device, point: Point) -> str | None:
    """Two threads that wake one another need a core each."""
    return "the hand-off between threads needs 2 cores" if device.kind == "cpu" and device.cores < 2 else None


def measure_handoff(point: Point, device: Device, timer: Timer) -> Timing:
    """Activations to the CPU, waited for, and back; without a GPU from one thread to another and back."""
    tokens, hidden = number(point, "tokens", "hidden")
    if device.kind == "cuda":
        return measure(_round_trip(device, tokens * hidden), timer, _WAKING)
    requests: SimpleQueue[Any] = SimpleQueue()
    answers: SimpleQueue[Any] = SimpleQueue()

    def serve() -> None:
        while (given := requests.get()) is not None:
            answers.put(given.clone())

    def run(x: Any) -> Any:
        requests.put(x.clone())
        return answers.get()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        return measure(Work(run, lambda: (device.take("fp32", tokens, hidden),), wall=True, threads=2), timer, _WAKING)
    finally:
        requests.put(None)
        thread.join()


def _round_trip(device: Device, size: int) -> Work:
    x, staged = device.take("bf16", size), device.host(2 * size, pinned=True)

    def run() -> None:
        view = staged.view(x.dtype)
        view.copy_(x, non_blocking=True)
        device.synchronize()
        x.copy_(view, non_blocking=True)
        device.synchronize()

    return Work(run, wall=True)


COPY = Family("copy", "link", copy_points, measure_copy, copy_runnable, share=1.5)
HANDOFF = Family("handoff", "link", handoff_points, measure_handoff, handoff_runnable, share=0.5)
