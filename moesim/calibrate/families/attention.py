"""Attention over a cache: grouped-query (GQA) and latent (MLA), prefill and decode."""

from __future__ import annotations

from itertools import product
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.timing import Timer, Timing, Work, measure

_CUDA_HEADS = ((32, 8, 128), (32, 4, 128), (64, 8, 64))  # Mixtral; Qwen3-30B; gpt-oss
_CPU_HEADS = ((16, 4, 64), (32, 8, 128))
# DeepSeek-V2/V3: the latent that is cached, and the parts of a head
_LATENT, _ROPE, _NOPE, _VALUE = 512, 64, 128, 128


def prefill_points(device: Device, budget_s: float) -> list[Point]:
    """New tokens after nothing and after a past, one prompt and several."""
    on_gpu = device.kind == "cuda"
    lengths = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    found: list[Point] = []
    for (heads, kv_heads, head_dim), tokens, past, batch in product(
        _CUDA_HEADS if on_gpu else _CPU_HEADS, lengths, (0, 512, 2048, 8192), (1, 4)
    ):
        flops = 4 * batch * heads * head_dim * tokens * (past + tokens)
        nbytes = 4 * batch * (2 * tokens * heads + 2 * (past + tokens) * kv_heads) * head_dim
        masked = batch * heads * tokens * (past + tokens) * 4 if past else 0  # some kernels store the scores
        if device.affords(budget_s, flops, nbytes + (0 if on_gpu else masked)):
            found.append(
                {"batch": batch, "tokens": tokens, "past": past, "heads": heads, "kv_heads": kv_heads,
                 "head_dim": head_dim, "dtype": _dtype(device), "kernel": "sdpa"}
            )  # fmt: skip
    return found


