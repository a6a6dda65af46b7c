"""Which experts are on the device before the first request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.errors import PolicyError, nearest

STARTS = {
    "empty": "none; the first use of each is a miss",
    "hot": "the most popular of the calibration requests, as many as fit",
    "all": "all of them, or as many as fit by calibration popularity",
}


@dataclass(frozen=True)
class Placement:
    """`pinned`: what is placed at the start never leaves.

    own: an object with `start(popularity)`, which names what is placed in place of `start` (docs/add-a-policy.md).
    """

    start: str = "empty"
    pinned: bool = False
    own: Any = None

    def __post_init__(self) -> None:
        if self.own is not None and not hasattr(self.own, "start"):
            raise PolicyError(f"placement {type(self.own).__name__} needs a method start(popularity)")
        if self.start not in STARTS:
            raise PolicyError(f"placement.start: unknown start '{self.start}'{nearest(self.start, STARTS)}")
