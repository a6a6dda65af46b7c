"""In what pieces experts cross a link."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import PolicyError, nearest

UNITS = {
    "expert": "one packed copy per expert",
    "matrix": "one copy per weight matrix; a demand may pass between two of them",
    "layer": "a miss brings in every expert of its layer",
}


@dataclass(frozen=True)
class Transfer:
    """`write_back`: the cache is exclusive, so an evicted expert is copied back to the host (Mixtral-Offloading)."""

    unit: str = "expert"
    write_back: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise PolicyError(f"transfer.unit: unknown unit '{self.unit}'{nearest(self.unit, UNITS)}")
