"""Efficient Expert Pruning (arXiv 2407.00945): a smaller model per task, found by evolution."""

from __future__ import annotations

from moesim.policies import Placement
from moesim.systems.system import Quality, System
from moesim.transforms import Merge, Prune, Transform

# (experts left, merged): mean of ten tasks, Mixtral-8x7B-Instruct, two experts per token; 62.4 with all 8.
QUALITY = {(4, False): 70.3, (4, True): 74.2, (2, False): 59.7, (2, True): 65.6}


def eep(
    experts: int = 4,
    top_k: int | None = None,
    merge: bool = False,
    by: str = "count",
    keep: tuple[tuple[int, ...], ...] = (),
) -> System:
    """Fewer experts per layer, all resident; the rest pruned (phase 1) or averaged into them (phase 2).

    experts, top_k: left per layer, used per token. merge: phase 2. keep: the survivors the search found, one list per
    layer; without them the most used ones on the calibration requests stay (by: count or soft).
    """
    pruned = Prune(experts, top_k, by, keep)
    transform: Transform = Merge(pruned) if merge else pruned
    notes: tuple[str, ...] = (
        () if keep else ("who survives is searched for accuracy in the paper; here it goes by use",)
    )
    quality = None
    if top_k in (None, 2) and (experts, merge) in QUALITY:
        reported = (
            f"{QUALITY[experts, merge]} (all experts: 62.4), mean of 10 tasks, each fitted, Mixtral-8x7B-Instruct, "
            f"{experts} of 8 experts, survivors found by search"
        )
        quality = Quality(reported, "arXiv 2407.00945")
    return System(
        "EEP",
        all_resident=True,
        placement=Placement("all", pinned=True),
        transforms=(transform,),
        source="arXiv 2407.00945",
        quality=quality,
        notes=notes,
    )
