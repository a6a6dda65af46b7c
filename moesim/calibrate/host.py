"""The CPU beside a GPU: its own pools and its own timer."""

from __future__ import annotations

from functools import cache

from moesim.calibrate.device import Device, open_device
from moesim.calibrate.timers import CpuTimer
from moesim.calibrate.timing import Timer


def host_side(device: Device, timer: Timer) -> tuple[Device, Timer]:
    """The host of `device` and a timer for it: `device` itself and `timer` where that already is the CPU."""
    return (device, timer) if device.kind == "cpu" else _host(device.seed)


@cache
def _host(seed: int) -> tuple[Device, Timer]:
    return open_device("cpu", seed), CpuTimer()
