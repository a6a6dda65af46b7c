"""HEXA-MoE (arXiv 2411.01288): every GPU has a share of every expert, and computes in place on tokens as they lie."""

from __future__ import annotations

from moesim.errors import PolicyError, nearest
from moesim.policies import Parallel, Placement
from moesim.systems.system import System

MODES = {"data": "gather", "model": "tensor", "either": "either"}


def hexa_moe(mode: str = "either", shares: tuple[float, ...] = ()) -> System:
    """All experts resident, cut along their hidden dimension; no all-to-all, so no GPU waits for popular experts.

    mode: `data`-centric gathers a layer's parameters while attention runs, and each GPU computes its own tokens;
        `model`-centric gathers tokens, and each GPU computes all of them on its share; `either` takes in every pass
        the one that moves fewer bytes, as the paper advises without a number.
    shares: of the hidden dimension by GPU; (): in proportion to the speed of each (equations 1 and 2).
    """
    if mode not in MODES:
        raise PolicyError(f"HEXA-MoE mode '{mode}'{nearest(mode, MODES)}")
    return System(
        "HEXA-MoE",
        all_resident=True,
        placement=Placement("all", pinned=True),
        parallel=Parallel("data", MODES[mode], shares=shares),
        kernel="esmm",
        source="arXiv 2411.01288 and its released code",
        notes=("the paper trains: what is served here is the forward half of its step",),
    )
