"""Exchanges between GPUs of one machine, one process: NCCL, and plain copies from peer to peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.calibrate.device import Device, torch_dtype
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.timing import Timer, Timing, Work, measure
from moesim.units import KIB, MIB

_KINDS = ("send_recv", "all_reduce", "all_gather", "reduce_scatter")


def points(device: Device, budget_s: float) -> list[Point]:
    """nbytes is what each GPU holds before."""
    counts = [count for count in (2, 4, 8) if count <= max(2, device.count)]
    return [
        {"what": what, "nbytes": nbytes, "devices": count, "kernel": "copy" if what == "send_recv" else "nccl"}
        for what in _KINDS
        for count in counts
        for nbytes in (KIB << i for i in range(0, 19, 2))
        if nbytes <= 256 * MIB and (what != "send_recv" or count == 2)
    ]


def runnable(device: Device, point: Point) -> str | None:
    """Nothing to exchange with alone, or without a library."""
    import torch

    if device.count < int(point["devices"]):
        return f"exchanges between {point['devices']} GPUs need as many; this machine has {_found(device)}"
    if point["kernel"] == "nccl" and not hasattr(torch._C, "_nccl_all_reduce"):
        return "this torch was built without NCCL"
    return None


def _found(device: Device) -> int:
    return device.count if device.kind == "cuda" else 0


def measure_collective(point: Point, device: Device, timer: Timer) -> Timing:
    """By the wall clock with every GPU waited for: an exchange ends when its last member has it."""
    import torch

    nbytes, count = number(point, "nbytes", "devices")
    size = nbytes // 2
    places = [device.where if device.where == "meta" else f"cuda:{i}" for i in range(count)]
    held = [torch.ones(size, dtype=torch_dtype("bf16"), device=place) for place in places]
    exchange = _exchange(str(point["what"]), held)

    def run() -> None:
        exchange()
        for place in places:
            if place != "meta":
                torch.cuda.synchronize(place)

    return measure(Work(run, wall=True), timer)


def _exchange(what: str, held: list[Any]) -> Callable[[], Any]:
    from torch.cuda import nccl

    count = len(held)
    if what == "send_recv":
        return lambda: held[1].copy_(held[0], non_blocking=True)
    if what == "all_reduce":
        return lambda: nccl.all_reduce(held)
    parts = [x.new_empty(x.numel() // count) for x in held]
    if what == "all_gather":
        return lambda: nccl.all_gather(parts, held)
    return lambda: nccl.reduce_scatter(held, parts)


COLLECTIVE = Family("collective", "link", points, measure_collective, runnable, share=1.0)
