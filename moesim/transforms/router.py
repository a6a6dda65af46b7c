"""A small network in the routers' place, which knows all layers before the batch runs: SiDA-MoE (arXiv 2310.18859)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.errors import PolicyError
from moesim.prediction import Oracle
from moesim.trace import Trace
from moesim.transforms.transform import Transformed, compare, gate_order


@dataclass(frozen=True)
class ReplacedRouter:
    """Tokens go where the hash function says: its `top_k` likeliest experts, all of them executed.

    accuracy: chance that an expert of the router's own order is named at its rank; where it is not, a random other one
    takes its place. It is stated, not learned: the paper reports 0.90 to 0.99 for the right expert among the first
    three. Experts are mixed by fixed weights, 1/2, 1/4, 1/4 for three (released code). The order beyond the chosen
    ranks is by gate probability, by popularity where the trace has none.
    """

    needs: ClassVar[tuple[str, ...]] = ("gate probabilities (else popularity)",)

    top_k: int = 1
    accuracy: float = 0.95

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise PolicyError(f"hash top_k {self.top_k} must be at least 1")
        if not 0 <= self.accuracy <= 1:
            raise PolicyError(f"hash accuracy {self.accuracy} must lie between 0 and 1")

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        if self.top_k > model.experts:
            raise PolicyError(f"hash top_k {self.top_k}: {model.name} has {model.experts} experts per layer")
        info = replace(trace.info, top_k=self.top_k)
        right = replace(trace, info=info, experts=self._ranking(trace), weights=None)
        named = Oracle(self.accuracy, distance=0).predict(right, seed)[0].experts
        altered = compare(trace, named)
        total = (
            np.ones((trace.tokens, trace.layers, 1)) if trace.weights is None else trace.weights.sum(2, keepdims=True)
        )
        weights = (total * _mixture(self.top_k)).astype(np.float16)
        served = replace(right, experts=named, weights=np.where(named >= 0, weights, np.float16(0)))
        notes = (
            f"the hash function's accuracy of {self.accuracy:.0%} is stated, not learned; its mistakes change outputs",
            "its mixing weights are fixed: what counts as exact is that the expert was executed",
        )
        return Transformed(replace(model, top_k=self.top_k), served, altered, notes)

    def _ranking(self, trace: Trace) -> NDArray[np.int16]:
        """What a perfect hash would name: the chosen experts by rank, then the next best: [tokens, layers, top_k]."""
        out = np.empty((trace.tokens, trace.layers, self.top_k), dtype=np.int16)
        for layer in range(trace.layers):
            out[:, layer] = np.argsort(-gate_order(trace, layer), axis=1, kind="stable")[:, : self.top_k]
        return out


def _mixture(top_k: int) -> NDArray[np.float64]:
    """1; 1/2, 1/2; 1/2, 1/4, 1/4; halves, the last as large as the one before."""
    halves = 0.5 ** np.arange(1, top_k + 1)
    halves[-1] *= 2
    return np.asarray(halves, dtype=np.float64)
