"""MoE-Infinity (arXiv 2401.14361): prefetch by the activation counts of the most similar earlier request."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import Eviction, Prefetch
from moesim.prediction import RequestCounts
from moesim.systems.system import System

EVICTIONS = {"lfu": ("lfu", 1.0), "code": ("count", -1.0)}


def moe_infinity(eviction: str = "lfu", store: int = 1000, match_ns: int = 0) -> System:
    """Prefetches for all later layers what a similar request chose most, nearer layers first; one cache for all layers.

    eviction: `lfu`, the least often used since it came in leaves, as papers describe it; `code`, the most often used
        ever leaves first, as the released snapshot sorts its counts.
    store: requests remembered. match_ns: time of a match, which the step waits for.
    """
    if eviction not in EVICTIONS:
        raise PolicyError(f"MoE-Infinity eviction '{eviction}' must be lfu or code")
    return System(
        "MoE-Infinity" if eviction == "lfu" else f"MoE-Infinity-{eviction}",
        eviction=Eviction((EVICTIONS[eviction],), scope="global"),
        predictor=RequestCounts(store),
        prefetch=Prefetch(pin=True, latency_ns=match_ns, blocking=match_ns > 0, order="linear"),
        source="arXiv 2401.14361 and its released code",
        notes=("MoE-Infinity matches requests once per step, its code once per layer",),
    )
