"""A predictor that looks at the answer: exact, or spoilt to a stated recall."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import PolicyError
from moesim.prediction.predictor import Beliefs
from moesim.trace import Trace


@dataclass(frozen=True)
class Oracle:
    """Names the experts a token will choose, `distance` layers ahead (0: all layers when the step starts).

    recall < 1 replaces each named expert, independently, by one the token does not choose: the way to simulate a
    predictor of a stated accuracy, labelled `assumed`. Precision equals recall, since the number named stays k.
    """

    recall: float = 1.0
    distance: int = 1
    wraps: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1:
            raise PolicyError(f"oracle recall {self.recall} must lie between 0 and 1")
        if self.distance < 0:
            raise PolicyError(f"oracle distance {self.distance} must be at least 0 layers")

    @property
    def provenance(self) -> str:
        return "oracle" if self.recall == 1 else "assumed"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        named = trace.experts.copy()
        if self.recall < 1 and trace.top_k < trace.info.experts:
            rng = np.random.default_rng([seed, 0x0AC1E])
            for layer in range(trace.layers):
                _spoil(named[:, layer], trace.info.experts, self.recall, rng)
        return (Beliefs(named, self.distance, self.wraps),)


def _spoil(named: np.ndarray, experts: int, recall: float, rng: np.random.Generator) -> None:
    """Replace a share of `named` [tokens, k] by distinct experts the token did not choose."""
    tokens, k = named.shape
    noise = rng.random((tokens, experts))
    chosen = np.zeros((tokens, experts + 1), dtype=bool)
    np.put_along_axis(chosen, named.astype(np.int64), True, axis=1)
    noise[chosen[:, :experts]] = 2.0  # never drawn: they sort last
    others = np.argpartition(noise, min(k, experts - 1), axis=1)[:, :k]
    enough = np.take_along_axis(noise, others, axis=1) < 2.0
    wrong = (rng.random((tokens, k)) >= recall) & (named >= 0)
    named[wrong] = np.where(enough, others, -1)[wrong]
