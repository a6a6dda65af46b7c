"""SEER-MoE (arXiv 2404.05089): heavy hitters stay, then the router is tuned to use fewer of them."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import Placement
from moesim.systems.system import Quality, System
from moesim.transforms import Prune


def seer(experts: int = 6, by: str = "soft", top_k: int | None = None) -> System:
    """The most used experts of every layer stay, all resident; top_k < 2 is what its second stage tunes for.

    experts: left per layer, 6 of 8 in the paper's 25 % sparsity. by: `count` of uses, or `soft`, the gate weight
    gathered. Pruning is per layer.
    """
    if by not in ("count", "soft"):
        raise PolicyError(f"SEER-MoE by '{by}' must be count or soft")
    return System(
        "SEER-MoE",
        all_resident=True,
        placement=Placement("all", pinned=True),
        transforms=(Prune(experts, top_k, by),),
        source="arXiv 2404.05089 (abstract; scores as EEP, arXiv 2407.00945, describes them)",
        quality=Quality(
            "MMLU 56.7 with 25 % of the experts removed (67.9 with all), Mixtral-8x7B", "as quoted by STUN"
        ),
        notes=("fine-tuning of the paper's second stage is not part of the routing here",),
    )
