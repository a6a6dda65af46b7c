"""DeepSpeed-Inference: whole layers cross the link, whatever the router says."""

from __future__ import annotations

from moesim.policies import Misses, Transfer
from moesim.prediction import WholeLayer
from moesim.systems.system import System


def deepspeed() -> System:
    """Every expert of a layer is copied for it, the next layer's while this one computes; nothing is cached."""
    return System(
        "DeepSpeed",
        cache=False,
        misses=Misses("fetch", keep=False),
        predictor=WholeLayer(),
        transfer=Transfer("layer"),
        source="DeepSpeed-Inference (arXiv 2207.00032), as fMoE, HOBBIT and eMoE describe it as their baseline",
    )
