"""Drive to host memory: past the page cache and out of it, one request at a time and several."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.host import host_side
from moesim.calibrate.timing import Rule, Timer, Timing, Work, measure
from moesim.units import KIB, MIB, format_size

_ALIGNMENT = 4096  # what O_DIRECT asks of offsets, sizes and buffers

_VARYING = Rule(min_samples=16, max_seconds=0.5)  # a drive's times vary more than a processor's


def read_points(device: Device, budget_s: float) -> list[Point]:
    """Pieces of an expert to whole ones, one read at a time and several: few points, each for long, as drives vary."""
    sizes = [64 * KIB << i for i in range(0, 12, 2)]
    return [
        {"nbytes": size, "direct": direct, "depth": depth}
        for direct in (1, 0)
        for depth in (1, 4)
        for size in sizes
        if size / 1e9 <= budget_s / 1000
    ]


def runnable(device: Device, point: Point) -> str | None:
    """O_DIRECT is Linux's, and not on every file system; the file must fit beside what is there."""
    if not hasattr(os, "O_DIRECT"):
        return "reads past the page cache need O_DIRECT, which this system lacks"
    depth = int(point["depth"])
    if not point["direct"] and depth > device.cores:  # then it is memory copies that are timed
        return f"{depth} reads from the page cache at a time need {depth} cores, of which there are {device.cores}"
    size = _file_bytes(int(point["nbytes"]))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if size > free // 4:
        return f"{tempfile.gettempdir()} has {format_size(free)} free, a quarter of which cannot hold the test file"
    return None


def measure_read(point: Point, device: Device, timer: Timer) -> Timing:
    """Seconds until nbytes have arrived, by `depth` reads issued together."""
    nbytes, direct, depth = number(point, "nbytes", "direct", "depth")
    _, clock = host_side(device, timer)
    with open_reader(nbytes, bool(direct), depth, device.seed) as read:
        return measure(Work(read, wall=True, threads=depth), clock, _VARYING)


@contextmanager
def open_reader(nbytes: int, direct: bool, depth: int, seed: int) -> Iterator[Callable[[], Any]]:
    """A function that reads nbytes as `depth` random stretches of the test file at once, each into a buffer."""
    path, size = scratch_file(nbytes)
    each = nbytes // depth // _ALIGNMENT * _ALIGNMENT
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    handle = os.open(path, flags)
    offsets = random.Random(seed)
    buffers = [mmap.mmap(-1, each) for _ in range(depth)]

    def one(buffer: mmap.mmap) -> None:
        at = offsets.randrange((size - each) // _ALIGNMENT + 1) * _ALIGNMENT
        done = 0
        while done < each:  # the kernel may return less than asked for
            got = os.preadv(handle, [memoryview(buffer)[done:]], at + done)
            if not got:
                raise OSError(f"{path}: ended at {at + done} of {size}")
            done += got

    pool = ThreadPoolExecutor(depth) if depth > 1 else None
    try:
        yield (lambda: list(pool.map(one, buffers))) if pool else (lambda: one(buffers[0]))
    finally:
        if pool:
            pool.shutdown()
        os.close(handle)


class _Scratch:
    """The one test file, made when first asked for. It has no name: whatever ends the program frees its blocks."""

    handle: int | None = None
    size = 0


def scratch_file(nbytes: int) -> tuple[Path, int]:
    """A path by which the test file can be opened, and its size: at least twice `nbytes`, random inside."""
    wanted = _file_bytes(nbytes)
    if _Scratch.handle is None:
        handle, name = tempfile.mkstemp(prefix="moesim-calibrate-")
        os.unlink(name)
        _Scratch.handle = handle
    if _Scratch.size < wanted:
        block = random.Random(0).randbytes(4 * MIB)
        while _Scratch.size < wanted:
            _Scratch.size += os.pwrite(_Scratch.handle, block, _Scratch.size)
        os.fsync(_Scratch.handle)
    return Path(f"/proc/self/fd/{_Scratch.handle}"), _Scratch.size


def _file_bytes(nbytes: int) -> int:
    """Reads land at random places of a file twice as large."""
    return max(64 * MIB, 2 * nbytes)


READ = Family("read", "link", read_points, measure_read, runnable, share=1.5)
