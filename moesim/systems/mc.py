"""Mixture Compressor (arXiv 2410.06270): experts at 1 to 3 bits by importance, and no second expert for easy tokens."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import Placement
from moesim.systems.system import Quality, System
from moesim.transforms import DynamicPruning, MixedBits, Transform

# Bits as reported, scales included, and before scales: 12 to 20 bits per 8 experts (README of the released code).
BITS = {1.57: 1.5, 1.69: 1.625, 1.81: 1.75, 1.94: 1.875, 2.05: 2.0, 2.2: 2.125, 2.3: 2.25, 2.42: 2.375, 2.54: 2.5}
QUALITY = {
    1.57: 54.49, 1.69: 56.17, 1.81: 59.06, 1.94: 60.35, 2.05: 63.25, 2.2: 63.29, 2.3: 64.91, 2.42: 65.71, 2.54: 67.50,
}  # fmt: skip
QUALITY_WITH_ODP = {1.57: 53.77, 2.05: 62.68, 2.54: 66.94}


def mc(bits: float = 2.54, odp: bool = False, protected: float = 0.02, layers: float = 20 / 32) -> System:
    """All experts resident at a few bits each: PMQ by integer program, with ODP also fewer experts per token.

    bits: mean of an expert's weights as the paper reports it, one of its nine. odp: drop second experts, which needs
    gate weights in the trace. protected, layers: ODP's shares of prompt tokens and of layers.
    """
    if bits not in BITS:
        raise PolicyError(f"MC bits {bits} must be one of the paper's: {', '.join(map(str, BITS))}")
    transforms: tuple[Transform, ...] = (MixedBits(BITS[bits]),)
    if odp:
        transforms += (DynamicPruning(protected, layers),)
    known = (QUALITY_WITH_ODP if odp else QUALITY).get(bits)
    reported = f"{known} (16 bits: 71.29), mean of 8 tasks, Mixtral-8x7B at {bits} bits"
    return System(
        "MC+ODP" if odp else "MC",
        all_resident=True,
        placement=Placement("all", pinned=True),
        transforms=transforms,
        source="arXiv 2410.06270 and its released code",
        quality=Quality(reported, "arXiv 2410.06270") if known else None,
    )
