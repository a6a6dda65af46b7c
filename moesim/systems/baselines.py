"""The plain systems every other is measured against."""

from __future__ import annotations

import math

from moesim.errors import PolicyError
from moesim.policies import BELADY, FIFO, HOT, LFU, LRU, RANDOM, Even, Eviction, Misses, Parallel, Placement, Transfer
from moesim.prediction import NoPrediction, Oracle
from moesim.systems.system import System


def all_resident() -> System:
    """Every expert in device memory: the ceiling."""
    return System("all-resident", all_resident=True, placement=Placement("all", pinned=True))


def on_demand() -> System:
    """No cache: every expert is copied, used once and forgotten."""
    return System("on-demand", cache=False, misses=Misses("fetch", keep=False))


def static() -> System:
    """The most popular experts stay for good; the others are copied when needed and forgotten."""
    return System(
        "static",
        eviction=HOT,
        placement=Placement("hot", pinned=True),
        misses=Misses("fetch", keep=False),
        notes=("placed by the popularity of the first tenth of the requests",),
    )


def _cached(name: str, eviction: Eviction, scope: str) -> System:
    return System(name, eviction=Eviction(eviction.score, scope))


def lru(scope: str = "layer") -> System:
    """Least recently used leaves."""
    return _cached("LRU", LRU, scope)


def lfu(scope: str = "layer") -> System:
    """Least often used since it came in leaves; the least recently used of equals."""
    return _cached("LFU", LFU, scope)


def fifo(scope: str = "layer") -> System:
    """First in, first out."""
    return _cached("FIFO", FIFO, scope)


def random(scope: str = "layer") -> System:
    """A random one leaves, seeded."""
    return _cached("random", RANDOM, scope)


def belady(scope: str = "layer") -> System:
    """The one needed last leaves: looks ahead, a bound while a step's experts fit the cache."""
    return _cached("Belady", BELADY, scope)


def belady_window(window: int = 16, scope: str = "layer") -> System:
    """Belady that sees `window` steps ahead: of experts not needed within them, the least recently used leaves."""
    return System("Belady-window", eviction=Eviction(BELADY.score, scope, window=window))


def eplb(redundant: int | None = None, interval: int = 0) -> System:
    """DeepSeek's expert load balancer: every expert resident, loaded ones more than once, GPUs equally loaded.

    redundant: replicas per layer beyond one of each expert; None: an eighth of the experts. interval: passes after
    which experts are placed anew; 0: once, by the loads of the first tenth of the requests.
    """
    return System(
        "EPLB",
        all_resident=True,
        placement=Placement("all", pinned=True),
        parallel=Parallel("data", "expert", "balanced", redundant, interval),
        source="github.com/deepseek-ai/EPLB",
    )


def oracle(distance: int = 1) -> System:
    """Belady's eviction, and every expert asked for `distance` layers before it is needed.

    A bound with prefetch, as long as a step's experts fit the cache."""
    return System("oracle", eviction=BELADY, predictor=Oracle(distance=distance))


def mixtral_offloading(recall: float = 0.0) -> System:
    """LRU per layer with an exclusive cache: what is evicted is copied back to the host (arXiv 2312.17238).

    recall > 0 adds the speculative prefetch of the report (next layer's gate on this layer's hidden state) with
    that stated recall; the released code lists it as to do.
    """
    return System(
        "Mixtral-Offloading",
        eviction=LRU,
        capacity=Even(equal=True),  # its code is told how many experts every layer keeps
        transfer=Transfer("expert", write_back=True),
        predictor=Oracle(recall, wraps=False) if recall else NoPrediction(),
        source="arXiv 2312.17238 and its released code",
    )


def fiddler(latency_cpu: float = 7.0, latency_gpu: float = 70.0) -> System:
    """Popular experts stay; at a miss the CPU computes or the link copies, whichever is said to be quicker
    (arXiv 2402.07033).

    latency_cpu, latency_gpu: what it takes a token's expert on the CPU and any copy to be, in one unit; the defaults
        are the released code's, by which an expert with fewer than ten tokens runs on the CPU.
    """
    if not (latency_cpu > 0 and 0 < latency_gpu / latency_cpu <= 1e9):
        raise PolicyError(f"Fiddler: latencies {latency_cpu} and {latency_gpu} must be above 0")
    return System(
        "Fiddler",
        eviction=HOT,
        placement=Placement("hot", pinned=True),
        misses=Misses("cheaper", keep=False, host_below=math.ceil(latency_gpu / latency_cpu)),
        source="arXiv 2402.07033 and its released code",
        notes=("placed by the popularity of the first tenth of the requests",),
    )
