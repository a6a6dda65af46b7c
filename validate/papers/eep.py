"""EEP (arXiv 2407.00945, tables 5 and 10): fewer experts of Mixtral-8x7B on two A100, SQuAD."""

from __future__ import annotations

from functools import cache

from validate.papers.claim import Claim, Fact
from validate.papers.setup import MIXTRAL, TRANSFORMERS, gpu_bytes, machine, metrics, model, plain

BOX = machine("a100-80gb-sxm", gpu__memory="160GiB")
GPU = "2xA100-80GB"
PROMPT, OUTPUT = 200, 50  # prompt: assumed; output: max_out_len of the released SQuAD configuration
ASSUMED = (
    "two A100 layer after layer: one with the memory of both; experts in a loop, as transformers 4.39 (released "
    f"code) runs them; SQuAD: {PROMPT} prompt and {OUTPUT} output tokens"
)
KINDS = {
    "E8 k1": "EEP(experts=8, top_k=1)",
    "E4 k2": "EEP",
    "E4 k1": "EEP(experts=4, top_k=1)",
    "E2 k2": "EEP(experts=2)",
}
WHY = "lengths of SQuAD prompts are assumed; two GPUs are one here"

# By batch: (prefill, decode) speed-ups over all experts, table 10.
TABLE10 = {
    "E8 k1": {1: (1.05, 1.34), 32: (1.58, 1.06), 256: (1.63, 1.02)},
    "E4 k2": {1: (1.47, 1.05), 32: (1.02, 1.6), 256: (1.03, 1.29)},
    "E4 k1": {1: (1.75, 1.37), 32: (1.77, 1.6), 256: (1.72, 1.33)},
    "E2 k2": {1: (2.0, 1.15), 32: (1.2, 2.43), 256: (1.03, 1.53)},
}
TABLE5 = {"E8 k1": 1.24, "E4 k2": 1.11, "E4 k1": 1.41, "E2 k2": 1.18}


@cache
def _numbers(policy: str, batch: int) -> dict[str, float]:
    served = model(MIXTRAL)
    trace = plain(served, batch, PROMPT, OUTPUT)
    return metrics(
        policy, trace, served, BOX, TRANSFORMERS, max_concurrency=batch, max_batch_tokens=batch * (PROMPT + 1)
    )


def faster(kind: str, batch: int, metric: str) -> float:
    return _numbers("all-resident", batch)[metric] / _numbers(KINDS[kind], batch)[metric]


def _smaller(kind: str) -> float:
    served = model(MIXTRAL)
    trace = plain(served, 1, 1, 1)
    return gpu_bytes("all-resident", trace, served, BOX) / gpu_bytes(KINDS[kind], trace, served, BOX)


def _phase(kind: str, batch: int, phase: str, value: float) -> Claim:
    metric = {"prefill": "mean_ttft_ms", "decode": "mean_tpot_ms"}[phase]
    return Claim(
        "EEP",
        f"{phase}, Mixtral-8x7B, {kind}, batch {batch}",
        value,
        (Fact("EEP", f"{phase}_speedup", "Mixtral-8x7B", GPU, f"{kind} bs{batch}", "full", value),),
        lambda: faster(kind, batch, metric),
        assumed=ASSUMED,
        why=WHY,
    )


def _whole(kind: str, value: float) -> Claim:
    return Claim(
        "EEP",
        f"whole requests, Mixtral-8x7B, {kind}, batch 256",
        value,
        (Fact("EEP", "speedup", "Mixtral-8x7B", GPU, f"SQuAD bs256 {kind}", "full", value),),
        lambda: faster(kind, 256, "duration_s"),
        main=kind == "E4 k1",
        assumed=ASSUMED,
        why=WHY,
    )


def _memory(kind: str, value: float) -> Claim:
    return Claim(
        "EEP",
        f"GPU memory, Mixtral-8x7B, {kind}",
        88.6 / value,
        (
            Fact("EEP", "gpu_mem", "Mixtral-8x7B", GPU, "SQuAD bs256 E8 k2", "full", 88.6),
            Fact("EEP", "gpu_mem", "Mixtral-8x7B", GPU, f"SQuAD bs256 {kind}", "full", value),
        ),
        lambda: _smaller(kind),
        kind="memory",
    )


CLAIMS = (
    *(_whole(kind, value) for kind, value in TABLE5.items()),
    _memory("E4 k2", 46.6),
    _memory("E2 k2", 25.6),
    *(
        _phase(kind, batch, phase, value)
        for kind, rows in TABLE10.items()
        for batch, values in rows.items()
        for phase, value in zip(("prefill", "decode"), values, strict=True)
    ),
)
