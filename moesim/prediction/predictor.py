"""What a system believes about coming experts, as arrays computed once from the trace's past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.trace import Trace


@dataclass(frozen=True, eq=False)
class Beliefs:
    """Row t, layer l of `experts` is what was believed of token t at layer l, likeliest first, -1 for nothing.

    experts   int16 [tokens, layers, candidates]; an id of `experts + e` names the low-precision copy of expert e
    distance  layers between the router whose decision triggers the belief and the layer it is about;
              0: known for all layers when the step starts
    wraps     the first `distance` layers of a token are predicted during the token before it (same request)
    map       float16 [tokens, layers, experts] or None: probabilities that eviction may go by
    """

    experts: NDArray[np.int16]
    distance: int
    wraps: bool = False
    map: NDArray[np.float16] | None = None


class Predictor(Protocol):
    """Pure: the same trace and seed give the same beliefs; only `Oracle` may look ahead."""

    @property
    def provenance(self) -> str:  # none | learned | assumed | oracle
        ...

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        """One set of beliefs per moment of knowing, nearest layer first."""
        ...


@dataclass(frozen=True)
class NoPrediction:
    """Nothing is known before the router speaks."""

    @property
    def provenance(self) -> str:
        return "none"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        return ()
