"""P10 and P90 of a prediction: how far its costs may be off, and how far the model itself is.

Costs have bands of their own (a term's slow and fast end, the residuals of a profile's curves). What no cost knows of,
what engines fuse, overlap or wait for, is the model's own error. Both are scaled by how far predictions were from
published measurements (docs/accuracy.md): data/model_error.csv.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from moesim.efficiencies import read_table

if TYPE_CHECKING:
    from moesim.machine import Machine
    from moesim.systems import System

COVERED = 0.8  # between P10 and P90


class ModelError(NamedTuple):
    """costs: share of the costs' band that counts; own: the model's, as the natural logarithm of a factor."""

    costs: float
    own: float

    def half_width(self, costs: float) -> float:
        """Logarithm of P90 over the prediction, or of the prediction over P10, where costs move it by `costs`."""
        return math.hypot(self.costs * costs, self.own)


NONE = ModelError(1.0, 0.0)  # the costs' band as it is


def model_error(basis: str, group: str = "") -> ModelError:
    """Of predictions on this basis, fitted to every source, or to all but `group`, where that was one of them."""
    table = _table()
    return table.get((basis, group)) or table[basis, ""]


@cache
def _table() -> dict[tuple[str, str], ModelError]:
    rows = read_table("model_error")
    return {(r["basis"], r["without"]): ModelError(float(r["costs"]), float(r["own"])) for r in rows}


def basis_of(machine: Machine, system: System) -> str:
    """Which row of the table a prediction's error comes from."""
    if not system.all_resident:
        return "experts absent"
    return "profile" if machine.profile else "specification sheet"


def spread(value: float, ends: Sequence[float]) -> tuple[float, float]:
    """(down, up): logarithms of how far the ends of the resources' bands move a value, added as squares by side."""
    moved = [math.log(end / value) for end in ends]
    down, up = (math.sqrt(sum(m * m for m in moved if m * side > 0)) for side in (-1, 1))
    return down, up


def band(value: float, ends: Sequence[float], error: ModelError = NONE) -> tuple[float, float]:
    """P10 and P90 of a value whose costs at the ends of the resources' bands make it `ends`."""
    down, up = (error.half_width(costs) for costs in spread(value, ends))
    return value * math.exp(-down), value * math.exp(up)


class Miss(NamedTuple):
    """One prediction beside its measurement: its source, how far costs move it towards the measured value and how far
    that is, both as logarithms and above 0."""

    group: str
    costs: float
    off: float


def fit(misses: Iterable[Miss]) -> ModelError:
    """The error with the smallest mean interval score, every source weighing the same.

    The score of an 80 % interval is its width plus 10 times what lies outside (Gneiting and Raftery, Strictly proper
    scoring rules, 2007, section 6.2): least where 80 % lie inside. Searched on a grid: two numbers from a few sources
    are not worth more.
    """
    groups: dict[str, list[Miss]] = {}
    for miss in misses:
        groups.setdefault(miss.group, []).append(miss)

    def score(error: ModelError) -> float:
        means = (sum(_score(error, m) for m in own) / len(own) for own in groups.values())
        return sum(means) / len(groups)

    grid = (ModelError(costs / 4, own / 100) for costs in range(5) for own in range(81))
    return min(grid, key=score)


def _score(error: ModelError, miss: Miss) -> float:
    half = error.half_width(miss.costs)
    return 2 * half + 2 / (1 - COVERED) * max(0.0, miss.off - half)
