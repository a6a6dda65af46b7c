"""KTransformers: routed experts are computed where they lie, on the CPU."""

from __future__ import annotations

from moesim.policies import HOT, Even, Misses, Placement
from moesim.systems.system import System


def ktransformers(gpu_experts: int = 0, defer: int = 0, gpu_prefill: bool = False) -> System:
    """Attention and shared experts on the GPU, routed experts on the CPU, one hand-off per layer.

    gpu_experts: so many of the most popular experts of each layer are kept on the GPU, as far as memory goes.
    defer: so many host experts of a layer may finish during the next layer's attention (expert deferral; their
        outputs are then added a layer later, which changes the result).
    gpu_prefill: prompts' experts are streamed to the GPU where that is quicker (kt-kernel's layer-wise prefill).
    """
    notes = ("deferred experts add their outputs one layer later: outputs change",) if defer else ()
    misses = Misses("host", keep=False, defer=defer, prompts="cheaper" if gpu_prefill else None)
    source = "github.com/kvcache-ai/ktransformers"
    if not gpu_experts:
        return System("KTransformers", cache=False, misses=misses, source=source, notes=notes)
    return System(
        "KTransformers",
        eviction=HOT,
        capacity=Even(most=gpu_experts),
        misses=misses,
        placement=Placement("hot", pinned=True),
        source=source,
        notes=(*notes, "placed by the popularity of the first tenth of the requests"),
    )
