"""The physical ceiling: what no engine on this GPU can beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moesim.costs.layers import decode_flops, pairs, prefill_flops, weight_bits
from moesim.costs.roofline import Roofline

if TYPE_CHECKING:
    from moesim.model import Model


def ceiling_seconds(
    model: Model,
    costs: Roofline,
    prefill: Sequence[tuple[int, int]],
    decode_context: Sequence[int],
    active_by_layer: Sequence[int],
    hosted: bool = False,
) -> float:
    """One step with every expert resident: each byte used is read once at nominal bandwidth, each operation runs at
    the peak rate, both overlap, nothing else takes time. hosted: the CPU shares the work.

    prefill: (new, cached) tokens per chunk; active_by_layer: distinct experts used in each MoE layer.
    """
    tokens = len(decode_context) + sum(new for new, _ in prefill)
    sequences = len(decode_context) + len(prefill)
    if not tokens:
        return 0.0
    head = model.vocab * model.hidden
    unread = 0 if model.tied_embeddings else head  # the input table is a lookup
    nbytes = model.other_bytes - unread * weight_bits(model)[1] / 8
    nbytes += sum(active * model.mean_expert_bytes(i) for i, active in enumerate(active_by_layer))
    per_token = model.other_params - unread - head + len(model.moe_layers) * model.top_k * model.expert_params
    flops = 2.0 * (tokens * per_token + sequences * head)
    for count, window in _attention_layers(model):
        seen = sum(min(c + 1, window) if window else c + 1 for c in decode_context)
        read = seen + sum(min(old + new, window + new) if window else old + new for new, old in prefill)
        nbytes += count * read * model.kv_width * model.kv_bits / 8
        flops += count * seen * decode_flops(model)
        flops += count * prefill_flops(model) * sum(pairs(new, old, window) for new, old in prefill)
    return costs.ceiling(nbytes, flops, hosted)


def _attention_layers(model: Model) -> list[tuple[int, int]]:
    """(layers, window) of the full and the windowed attention layers."""
    windowed = len(set(model.sliding_layers) & set(model.kv_layers))
    full = len(model.kv_layers) - windowed
    return [(count, window) for count, window in ((full, 0), (windowed, model.sliding_window)) if count]
