"""Task-Specific Expert Pruning (arXiv 2206.00277): its text was not at hand; one expert is left of 32."""

from __future__ import annotations

from validate.papers.claim import Claim, Fact
from validate.papers.setup import machine, metrics, plain
from validate.papers.sida import encoder

TOKENS, BATCH = 128, 32
SERVED = encoder(32)


def _faster() -> float:
    trace = plain(SERVED, BATCH, TOKENS, 0)
    box = machine("a100-80gb-sxm")
    times = [
        metrics(policy, trace, SERVED, box, max_concurrency=BATCH)["duration_s"] for policy in ("all-resident", "TSEP")
    ]
    return times[0] / times[1]


CLAIMS = (
    Claim(
        "TSEP",
        "inference, one expert over 32",
        2.0,
        (Fact("TSEP", "inference_speedup", "", "", "single expert", "MoE", 2.0),),
        _faster,
        main=True,
        assumed=f"encoder of Switch-base-32 on one A100, {BATCH} sequences of {TOKENS} tokens",
        why=(
            "the paper's model, machines and program are not known: experts in a loop would give 3.6x, one grouped "
            "kernel this. Its 2x includes exchanges between devices, which a dense model does not need"
        ),
    ),
)
