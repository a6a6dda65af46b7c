"""AdapMoE (arXiv 2408.10284): slots dealt to layers by expected loads, one prefetch per layer, copies by matrix."""

from __future__ import annotations

from math import sqrt

from moesim.policies import ExpectedLoads, Prefetch, Transfer
from moesim.prediction import StackedGates
from moesim.systems.system import Quality, System
from moesim.transforms import SensitivityGating

# By layer of Mixtral-8x7B, from src/dp.py of the released code, to three digits: share of tokens both of whose experts
# the next gate names on this layer's hidden state, and share that the gating at T = 0.005 leaves one expert.
ACCURACY = (
    0.0, 0.566, 0.721, 0.789, 0.866, 0.859, 0.830, 0.840, 0.849, 0.801, 0.898, 0.898, 0.893, 0.910, 0.925, 0.881,
    0.915, 0.939, 0.905, 0.879, 0.876, 0.893, 0.879, 0.876, 0.888, 0.884, 0.922, 0.913, 0.886, 0.900, 0.903, 0.850,
)  # fmt: skip
SINGLE = (
    0.0, 0.0348, 0.00488, 0.00094, 0.00038, 0.00251, 0.00789, 0.0341, 0.0345, 0.0491, 0.013, 0.0196, 0.0296, 0.00549,
    0.0155, 0.0284, 0.0639, 0.071, 0.141, 0.28, 0.299, 0.365, 0.414, 0.356, 0.495, 0.521, 0.548, 0.618, 0.78, 0.884,
    0.975, 0.858,
)  # fmt: skip


def adapmoe(
    gating: bool = False, accuracy: tuple[float, ...] = ACCURACY, single: tuple[float, ...] = SINGLE, top_k: int = 2
) -> System:
    """LRU per layer with capacities by dynamic programming; while decoding, one absent expert of the next layer comes.

    gating: leave out second experts of little weight, which needs gate weights in the trace.
    accuracy: by layer, that both experts are named right; models of another depth read it at the same relative depth.
    single: by layer, the share of tokens the gating leaves one expert. top_k: experts of the other tokens.
    """
    return System(
        "AdapMoE+gating" if gating else "AdapMoE",
        capacity=ExpectedLoads(accuracy, single if gating else (0.0,), top_k),
        predictor=StackedGates((1.0,), by_layer=tuple(sqrt(a) for a in accuracy), decode_only=True),
        prefetch=Prefetch(per_layer=1),
        transfer=Transfer("matrix"),
        transforms=(SensitivityGating(),) if gating else (),
        source="released code (PKU-SEC-Lab/AdapMoE) of arXiv 2408.10284; the paper's text was not at hand",
        quality=Quality(
            "MMLU 67.68 (without gating: 67.77) at T = 0.005, Mixtral-8x7B", "PKU-SEC-Lab/AdapMoE benchmarks"
        )
        if gating
        else None,
        notes=("a wrong prefetch takes a slot of the cache; AdapMoE has a buffer of its own for it",),
    )
