"""Samoyeds (arXiv 2503.10725, figures 14 and 15, table 3): one MoE layer, one decoder layer, RTX 4070 Super."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

from moesim.costs.roofline import Roofline
from moesim.costs.table import CostTable
from moesim.model import Model
from moesim.question import compose
from validate.papers.claim import Claim, Fact, mean
from validate.papers.setup import TRANSFORMERS, machine, metrics, model, plain

# The artefact's own cuBLAS sweep on that card (figure 13) ends at 78.5 TFLOPS.
BOX = machine("rtx-4070-super", efficiencies__mfu=78.5 / machine("rtx-4070-super").gpu.tflops)
TOKENS = 4096
WHY = (
    "the kernel's times are a fit to one sweep with weights in L2, where a layer's experts are not; at 16384 x 6144 "
    "it is read from memory again and again, which explains 1.5 of the factor 2.1 by which its rate falls (figure 12)"
)
WHY_SMALL = (
    "60 experts of 273 tokens: both sides fill half of the GPU at a time, which the loop's products here do not suffer "
    "from, and on the paper's host launches may cost more than those measured on an H200's"
)
# Of table 2: experts, width of model and expert; experts per token are those of the models' own files.
SHAPES = {
    "MiniCPM-MoE": (8, 2304, 5760, 2), "OpenMoE-34B": (32, 3072, 12288, 2), "Mixtral-8x7B": (8, 4096, 14336, 2),
    "Mixtral-8x22B": (8, 6144, 16384, 2), "Qwen2-MoE": (60, 2048, 1408, 4), "DeepSeek-MoE": (64, 2048, 1408, 6),
}  # fmt: skip
LAYER = {
    "MiniCPM-MoE": 1.59, "OpenMoE-34B": 1.38, "Mixtral-8x7B": 1.68, "Mixtral-8x22B": 1.08, "Qwen2-MoE": 1.49,
    "DeepSeek-MoE": 1.48,
}  # fmt: skip
DECODER = {
    "MiniCPM-MoE": 1.287, "OpenMoE-34B": 2.361, "Mixtral-8x7B": 1.444, "Mixtral-8x22B": 1.011, "Qwen2-MoE": 1.114,
    "DeepSeek-MoE": 1.304,
}  # fmt: skip
BATCH = {"OpenMoE-34B": (1, 2048), "Qwen2-MoE": (16, 4096), "DeepSeek-MoE": (16, 4096)}  # others: 1 x 4096


@cache
def one_layer(name: str) -> Model:
    """One decoder layer, attention of 128 wide heads; 4070 Super holds no more."""
    experts, hidden, ffn, top_k = SHAPES[name]
    heads = hidden // 128
    return replace(
        model("mixtral-8x7b-v0.1"), name=name, layers=1, moe_layers=(0,), hidden=hidden, experts=experts, top_k=top_k,
        expert_ffn=ffn, heads=heads, kv_heads=heads, head_dim=128, vocab=1,
    )  # fmt: skip


@cache
def layer_seconds(name: str, kernel: str) -> float:
    """The routed experts of one layer, `TOKENS` tokens spread evenly."""
    served = one_layer(name)
    bits = compose("Samoyeds").expert_bits if kernel == "samoyeds" else None
    table = CostTable(served.with_precision(expert_bits=bits), BOX, Roofline(BOX), False, kernel)
    return table.grouped_ns(served.experts, TOKENS * served.top_k) / 1e9


def _layer(name: str) -> float:
    return layer_seconds(name, "loop") / layer_seconds(name, "samoyeds")


def _decoder(name: str) -> float:
    served, (batch, length) = one_layer(name), BATCH.get(name, (1, 4096))
    trace = plain(served, batch, length, 0)
    asked = {"max_concurrency": batch, "max_batch_tokens": batch * length}
    dense = metrics("all-resident", trace, served, BOX, TRANSFORMERS, **asked)["duration_s"]
    return float(dense / metrics("Samoyeds", trace, served, BOX, ("graph=false",), **asked)["duration_s"])


def _facts(metric: str, setting: str, values: dict[str, float]) -> dict[str, Fact]:
    return {n: Fact("Samoyeds", metric, n, "RTX4070S", setting, "Transformers", v) for n, v in values.items()}


LAYER_FACTS = _facts("moe_layer_speedup", "4096 tokens, no shared experts", LAYER)
DECODER_FACTS = _facts(
    "decoder_layer_speedup", "flash-attn2; seq4096 (OpenMoE 2048) bs1 (Qwen2/DeepSeek bs16)", DECODER
)

CLAIMS = (
    Claim(
        "Samoyeds",
        "MoE layer over Transformers, mean of six models",
        mean(list(LAYER.values())),
        tuple(LAYER_FACTS.values()),
        lambda: mean([_layer(name) for name in SHAPES]),
        main=True,
        assumed="tokens spread evenly over the experts",
        why=WHY,
    ),
    *(
        Claim(
            "Samoyeds",
            f"MoE layer, {name}, over Transformers",
            fact.value,
            (fact,),
            partial(_layer, name),
            why=WHY_SMALL if name == "Qwen2-MoE" else WHY,
        )
        for name, fact in LAYER_FACTS.items()
    ),
    *(
        Claim(
            "Samoyeds",
            f"decoder layer, {name}, over Transformers",
            fact.value,
            (fact,),
            partial(_decoder, name),
            assumed="attention with as many KV heads of 128 as fit the width",
            why=WHY,
        )
        for name, fact in DECODER_FACTS.items()
    ),
)
