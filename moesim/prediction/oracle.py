"""A predictor that looks at the answer: exact, or spoilt to a stated recall and precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError
from moesim.prediction.predictor import Beliefs
from moesim.trace import Trace


@dataclass(frozen=True)
class Oracle:
    """Names the experts a token will choose, `distance` layers ahead (0: all layers when the step starts).

    The way to simulate a predictor of a stated accuracy, labelled `assumed`. recall < 1 replaces each named expert,
    independently, by one the token does not choose, so that precision equals recall. With a `precision` of its own the
    forgotten ones leave no name, and after the right ones come as many wrong ones as make it the share of right names.
    """

    recall: float = 1.0
    distance: int = 1
    wraps: bool = True
    precision: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.recall <= 1:
            raise PolicyError(f"oracle recall {self.recall} must lie between 0 and 1")
        if self.precision is not None and not (0 < self.precision <= 1 and self.recall > 0):
            raise PolicyError(f"oracle precision {self.precision} must lie above 0 and up to 1, with a recall above 0")
        if not isinstance(self.distance, int) or self.distance < 0:
            raise PolicyError(f"oracle distance {self.distance} must be at least 0 layers")

    @property
    def provenance(self) -> str:
        return "oracle" if self.recall == 1 and self.precision in (None, 1) else "assumed"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        rng = np.random.default_rng([seed, 0x0AC1E])
        named = trace.experts.copy()
        if self.precision is not None:
            self._check_room(trace)
            layers = [self._named(named[:, layer], trace.info.experts, rng) for layer in range(trace.layers)]
            named = np.stack(layers, axis=1)
        elif self.recall < 1 and trace.top_k < trace.info.experts:
            for layer in range(trace.layers):
                spoil(named[:, layer], trace.info.experts, self.recall, rng)
        return (Beliefs(named, self.distance, self.wraps),)

    def _wrong(self, top_k: int) -> float:
        """Wrong names per token that make `precision` the share of right ones."""
        assert self.precision is not None
        return self.recall * top_k * (1 / self.precision - 1)

    def _check_room(self, trace: Trace) -> None:
        wrong, others = self._wrong(trace.top_k), trace.info.experts - trace.top_k
        if wrong > others:
            raise PolicyError(
                f"oracle precision {self.precision} takes {wrong:.3g} wrong names per token, "
                f"but only {others} experts are not chosen; raise it"
            )

    def _named(self, chosen: NDArray[np.int16], experts: int, rng: np.random.Generator) -> NDArray[np.int16]:
        """Right names that are remembered, then wrong ones: [tokens, k + wrong]."""
        tokens, k = chosen.shape
        wrong = self._wrong(k)
        right = np.where(rng.random(chosen.shape) < self.recall, chosen, np.int16(-1))
        others = _others(chosen, experts, int(np.ceil(wrong)), rng)
        count = int(wrong) + (rng.random((tokens, 1)) < wrong % 1)
        return np.concatenate([right, np.where(np.arange(others.shape[1]) < count, others, np.int16(-1))], axis=1)


def spoil(named: NDArray[np.int16], experts: int, recall: float, rng: np.random.Generator) -> None:
    """Replace a share 1 - recall of `named` [tokens, k] by distinct experts the token did not choose."""
    others = _others(named, experts, named.shape[1], rng)
    wrong = (rng.random(named.shape) >= recall) & (named >= 0)
    named[wrong] = others[wrong]


def _others(chosen: NDArray[np.int16], experts: int, count: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """`count` distinct experts per token that it did not choose, in random order: [tokens, count]; -1 for want of any.

    chosen: [tokens, k].
    """
    tokens = len(chosen)
    noise = rng.random((tokens, experts))
    taken = np.zeros((tokens, experts + 1), dtype=bool)  # the last column takes unused ranks
    np.put_along_axis(taken, np.where(chosen < 0, experts, chosen).astype(np.int64), True, axis=1)
    noise[taken[:, :experts]] = 2.0  # never drawn: they sort last
    others = np.full((tokens, count), -1, dtype=np.int16)
    drawn = np.argpartition(noise, min(count, experts - 1), axis=1)[:, :count]
    enough = np.take_along_axis(noise, drawn, axis=1) < 2.0
    others[:, : drawn.shape[1]] = np.where(enough, drawn, -1)
    return others
