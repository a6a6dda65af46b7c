"""Gates of coming layers applied to this layer's hidden state (HOBBIT, AdapMoE): look-ahead of a stated accuracy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import PolicyError
from moesim.prediction.oracle import spoil
from moesim.prediction.predictor import Beliefs
from moesim.trace import PREFILL, Trace


@dataclass(frozen=True)
class StackedGates:
    """What the gates 1, 2, ... layers ahead will choose, right with the stated shares: traces hold no hidden states.

    accuracy     by distance: the share of named experts that are right; its length is how far the gates look
    by_layer     the same by layer of the model, for all distances, in place of `accuracy`; tables of another depth
                 are read at the same relative depth
    levels       (T1, T2) of HOBBIT: by the weights of the experts ranked before it, an expert is named at full
                 precision, at low precision (id + experts), or not at all
    decode_only  nothing is believed of prompt tokens (AdapMoE)
    """

    accuracy: tuple[float, ...] = (0.96, 0.90, 0.90)
    by_layer: tuple[float, ...] = ()
    levels: tuple[float, float] | None = None
    decode_only: bool = False

    def __post_init__(self) -> None:
        if not self.accuracy:
            raise PolicyError("stacked gates: accuracy is empty; name one share per layer of look-ahead")
        for share in (*self.accuracy, *self.by_layer):
            if not 0 <= share <= 1:
                raise PolicyError(f"stacked gates: accuracy {share} must lie between 0 and 1")

    @property
    def provenance(self) -> str:
        return "assumed"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        return tuple(self._gate(trace, distance, seed) for distance in range(1, len(self.accuracy) + 1))

    def _gate(self, trace: Trace, distance: int, seed: int) -> Beliefs:
        rng = np.random.default_rng([seed, 0x6A7E5, distance])
        named = trace.experts.copy()
        shares = np.full(trace.layers, self.accuracy[distance - 1])
        if self.by_layer:
            shares = np.interp(np.linspace(0, 1, trace.layers), np.linspace(0, 1, len(self.by_layer)), self.by_layer)
        for layer in range(trace.layers):
            spoil(named[:, layer], trace.info.experts, float(shares[layer]), rng)
        if self.levels is not None:
            before = _weight_before(trace)
            named = np.where((before > self.levels[0]) & (named >= 0), named + trace.info.experts, named)
            named[before > self.levels[1]] = -1
        if self.decode_only:
            named[trace.phase == PREFILL] = -1
        return Beliefs(named.astype(np.int16), distance)


def _weight_before(trace: Trace) -> np.ndarray:
    """Normalised gate weight of the experts ranked before each: [tokens, layers, k]; equal weights if none are kept."""
    if trace.weights is None:
        weights = np.full(trace.experts.shape, 1 / trace.top_k)
    else:
        weights = trace.weights.astype(np.float64)
    total = weights.sum(axis=2, keepdims=True)
    return (np.cumsum(weights, axis=2) - weights) / np.where(total > 0, total, 1)
