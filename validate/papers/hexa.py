"""HEXA-MoE (arXiv 2411.01288, section 4.2): shares of two unequal GPUs, in closed form.

The engine drives one device, so nothing is simulated. The paper trains Swin-MoE; its proxy latencies are what each GPU
takes for the same work, alone.
"""

from __future__ import annotations

from validate.papers.claim import Claim, Fact, cut

# Proxy latencies in seconds of (TITAN RTX, RTX 2080 Ti), table 2, by the powers they were held to.
CASES = {
    "case1": (("case1 100W", 4.58), ("case1 300W", 3.06)),
    "case2": (("case2 300W", 3.2), ("case2 300W", 3.18)),
    "case3": (("case3 300W", 3.28), ("case3 100W", 9.42)),
}
WHY = (
    "training: only what the shares divide is modelled; loading data, exchanging gradients and the optimiser are "
    "not, and about half of the step seems to be those"
)


def shares(times: tuple[float, ...]) -> tuple[float, ...]:
    """Work in proportion to speed (equations 1 and 2)."""
    speed = [1 / t for t in times]
    return tuple(s / sum(speed) for s in speed)


def gain(case: str) -> float:
    """An even split over the best one: the slowest device's share times what it takes."""
    times = tuple(t for _, t in CASES[case])
    best = max(share * t for share, t in zip(shares(times), times, strict=True))
    return max(times) / len(times) / best


def _claim(case: str, mode: str, percent: float) -> Claim:
    setting = f"{mode} {case} 4 experts top2"
    devices = ("TITAN RTX", "RTX2080Ti")
    proxies = (
        Fact("HEXA-MoE", "proxy_latency", "", gpu, label, "", t)
        for gpu, (label, t) in zip(devices, CASES[case], strict=True)
    )
    fact = Fact(
        "HEXA-MoE", "hetero_latency_reduction", "Swin-MoE-Small", "TITAN RTX + RTX2080Ti", setting, "uniform split",
        percent,
    )  # fmt: skip
    return Claim(
        "HEXA-MoE",
        f"{mode}, unequal GPUs, {case}: shares by speed over even ones",
        cut(percent),
        (fact, *proxies),
        lambda: gain(case),
        main=(case, mode) == ("case3", "data-centric"),
        assumed="closed form, all of the step divided; the engine drives one device",
        why=WHY,
    )


CLAIMS = (
    _claim("case3", "data-centric", 25.3),
    _claim("case1", "data-centric", 13.2),
    _claim("case3", "model-centric", 11.9),
    _claim("case1", "model-centric", 6.3),
    Claim(
        "HEXA-MoE",
        "training of Swin-MoE over Tutel and MegaBlocks, four RTX 4090",
        4.3,
        (Fact("HEXA-MoE", "train_speedup_max", "Swin-MoE S/B", "4xRTX4090", "4 experts", "Tutel/MegaBlocks", 4.3),),
        None,
        why="training, on several devices with exchanges between them",
    ),
)
