"""Task-Specific Expert Pruning (arXiv 2206.00277): its text was not at hand; one expert is left of 32."""

from __future__ import annotations

from dataclasses import replace

from validate.papers.claim import Claim, Fact
from validate.papers.setup import machine, metrics, plain
from validate.papers.sida import encoder

GPU, GPUS = "a100-80gb-sxm", 8
TOKENS, BATCH = 128, 256  # of all GPUs together
SERVED = encoder(32)


def _faster() -> float:
    """Experts spread over the GPUs of a node, and on each of them the dense model with its part of the sequences."""
    one = machine(GPU)
    node = replace(one, name=f"{GPUS}x{GPU}", gpus=GPUS)
    spread = ("parallel.attention=data", "parallel.experts=expert")
    together = plain(SERVED, BATCH, TOKENS, 0), plain(SERVED, BATCH // GPUS, TOKENS, 0)
    whole = metrics("all-resident", together[0], SERVED, node, spread, max_concurrency=BATCH, max_num_seqs=BATCH)
    dense = metrics("TSEP", together[1], SERVED, one, max_concurrency=BATCH // GPUS)
    return float(whole["duration_s"] / dense["duration_s"])


CLAIMS = (
    Claim(
        "TSEP",
        "inference, one expert over 32",
        2.0,
        (Fact("TSEP", "inference_speedup", "", "", "single expert", "MoE", 2.0),),
        _faster,
        main=True,
        assumed=f"encoder of Switch-base-32 on {GPUS} A100 with NVLink, experts spread over them, {BATCH} sequences of "
        f"{TOKENS} tokens",
        why=(
            "the paper's model, machines and program are not known. The abstract says that its experts are spread over "
            "devices; what they exchange, which a dense model does not need, decides: on V100 with PCIe alone 1.7 to "
            "2.0x, with NVLink this, and with one kernel after the other instead of a grouped one more"
        ),
    ),
)
