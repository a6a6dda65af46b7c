"""Mixture Compressor (arXiv 2410.06270, tables 4 and 13): Mixtral at 2.54 bits on one A100 beside 16 bits on two."""

from __future__ import annotations

from moesim.model import load_model
from validate.papers.claim import Claim, Fact
from validate.papers.setup import MIXTRAL, TRANSFORMERS, gpu_bytes, machine, metrics, model, plain

ONE = machine("a100-80gb-sxm")
SEVERAL = {2: machine("a100-80gb-sxm", gpu__memory="160GiB"), 4: machine("a100-80gb-sxm", gpu__memory="320GiB")}
POOLED = (
    "several A100 one after the other, layer by layer: one with the memory of all; experts in a loop, as "
    "transformers (released code) runs them"
)
OUTPUT = 32
BIG = "mixtral-8x22b-v0.1"
GPUS = {MIXTRAL: 2, BIG: 4}
WHY_TIME = (
    "launching a layer takes 0.74 ms in the catalogue (eager_us, measured elsewhere), more than the 0.47 ms in "
    "which the paper's layers run; launches and kernels overlap there and add up here"
)


def _tpot(policy: str, name: str, batch: int, prompt: int) -> float:
    served = load_model(name)
    box = SEVERAL[GPUS[name]] if policy == "all-resident" else ONE
    trace = plain(served, batch, prompt, OUTPUT)
    return float(metrics(policy, trace, served, box, TRANSFORMERS, max_concurrency=batch)["mean_tpot_ms"])


def speedup(policy: str, batch: int = 1, prompt: int = 512, name: str = MIXTRAL) -> float:
    return _tpot("all-resident", name, batch, prompt) / _tpot(policy, name, batch, prompt)


def _smaller(name: str) -> float:
    """All weights, at 16 bits over compressed."""
    served = model(name)
    trace = plain(served, 1, 1, 1)
    whole, packed = (gpu_bytes(policy, trace, served, SEVERAL[4]) for policy in ("all-resident", "MC"))
    return whole / packed


def _table13(batch: int, prompt: int, dense: float, packed: float) -> Claim:
    label = f"[{batch},{prompt}]"
    return Claim(
        "MC",
        f"decoding, Mixtral-8x7B at 2.54 bits, batch {batch}, prompt {prompt}",
        dense / packed,
        (
            Fact("fp16", "latency_per_token", "Mixtral-8x7B", "2xA100-80GB", label, "", dense),
            Fact("MC", "latency_per_token", "Mixtral-8x7B", "1xA100-80GB", f"{label} 2.54 bit", "fp16 2xA100", packed),
        ),
        lambda: speedup("MC", batch, prompt),
        assumed=f"{POOLED}; {OUTPUT} output tokens",
        why=WHY_TIME,
    )


def _table4(policy: str, setting: str, value: float, label: str = "Mixtral-8x7B", name: str = MIXTRAL) -> Claim:
    return Claim(
        "MC",
        f"decoding, {label}, {setting}, over 16 bits",
        value,
        (Fact("MC", "speedup", label, "1xA100-80GB", setting, "fp16", value),),
        lambda: speedup(policy, name=name),
        assumed=f"{POOLED}; prompt 512, {OUTPUT} output tokens; gate weights as published for Mixtral",
        why=WHY_TIME,
    )


CLAIMS = (
    Claim(
        "MC",
        "weights of Mixtral-8x7B, 16 bits over 2.54",
        96.8 / 16.24,
        (
            Fact("MC", "params_size", "Mixtral-8x7B", "2xA100-80 (8x7B) / 4x (8x22B)", "- 16.00 bit", "fp16", 96.8),
            Fact("MC", "params_size", "Mixtral-8x7B", "1xA100-80GB", "PMQ 2.54 bit", "fp16", 16.24),
        ),
        lambda: _smaller(MIXTRAL),
        kind="memory",
        main=True,
    ),
    Claim(
        "MC",
        "weights of Mixtral-8x22B, 16 bits over 2.54",
        281.24 / 46.58,
        (
            Fact("MC", "params_size", "Mixtral-8x22B", "2xA100-80 (8x7B) / 4x (8x22B)", "- 16.00 bit", "fp16", 281.24),
            Fact("MC", "params_size", "Mixtral-8x22B", "1xA100-80GB", "PMQ 2.54 bit", "fp16", 46.58),
        ),
        lambda: _smaller(BIG),
        kind="memory",
    ),
    _table4("MC", "PMQ 2.54 bit", 1.63),
    _table4("MC(bits=2.05)", "PMQ 2.05 bit", 1.67),
    _table4("MC(bits=1.57)", "PMQ 1.57 bit", 1.82),
    _table4("MC(odp=True)", "PMQ+ODP 2.54 bit", 1.71),
    _table4("MC", "PMQ 2.54 bit", 1.77, "Mixtral-8x22B", BIG),
    _table13(1, 512, 0.029, 0.015),
    _table13(1, 4096, 0.057, 0.025),
    _table13(8, 2048, 0.009, 0.004),
    _table13(16, 2048, 0.007, 0.004),
)
