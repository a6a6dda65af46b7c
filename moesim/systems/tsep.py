"""Task-Specific Expert Pruning (arXiv 2206.00277): one expert per layer and task is left."""

from __future__ import annotations

from moesim.policies import Placement
from moesim.systems.system import Quality, System
from moesim.transforms import TaskExperts


def tsep(alpha: float = 0.5) -> System:
    """A dense model per task, all of them resident; to switch between them through a cache: LRU with transforms=TSEP.

    alpha: weight of the gate's score against the hit rate in an expert's proficiency; the paper's value is not known.
    """
    return System(
        "TSEP",
        all_resident=True,
        placement=Placement("all", pinned=True),
        transforms=(TaskExperts(alpha),),
        source="arXiv 2206.00277 (abstract and a review)",
        quality=Quality(
            "99.3 % of the MoE's gain kept over six task types, 32 experts pruned to 1", "arXiv 2206.00277"
        ),
    )
