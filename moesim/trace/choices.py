"""How often tokens chose each expert, compiled: passes of thousands of tokens count millions of choices."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def count_choices(experts: Any, rows: Any, kinds: int) -> Any:
    """[layers, kinds] choices of the `rows` of `experts` [all rows, layers, k]; negative ones are none."""
    counts = np.zeros((experts.shape[1], kinds), dtype=np.int64)
    for row in rows:
        for layer in range(experts.shape[1]):
            for expert in experts[row, layer]:
                if expert >= 0:
                    counts[layer, expert] += 1
    return counts
