"""eMoE (arXiv 2503.06823): plan the resident experts every few prompts, and route around the absent ones."""

from __future__ import annotations

from dataclasses import replace

from moesim.errors import PolicyError
from moesim.policies import PLAN, GreedySLO, Misses, Placement, Refresh
from moesim.systems.system import Quality, System


def emoe(
    variant: str = "A",
    period: int = 40,
    cold_start: str = "hot",
    insensitive: tuple[str, ...] = ("CLSFY", "COMP"),
    expected_output: int = 128,
) -> System:
    """Task-aware serving by its paper, sections 4 and 5.

    variant: A predicts all layers at once, L one layer after the other (the same plan, `layers` times the predictor's
        time), E is A for every prompt.
    period: prompts between two plans (p of the paper; perplexity is flat up to 40).
    cold_start: what prompt 0 finds. The paper loads all experts; a memory budget holds the `hot` ones of them.
    insensitive: tasks whose output survives random routing (measured in section 3), so their routing does not count.
    """
    variants = {"A": period, "L": period, "E": 1}
    if variant not in variants:
        raise PolicyError(f"eMoE variant '{variant}' must be A (all layers), L (layer by layer) or E (every prompt)")
    refresh = Refresh(period=variants[variant], insensitive=insensitive, expected_output=expected_output)
    if variant == "L":
        refresh = replace(refresh, per_layer=True)
    return System(
        "eMoE" if variant == "A" else f"eMoE-{variant}",
        eviction=PLAN,
        misses=Misses("reroute"),
        placement=Placement(cold_start),
        refresh=refresh,
        scheduling=GreedySLO(),
        source="arXiv 2503.06823",
        quality=Quality(
            "98.2 to 98.8 % of the full model's accuracy with 60 % of the experts resident, 99.6 to 99.7 % with 80 % "
            "(OpenMoE, Mixtral-8x7B)",
            "arXiv 2503.06823, section 5.4",
        ),
        notes=("a trace of the last prompt stands in for the paper's predictor network, which is not published",),
    )
