"""ExpertFlow (arXiv 2410.17954): the routing path of a token is predicted for all layers before its step."""

from __future__ import annotations

from moesim.policies import LRU, Eviction, Prefetch
from moesim.prediction import Oracle
from moesim.systems.system import System


def expertflow(accuracy: float = 0.95, predict_ns: int = 0) -> System:
    """All layers' experts are predicted when a step starts and stay until their layer is over; the others leave first.

    accuracy: of the path predictor, up to 0.95 within its domain, 0.05 to 0.10 less across domains.
    predict_ns: time of the predictor (7.21 MB), which the step waits for.
    """
    return System(
        "ExpertFlow",
        eviction=Eviction(LRU.score, scope="global"),
        predictor=Oracle(accuracy, distance=0, wraps=False),
        prefetch=Prefetch(pin=True, latency_ns=predict_ns, blocking=predict_ns > 0),
        source="arXiv 2410.17954",
        notes=("ExpertFlow's regrouping of tokens with similar paths into micro-batches is not modelled",),
    )
