"""Next-layer experts from how often they followed the experts of the layer before, learned from earlier tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError
from moesim.prediction.predictor import Beliefs
from moesim.trace import Trace


@dataclass(frozen=True)
class Transitions:
    """Counts of (expert at layer l, expert at layer l + 1), updated every `block` tokens of the trace.

    A token is predicted from the counts of earlier blocks only, so no belief depends on its own or later routing.
    top: how many experts to name; None names as many as the router picks.
    """

    top: int | None = None
    block: int = 256

    def __post_init__(self) -> None:
        if self.block < 1 or (self.top is not None and self.top < 1):
            raise PolicyError(f"transitions: block {self.block} and top {self.top} must be at least 1")

    @property
    def provenance(self) -> str:
        return "learned"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        top = min(self.top or trace.top_k, trace.info.experts)
        out = np.full((trace.tokens, trace.layers, top), -1, dtype=np.int16)
        for layer in range(trace.layers):
            source, target = _pair(trace, layer)
            self._learn_and_name(source, target, trace.info.experts, out[:, layer])
        return (Beliefs(out, distance=1, wraps=True),)

    def _learn_and_name(
        self, source: NDArray[np.int16], target: NDArray[np.int16], experts: int, out: NDArray[np.int16]
    ) -> None:
        """Fill `out` [tokens, top] block by block; `source` rows are all -1 where nothing precedes."""
        counts = np.zeros((experts + 1, experts), dtype=np.float64)  # last row: the -1 of an unused rank
        for start in range(0, len(source), self.block):
            rows = slice(start, start + self.block)
            scores = counts[source[rows]].sum(axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, : out.shape[1]]
            known = np.take_along_axis(scores, best, axis=1) > 0
            out[rows] = np.where(known, best, -1)
            pairs = np.broadcast_arrays(source[rows][:, :, None], target[rows][:, None, :])
            before, after = pairs[0].ravel(), pairs[1].ravel()
            real = (before >= 0) & (after >= 0)
            flat = np.bincount(before[real].astype(np.int64) * experts + after[real], minlength=experts * experts)
            counts[:experts] += flat.reshape(experts, experts)


def _pair(trace: Trace, layer: int) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
    """(what precedes, what follows) for a layer: the layer before, or the last layer of the token before."""
    target = trace.experts[:, layer]
    if layer:
        return trace.experts[:, layer - 1], target
    source = np.full_like(target, -1)
    same = np.flatnonzero(trace.request[1:] == trace.request[:-1]) + 1
    source[same] = trace.experts[same - 1, -1]
    return source, target
