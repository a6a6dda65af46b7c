"""Samoyeds (arXiv 2503.10725): experts pruned to a structure that sparse tensor cores compute on."""

from __future__ import annotations

from moesim.costs.samoyeds import stored_bits
from moesim.errors import PolicyError
from moesim.policies import Placement
from moesim.systems.system import Quality, System


def samoyeds(n: int = 1, m: int = 2, v: int = 128) -> System:
    """All experts resident at 0.29 of their bytes, computed by the paper's kernel.

    n, m, v: of every m rows of v columns n are kept, and 2 of every 4 values in those. The kernel's times were measured
    for (1, 2, 128) on one GPU; other formats change the bytes only.
    """
    if not 1 <= n <= m or v < 4:
        raise PolicyError(f"Samoyeds format ({n}, {m}, {v}): keep 1 to m of m rows, of at least 4 columns")
    return System(
        "Samoyeds",
        all_resident=True,
        placement=Placement("all", pinned=True),
        expert_bits=stored_bits(n, m, v),
        kernel="samoyeds",
        source="arXiv 2503.10725 and its released code",
        quality=Quality(
            "no MoE model's accuracy; BERT-base SQuAD F1 88.83 (dense: 89.50), GSM8K perplexity of Qwen2-1.5B 2.01 "
            "(dense: 1.92) at 75 % sparsity",
            "arXiv 2503.10725, tables 4 and 5",
        ),
        notes=(
            "kernel times are fitted to the published sweep on an RTX 4070 Super and scaled by tensor rate elsewhere",
        ),
    )