def measure_prefill(point: Point, device: Device, timer: Timer) -> Timing:
    """Causal attention of the new tokens to the past and to one another."""
    import torch

    batch, tokens, past, heads, kv_heads, width = number(
        point, "batch", "tokens", "past", "heads", "kv_heads", "head_dim"
    )
    dtype, attend = str(point["dtype"]), torch.nn.functional.scaled_dot_product_attention
    mask = _lower_right(device, dtype, tokens, past) if past else None

    def run(q: Any, k: Any, v: Any) -> Any:
        return attend(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    def fresh() -> tuple[Any, ...]:
        q = device.take(dtype, batch, heads, tokens, width)
        return q, *(device.take(dtype, batch, kv_heads, past + tokens, width) for _ in range(2))

    return measure(Work(run, fresh), timer)


def _lower_right(device: Device, dtype: str, tokens: int, past: int) -> Any:
    """Each new token sees the past and the new ones up to itself."""
    import torch

    if device.kind == "cuda":  # the fused kernels know this shape by its type and never store it
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(tokens, past + tokens)
    return torch.ones(tokens, past + tokens, dtype=torch.bool, device=device.where).tril(past)


def decode_points(device: Device, budget_s: float) -> list[Point]:
    """One new token per sequence, over batch and context."""
    on_gpu = device.kind == "cuda"
    contexts = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    found: list[Point] = []
    for (heads, kv_heads, head_dim), context, batch in product(
        _CUDA_HEADS if on_gpu else _CPU_HEADS, contexts, (1, 2, 4, 8, 16, 32, 64, 128)
    ):
        nbytes = 2 * batch * context * kv_heads * head_dim * (2 if on_gpu else 4)
        if device.affords(budget_s, 4 * batch * heads * context * head_dim, nbytes):
            found.append(
                {"batch": batch, "context": context, "heads": heads, "kv_heads": kv_heads,
                 "head_dim": head_dim, "dtype": _dtype(device), "kernel": "sdpa"}
            )  # fmt: skip
    return found


def measure_decode(point: Point, device: Device, timer: Timer) -> Timing:
    """The query heads that share keys and values stand as rows of one query: nothing is read twice."""
    import torch

    batch, context, heads, kv_heads, width = number(point, "batch", "context", "heads", "kv_heads", "head_dim")
    dtype, attend = str(point["dtype"]), torch.nn.functional.scaled_dot_product_attention
    q = device.take(dtype, batch, kv_heads, heads // kv_heads, width)

    def fresh() -> tuple[Any, ...]:
        return q, *(device.take(dtype, batch, kv_heads, context, width) for _ in range(2))

    return measure(Work(attend, fresh), timer)


def mla_prefill_points(device: Device, budget_s: float) -> list[Point]:
    """Keys and values expanded from the latent."""
    head_counts = (16, 128) if device.kind == "cuda" else (16,)
    found: list[Point] = []
    for heads, tokens, batch in product(head_counts, (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192), (1, 2, 4)):
        flops = 2 * batch * heads * tokens * tokens * (_NOPE + _ROPE + _VALUE)
        if device.affords(budget_s, flops, 16 * batch * tokens * heads * (_NOPE + _ROPE)):
            found.append({"batch": batch, "tokens": tokens, "heads": heads, "dtype": _dtype(device), "kernel": "sdpa"})
    return found


def measure_mla_prefill(point: Point, device: Device, timer: Timer) -> Timing:
    """Values are padded to the width of keys, as engines do for kernels that know one head width."""
    import torch

    batch, tokens, heads = number(point, "batch", "tokens", "heads")
    dtype, attend = str(point["dtype"]), torch.nn.functional.scaled_dot_product_attention

    def fresh() -> tuple[Any, ...]:
        return tuple(device.take(dtype, batch, heads, tokens, _NOPE + _ROPE) for _ in range(3))

    return measure(Work(lambda q, k, v: attend(q, k, v, is_causal=True)[..., :_VALUE], fresh), timer)


def mla_decode_points(device: Device, budget_s: float) -> list[Point]:
    """Absorbed projections: queries meet the latent itself."""
    head_counts = (16, 128) if device.kind == "cuda" else (16,)
    contexts = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    found: list[Point] = []
    for heads, context, batch in product(head_counts, contexts, (1, 2, 4, 8, 16, 32, 64)):
        flops = 2 * batch * heads * context * (2 * _LATENT + _ROPE)
        if device.affords(budget_s, flops, 4 * batch * context * (_LATENT + _ROPE + heads)):
            found.append(
                {"batch": batch, "context": context, "heads": heads, "dtype": _dtype(device), "kernel": "absorbed"}
            )
    return found


def measure_mla_decode(point: Point, device: Device, timer: Timer) -> Timing:
    """Scores over latent and position part, weighted sum over the latent: two products and a softmax."""
    batch, context, heads = number(point, "batch", "context", "heads")
    dtype, width = str(point["dtype"]), _LATENT + _ROPE
    q = device.take(dtype, batch, heads, width)

    def run(cache: Any) -> Any:
        scores = (q @ cache.transpose(1, 2)) * width**-0.5
        return scores.softmax(-1) @ cache[..., :_LATENT]

    return measure(Work(run, lambda: (device.take(dtype, batch, context, width),)), timer)


def runnable(device: Device, point: Point) -> str | None:
    """On GPUs attention is measured in bf16 only."""
    if device.kind == "cuda" and device.capability < (8, 0):
        return f"bf16 needs sm_80 or later; {device.name} is sm_{device.capability[0]}{device.capability[1]}"
    return None


def _dtype(device: Device) -> str:
    return "bf16" if device.kind == "cuda" else "fp32"


PREFILL = Family("attention_prefill", "attention", prefill_points, measure_prefill, runnable, share=1.5)
DECODE = Family("attention_decode", "attention", decode_points, measure_decode, runnable, share=1.5)
MLA_PREFILL = Family("mla_prefill", "mla", mla_prefill_points, measure_mla_prefill, runnable, share=0.7)
MLA_DECODE = Family("mla_decode", "mla", mla_decode_points, measure_mla_decode, runnable, share=1.0)
