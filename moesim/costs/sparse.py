"""2:4 sparse weights against dense ones: published speed-ups, and the rows from which they pay.

Sparse tensor cores double the peak rate; libraries reach a part of that at large shapes and nothing where reading the
weights is what takes the time, although half of them are gone. Both ends are published (data/sparse24.csv).
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from moesim.efficiencies import read_table
from moesim.errors import PolicyError

if TYPE_CHECKING:
    from moesim.costs.roofline import Roofline
    from moesim.model import Model

BITS = 9  # per weight of the dense 16-bit matrix: half the values, 2 bits for the position of each
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


def grouped_seconds(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """Experts kept 2:4: the dense grouped kernel, faster or slower as 2:4 is at the mean rows of an expert.

    Raises PolicyError unless the experts are stored at 9 bits per weight, which is what such a matrix takes.
    """
    if not active or not pairs:
        return 0.0
    if bits != BITS:
        raise PolicyError(
            f"kernel sparse24 needs experts of {BITS} bits per weight, not {bits:.3g}; set expert_bits={BITS}"
        )
    rows, hidden, ffn = math.ceil(pairs / active), model.hidden, model.expert_ffn
    dense = sparse = 0.0
    for count, n, k in ((model.ffn_matrices - 1, ffn, hidden), (1, hidden, ffn)):
        dense += count * costs.gemm(rows, n * k, 2.0 * n * k, depth=k)
        sparse += count * costs.sparse_gemm(rows, n, k)
    params = model.expert_params
    pair_bytes = 2.0 * (2 * hidden + 3 * ffn)
    whole = costs.grouped(active, pairs, params=params, nbytes=2.0 * params, pair_bytes=pair_bytes, bits=16)
    return whole * sparse / dense


def _speedup(row: dict[str, str]) -> float:
    return float(row["speedup"]) if row["speedup"] else float(row["dense_ms"]) / float(row["sparse_ms"])


def _mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))
