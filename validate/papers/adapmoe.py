"""AdapMoE (arXiv 2408.10284): its text was not at hand; set up as its released code is."""

from __future__ import annotations

from dataclasses import replace

from moesim.transforms import SensitivityGating
from validate.papers.claim import Claim, Fact
from validate.papers.setup import GATES, LOCALITY, MIXTRAL, local, machine, metrics, model

# The released demo: experts at 2 bits in groups of 16, the rest at 4 bits in groups of 64 (HQQ), scales of 8 bits.
QUANTISED = model(MIXTRAL).with_precision(expert_bits=2 + 16 / 16, weight_bits=4 + 16 / 64)
CACHED = 64  # experts of 256
BOX = machine("rtx-4090")
PROMPT, OUTPUT = 128, 128
ASSUMED = (
    f"RTX 4090 (a second-hand note names it), {PROMPT} prompt and {OUTPUT} output tokens, over Mixtral-Offloading, "
    f"whose code it builds on; {LOCALITY}; {GATES}"
)


def _trace():
    return local(QUANTISED, 4, PROMPT, OUTPUT)


def _tpot(policy: str) -> float:
    memory = CACHED * QUANTISED.expert_bytes()
    return float(metrics(policy, _trace(), QUANTISED, BOX, expert_memory=memory)["mean_tpot_ms"])


def single_share() -> float:
    """Share of tokens that the gating leaves one expert, at T = 0.005."""
    trace = _trace()
    served = SensitivityGating().apply(QUANTISED, trace, 0).trace
    decode = replace(trace).phase == 1
    return float((served.experts[decode][:, :, 1] < 0).mean())


CLAIMS = (
    Claim(
        "AdapMoE",
        "decoding, Mixtral-8x7B with gating, over Mixtral-Offloading",
        1.35,
        (Fact("AdapMoE", "speedup", "Mixtral", "edge GPUs (unread)", "batch1", "existing techniques", 1.35),),
        lambda: _tpot("Mixtral-Offloading") / _tpot("AdapMoE(gating=True)"),
        main=True,
        assumed=ASSUMED,
    ),
    Claim(
        "AdapMoE",
        "experts active per token, Mixtral-8x7B, T = 0.005",
        2 / (2 - 0.25867),
        (Fact("AdapMoE", "single_expert_ratio", "Mixtral-8x7B", "", "T=0.005", "", 0.25867),),
        lambda: 2 / (2 - single_share()),
        kind="operations",
        assumed=GATES,
    ),
    Claim(
        "AdapMoE",
        "experts active per token as the abstract has it",
        1 / 0.75,
        (Fact("AdapMoE", "active_experts_reduction", "Mixtral", "", "", "", 25),),
        lambda: 2 / (2 - single_share()),
        kind="operations",
        assumed=GATES,
        why=(
            "the released threshold drops 13 % of the experts by the authors' own table; the abstract's 25 % is of "
            "another"
        ),
    ),
)
