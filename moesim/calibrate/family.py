"""What a family of measurements is: which points there are, which of them run here, and how one is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesim.calibrate.device import Device
from moesim.calibrate.timing import Timer, Timing

Point = dict[str, int | str]  # the features of a row, as in costs/families.py


def no_limit(device: Device, point: Point) -> str | None:
    """Runs wherever torch does."""
    return None


@dataclass(frozen=True)
class Family:
    """points(device, budget_s): every point that may be worth measuring, those too long for the budget left out.

    runnable(device, point): None, or why this device cannot run it. beside(point): a point of another family to
    measure in the same breath, as (family, point). share: of the budget, relative to the other families.
    """

    name: str
    group: str
    points: Callable[[Device, float], list[Point]]
    measure: Callable[[Point, Device, Timer], Timing]
    runnable: Callable[[Device, Point], str | None] = no_limit
    beside: Callable[[Point], tuple[str, Point] | None] = lambda point: None
    share: float = 1.0


def number(point: Point, *names: str) -> list[int]:
    """Features as whole numbers."""
    return [int(point[name]) for name in names]
