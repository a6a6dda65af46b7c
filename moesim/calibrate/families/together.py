"""What each activity takes while others run: bandwidths measured alone describe no serving machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.families.copies import background
from moesim.calibrate.families.experts import expert_ffn
from moesim.calibrate.families.reads import open_reader
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.host import host_side
from moesim.calibrate.timing import Timer, Timing, Work, measure
from moesim.costs.families import ACTIVITIES
from moesim.units import MIB

_HIDDEN = 2048


def points(device: Device, budget_s: float) -> list[Point]:
    """Every mix of the four activities, from the view of each that runs in it; nbytes is an expert's."""
    sizes = (4 * MIB, 16 * MIB, 64 * MIB) if device.kind == "cuda" else (2 * MIB, 8 * MIB, 32 * MIB)
    return [
        {"what": what, "h2d": mix[0], "host": mix[1], "disk": mix[2], "gpu": mix[3], "nbytes": nbytes}
        for nbytes in sizes
        for mix in product((0, 1), repeat=4)
        for what in ACTIVITIES
        if mix[ACTIVITIES.index(what)]
    ]


def runnable(device: Device, point: Point) -> str | None:
    """Without a GPU copies and device products are CPU threads as well; sharing a core is another question."""
    threads = sum(int(point[what]) for what in ("h2d", "host", "gpu"))
    needed = threads if device.kind == "cpu" else int(point["host"]) + 1
    if needed > device.cores:
        return f"{needed} busy threads need {needed} cores, of which there are {device.cores}"
    return None


def measure_together(point: Point, device: Device, timer: Timer) -> Timing:
    """Activity `what` by the wall clock, repeated, while every other one of the mix repeats in a thread of its own."""
    nbytes = number(point, "nbytes")[0]
    what = str(point["what"])
    with ExitStack() as stack:
        for other in ACTIVITIES:
            if other != what and point[other]:
                run = stack.enter_context(_activity(other, device, timer, nbytes))
                stack.enter_context(background(run))
        own = stack.enter_context(_activity(what, device, timer, nbytes))
        return measure(Work(own, wall=True, threads=sum(int(point[name]) for name in ACTIVITIES)), timer)


@contextmanager
def _activity(what: str, device: Device, timer: Timer, nbytes: int) -> Iterator[Callable[[], Any]]:
    """One run of an activity, over with when the function returns."""
    if what == "disk":
        with open_reader(nbytes, True, 1, device.seed) as read:
            yield read
    elif what == "host":
        host, _ = host_side(device, timer)
        yield _expert(host, nbytes)
    elif what == "gpu":
        run = _expert(device, nbytes)
        yield lambda: device.wait_for(run)
    elif device.kind == "cuda":
        near, far = device.empty("int8", nbytes), device.host(nbytes, pinned=True)
        yield lambda: device.wait_for(lambda: near.copy_(far, non_blocking=True))
    else:
        yield lambda: device.take("int8", nbytes).copy_(device.take("int8", nbytes))


def _expert(device: Device, nbytes: int) -> Callable[[], Any]:
    """One token through an expert of nbytes."""
    dtype, itemsize = ("bf16", 2) if device.kind == "cuda" else ("fp32", 4)
    ffn = nbytes // (3 * _HIDDEN * itemsize)
    x = device.take(dtype, 1, _HIDDEN)
    return lambda: expert_ffn(x, device.take(dtype, 2 * ffn, _HIDDEN), device.take(dtype, _HIDDEN, ffn))


TOGETHER = Family("together", "together", points, measure_together, runnable, share=2.0)
