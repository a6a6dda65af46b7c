"""2:4 sparse weights against dense ones: published speed-ups, and the rows from which they pay.

Sparse tensor cores double the peak rate; libraries reach a part of that at large shapes and nothing where reading the
weights is what takes the time, although half of them are gone. Both ends are published (data/sparse24.csv).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from moesim.efficiencies import read_table

if TYPE_CHECKING:
    from moesim.costs.roofline import Roofline

SOURCE = "imported: published 2:4 speed-ups, data/sparse24.csv"
_ALIKE = {"8.9": "8.6"}  # Ada's consumer cards are taken as Ampere's


@cache
def compute_gain(sm: str) -> float:
    """Speed-up of large products on GPUs of compute capability `sm`.

    For GPUs nobody published, the geometric mean over the generations that were measured.
    """
    by_sm: dict[str, list[float]] = {}
    for row in read_table("sparse24"):
        if row["sm"]:
            by_sm.setdefault(row["sm"], []).append(_speedup(row))
    known = by_sm.get(_ALIKE.get(sm, sm)) or [_mean(gains) for gains in by_sm.values()]
    return _mean(known)


@cache
def memory_gain() -> float:
    """Speed-up of a product of few rows, where reading the weights takes the time."""
    return next(_speedup(row) for row in read_table("sparse24") if not row["sm"])


def speedups(costs: Roofline, n: int, k: int) -> list[tuple[int, float]]:
    """(Rows, dense over sparse seconds) of an n x k matrix for rows in powers of two up to 16384."""
    found = []
    for rows in (1 << i for i in range(15)):
        dense = costs.gemm(rows, n * k, 2.0 * n * k, depth=k)
        found.append((rows, dense / costs.sparse_gemm(rows, n, k)))
    return found


def break_even(points: list[tuple[int, float]]) -> int | None:
    """Fewest rows from which sparse weights stay faster; None where they are not even at the most rows."""
    fewest = None
    for rows, gain in reversed(points):
        if gain <= 1:
            break
        fewest = rows
    return fewest


def _speedup(row: dict[str, str]) -> float:
    return float(row["speedup"]) if row["speedup"] else float(row["dense_ms"]) / float(row["sparse_ms"])


def _mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))
