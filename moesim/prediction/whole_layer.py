"""An engine that knows no experts, only layers: it wants all of the next one (DeepSpeed-Inference)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.prediction.predictor import Beliefs
from moesim.trace import Trace


@dataclass(frozen=True)
class WholeLayer:
    """Every expert of the next layer, of the first one during the last layer of the step before."""

    @property
    def provenance(self) -> str:
        return "none"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        everyone = np.arange(trace.info.experts, dtype=np.int16)
        return (
            Beliefs(np.broadcast_to(everyone, (trace.tokens, trace.layers, len(everyone))), distance=1, wraps=True),
        )
