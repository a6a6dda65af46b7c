"""Routing frequencies of earlier requests, per task: what a plan for the next ones is made from (eMoE)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.trace import Trace


class History:
    """The last prompt of each task, request by request in the order they were admitted.

    eMoE's network reads the expert sequence of the previous prompt; its weights are not published, so the plain
    estimate below stands in for it: the share of each expert in that prompt. Tasks not seen yet use the latest
    prompt of any task.
    """

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._last: dict[str, NDArray[np.float64]] = {}
        self._latest: NDArray[np.float64] | None = None

    def observe(self, task: str, rows: NDArray[np.int64]) -> None:
        """Remember a request that has been admitted; `rows` are its prompt's (its decode rows if it has none)."""
        counts = self._trace.popularity(rows).astype(np.float64)
        self._latest = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        self._last[task] = self._latest

    def plan(self, load: Sequence[tuple[str, float]]) -> NDArray[np.float64] | None:
        """Eq. 2 summed over tasks, [layers, experts]: N_i = tokens of the task x frequency of expert i.

        load: (task, sum of W_j + T x W_o) for each sensitive task in service. None before any request was seen.
        """
        if self._latest is None:
            return None
        total = np.zeros_like(self._latest)
        for task, tokens in load:
            total += tokens * self._last.get(task, self._latest)
        return total
