"""HOBBIT (arXiv 2411.01433): less important experts come at low precision; gates look several layers ahead."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import Eviction, Misses, Prefetch
from moesim.prediction import NoPrediction, StackedGates
from moesim.systems.system import Quality, System

# Bits per weight with the scales of groups of 32 or 64: (as the experts come, or changed to; low-precision copies).
PAIRS = {"fp16+int4": (None, 4.5), "int8+int2": (8.5, 2.5)}


def hobbit(
    variant: str = "plain",
    pair: str = "fp16+int4",
    thresholds: tuple[float, float] = (0.6, 0.9),
    ahead: int = 3,
    accuracy: tuple[float, ...] = (0.96, 0.90, 0.90),
    low_share: float = 0.2,
    w_lru: float = 0.25,
    w_lfu: float = 0.25,
    w_lhu: float = 0.25,
    w_fld: float = 0.25,
) -> System:
    """Misses come at full precision, at low precision or not at all, by the weight of the experts ranked before them.

    variant: `cooperative` computes the absent experts of decode steps on the CPU, at full precision, and those still on
        their way where that is quicker; prompts are computed on the GPU only.
    pair: precisions of the two copies. thresholds: (T1, T2), Mixtral's. ahead: layers the gates look ahead, 0 for no
        prefetch; accuracy: of each distance, Mixtral's. low_share: of the expert memory for low-precision copies
        [not published]. w_*: the four terms of the eviction score; the paper fits them and does not publish them. Of
        all weights in quarters, equal ones take the least time per token on drawn routing (docs/papers.md).
    """
    if variant not in ("plain", "cooperative"):
        raise PolicyError(f"HOBBIT variant '{variant}' must be plain or cooperative")
    if pair not in PAIRS:
        raise PolicyError(f"HOBBIT pair '{pair}' must be one of {', '.join(PAIRS)}")
    if not 0 <= ahead <= len(accuracy):
        raise PolicyError(f"HOBBIT ahead={ahead} must lie between 0 and {len(accuracy)}, the accuracies given")
    expert_bits, low_bits = PAIRS[pair]
    plain = variant == "plain"
    score = (("recency", w_lru), ("frequency", w_lfu), ("lhu", w_lhu), ("fld", w_fld))
    return System(
        "HOBBIT" if plain else f"HOBBIT-{variant}",
        eviction=Eviction(score, scope="global", per_sequence=True),
        misses=Misses("precision", True, thresholds, low_bits, low_share)
        if plain
        else Misses("host", prompts="fetch", late_host=True),
        predictor=StackedGates(accuracy[:ahead], levels=thresholds if plain else None) if ahead else NoPrediction(),
        prefetch=Prefetch(first_missing=True, pin=True),
        expert_bits=expert_bits,
        source="arXiv 2411.01433",
        quality=Quality(
            "GSM8K 0.51 (full precision: 0.52) for Mixtral-8x7B, 0.82 (0.83) for Phi-MoE; TruthfulQA within 1 point",
            "arXiv 2411.01433",
        )
        if plain
        else None,
        notes=("HOBBIT's eviction weights and its split of the memory are not published: both are parameters",),
    )
