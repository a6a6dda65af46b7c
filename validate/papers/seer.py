"""SEER-MoE (arXiv 2404.05089): its text was not at hand; a quarter of Mixtral's experts removed."""

from __future__ import annotations

from validate.papers.claim import Claim, Fact, cut
from validate.papers.setup import MIXTRAL, gpu_bytes, machine, model, plain


def _smaller() -> float:
    served, box = model(MIXTRAL), machine("a100-80gb-sxm", gpu__memory="160GiB")
    trace = plain(served, 1, 1, 1)
    return gpu_bytes("all-resident", trace, served, box) / gpu_bytes("SEER-MoE", trace, served, box)


CLAIMS = (
    Claim(
        "SEER-MoE",
        "parameters of Mixtral-8x7B, 8 experts over 6",
        cut(27),
        (Fact("SEER-MoE", "flops_or_params_reduction", "Mixtral-8x7B", "", "25-27% as summarised", "", 27),),
        _smaller,
        kind="memory",
        main=True,
        assumed="27 % is second-hand, of parameters or operations; a quarter of the experts is 24 % of the parameters",
    ),
)
