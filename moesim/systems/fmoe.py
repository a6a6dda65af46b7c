"""fMoE / FineMoE (arXiv 2502.05370): prefetch and evict by the gate maps of similar earlier iterations."""

from __future__ import annotations

from moesim.policies import Eviction, Prefetch
from moesim.prediction import ExpertMaps
from moesim.systems.system import System


def fmoe(distance: int = 3, store: int = 1000, offline: bool = False, search_ns: int = 0) -> System:
    """Prefetches what followed in similar gate maps, more of it the less alike they are; evicts the lowest p x uses.

    distance: layers between a search and what it is for (the paper's d): 3 for Mixtral-8x7B, 6 for Qwen1.5-MoE, 4 for
        Phi-3.5-MoE.
    store, offline: see `ExpertMaps`. search_ns: time of a search, which runs beside the step.
    """
    return System(
        "fMoE",
        eviction=Eviction((("prob", 1.0), ("lfu", 1.0)), scope="global", combine="product"),
        predictor=ExpertMaps(distance, store, offline),
        prefetch=Prefetch(pin=True, latency_ns=search_ns, order="inverse"),
        source="arXiv 2502.05370 v2, sections 4.2 to 4.5, and its released code",
    )
