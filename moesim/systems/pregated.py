"""Pre-gated MoE (arXiv 2308.12066): every layer's experts are chosen one layer early, by a retrained router."""

from __future__ import annotations

from moesim.policies import Misses
from moesim.prediction import Oracle
from moesim.systems.system import System


def pregated() -> System:
    """The next layer's experts, known exactly, are copied while this layer computes; nothing is cached."""
    return System(
        "Pre-gated",
        cache=False,
        misses=Misses("fetch", keep=False),
        predictor=Oracle(distance=1, wraps=False),
        source="arXiv 2308.12066",
        notes=("Pre-gated MoE retrains the routers: the trace's routing stands for the retrained model's",),
    )
