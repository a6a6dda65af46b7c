"""How many experts a synthetic power-law routing activates, and how many pairs its busiest device gets.

AIConfigurator draws one load per expert from x^-alpha between 1 and 0.8 x tokens (0.01 and 2 where pairs are fewer than
experts), scales the loads to tokens x top-k, caps each at the number of tokens, settles the sum device by device, and
measures the busiest device (its collector's documentation). Which draw a row was measured with is not recorded, so
means over draws stand for it.
"""

from __future__ import annotations

from functools import cache

import numpy as np

DRAWS = 8


@cache
def busiest(tokens: int, experts: int, top_k: int, devices: int, alpha: float) -> tuple[float, float]:
    """(experts with work, pairs) on the busiest of `devices`, each the mean over draws and at least 1."""
    rng = np.random.default_rng(0)
    total = tokens * top_k
    low, high = (1.0, max(0.8 * tokens, 1.001)) if total > experts else (0.01, 2.0)
    power = 1 - alpha
    draws = ((high**power - low**power) * rng.random((DRAWS, experts)) + low**power) ** (1 / power)
    active, pairs = [], []
    for loads in draws:
        counts = np.minimum(np.rint(loads / loads.sum() * total), tokens).astype(int).reshape(devices, -1)
        _settle(counts, total, tokens)
        rank = counts[counts.sum(axis=1).argmax()]
        active.append(max((rank > 0).sum(), 1))
        pairs.append(max(rank.sum(), 1))
    return float(np.mean(active)), float(np.mean(pairs))


def _settle(counts: np.ndarray, total: int, cap: int) -> None:
    """Make `counts` [device, expert] sum to `total`, none above `cap`: device after device gives from its most loaded
    expert or adds to its least loaded."""
    device = 0
    while missing := total - int(counts.sum()):
        rank = counts[device % len(counts)]
        share = max(1, abs(missing) // len(counts))  # in one go what would be as many rounds
        if missing > 0:
            order = np.argsort(rank, kind="stable")
            order = order[rank[order] < cap][:share]
            rank[order] += 1
        else:
            order = np.argsort(-rank, kind="stable")
            order = order[rank[order] > 0][:share]
            rank[order] -= 1
        device += 1
