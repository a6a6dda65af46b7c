"""A model as numbers for programs (`describe`) and as a page for people (`format_model`)."""

from __future__ import annotations

from typing import Any

from moesim.architecture import Model
from moesim.units import format_size

CONTEXTS = (4096, 32768, 131072)
NATIVE_BITS = (16, 8, 4)
SUMMARY = ("total", "active", "one_expert")
LABELS = {"extra": "mixers, gates, norms"}  # extra_params, in words


def describe(model: Model) -> dict[str, Any]:
    """Everything derived from a model: counts, bits, bytes, KV cache; layer lists as `0-31`."""
    experts = [model.expert_bytes(i) for i in range(len(model.moe_layers))]
    return {
        "name": model.name,
        "source": model.source,
        "layers": model.layers,
        "moe_layers": {"count": len(model.moe_layers), "list": layer_list(model.moe_layers)},
        "hidden": model.hidden,
        "experts": model.experts,
        "top_k": model.top_k,
        "expert_ffn": model.expert_ffn,
        "shared_ffn": model.shared_ffn,
        "dense_ffn": model.dense_ffn,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab": model.vocab,
        "tied_embeddings": model.tied_embeddings,
        "attention": _attention(model),
        "params": _params(model),
        "bits": {
            "expert": model.expert_bits,
            "other": model.weight_bits,
            "embedding": model.weight_bits if model.embedding_bits is None else model.embedding_bits,
            "kv": model.kv_bits,
        },
        "bytes": {
            "expert": {"min": min(experts), "max": max(experts), "mean": sum(experts) / len(experts)},
            "expert_at_bits": {str(bits): model.expert_bytes(bits=bits) for bits in NATIVE_BITS},
            "all_experts": model.total_expert_bytes,
            "other": model.other_bytes,
            "total": model.total_bytes,
            "from_tensors": model.tensor_bytes is not None,
        },
        "kv": {
            "bytes_per_token": model.kv_bytes_per_token(),
            "state_bytes": model.state_bytes,
            "bytes_at_context": {str(context): model.kv_bytes(context) for context in CONTEXTS},
        },
    }


def _attention(model: Model) -> dict[str, Any]:
    return {
        "kind": "MLA" if model.mla else ("GQA" if model.kv_heads < model.heads else "MHA"),
        "kv_layers": {"count": len(model.kv_layers), "list": layer_list(model.kv_layers)},
        "window": model.sliding_window,
        "window_layers": {"count": len(model.sliding_layers), "list": layer_list(model.sliding_layers)},
    }


def _params(model: Model) -> dict[str, int]:
    """Whole-model counts, except `one_expert`."""
    moe = len(model.moe_layers)
    return {
        "total": model.total_params,
        "active": model.active_params,
        "one_expert": model.expert_params,
        "routed_experts": moe * model.experts * model.expert_params,
        "shared_experts": moe * model.shared_params,
        "routers": moe * model.router_params,
        "dense_ffn": (model.layers - moe) * model.dense_params,
        "attention": sum(model.attention_params(layer) for layer in model.kv_layers),
        "embeddings": model.embedding_params,
        "extra": model.extra_params,
    }


def format_model(model: Model) -> str:
    """A page of text: parameters, experts, memory, KV cache, where the facts are from."""
    params, moe = _params(model), len(model.moe_layers)
    lines = [f"{model.name}", ""]
    lookup = "" if model.tied_embeddings else " (the input table, a lookup, aside)"
    lines.append(f"parameters   {billions(params['total'])} in all, {billions(params['active'])} per token{lookup}")
    parts = {LABELS.get(k, k.replace("_", " ")): v for k, v in params.items() if v and k not in SUMMARY}
    width = max(map(len, parts))
    lines += [f"  {part:{width}}  {billions(n):>8}  {n / model.total_params:6.1%}" for part, n in parts.items()]
    lines += [
        "",
        f"experts      {model.experts} per MoE layer, {model.top_k} chosen; "
        f"{moe} MoE layers of {model.layers} ({layer_list(model.moe_layers)})",
        f"  one expert   {_expert_size(model)}",
        "  at " + ", ".join(f"{bits} bits {format_size(model.expert_bytes(bits=bits))}" for bits in NATIVE_BITS),
        "",
        f"weights      {format_size(model.total_bytes)}: routed experts {format_size(model.total_expert_bytes)} "
        f"at {model.expert_bits:.4g} bits, the rest {format_size(model.other_bytes)} at {_other_bits(model)}",
        "",
        *_format_kv(model),
        "",
        f"source       {model.source}",
    ]
    return "\n".join(lines)


def _format_kv(model: Model) -> list[str]:
    attention = _attention(model)
    lines = [
        f"KV cache     {format_size(model.kv_bytes_per_token())} per token at {model.kv_bits:.4g} bits: "
        f"{attention['kind']}, {len(model.kv_layers)} layers of {model.kv_width} values"
    ]
    if model.sliding_layers:
        lines.append(f"  {len(model.sliding_layers)} of them keep only the last {model.sliding_window} tokens")
    if model.state_bytes:
        lines.append(f"  and {format_size(model.state_bytes)} of recurrent state per sequence")
    sizes = [f"{context // 1024}k tokens {format_size(model.kv_bytes(context))}" for context in CONTEXTS]
    return [*lines, "  " + ", ".join(sizes)]


def _expert_size(model: Model) -> str:
    sizes = [model.expert_bytes(i) for i in range(len(model.moe_layers))]
    low, high = format_size(min(sizes)), format_size(max(sizes))
    span = low if min(sizes) == max(sizes) else f"{low} to {high} by layer"
    return f"{span} ({billions(model.expert_params)} parameters, {model.expert_bits:.4g} bits each)"


def _other_bits(model: Model) -> str:
    bits = f"{model.weight_bits:.4g} bits"
    if model.embedding_bits in (None, model.weight_bits) or model.tensor_bytes is not None:
        return bits
    return f"{bits} (embeddings and routers {model.embedding_bits:.4g})"


def billions(count: int) -> str:
    """`30.53 B`, `4.719 M`: parameters, as people write them."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.4g} {name}"
    return str(count)


def layer_list(layers: tuple[int, ...]) -> str:
    """`0-31`, `1-31 every 2`, or the numbers themselves; a longer irregular list is cut."""
    if len(layers) < 3:
        return ", ".join(map(str, layers)) or "none"
    step = layers[1] - layers[0]
    if layers == tuple(range(layers[0], layers[-1] + 1, step)):
        return f"{layers[0]}-{layers[-1]}" + (f" every {step}" if step > 1 else "")
    shown = ", ".join(map(str, layers[:8]))
    return shown if len(layers) <= 8 else f"{shown} and {len(layers) - 8} more"


def summary(model: Model) -> dict[str, Any]:
    """One row of `moesim model list`."""
    return {
        "name": model.name,
        "total_params": model.total_params,
        "active_params": model.active_params,
        "moe_layers": len(model.moe_layers),
        "experts": model.experts,
        "top_k": model.top_k,
        "expert_bytes": model.expert_bytes(),
        "total_bytes": model.total_bytes,
    }


def format_table(models: list[Model]) -> str:
    """Name, sizes and shape, one model per line."""
    width = max(len(model.name) for model in models)
    lines = [f"{'model':{width}}  {'params':>8}  {'active':>8}  {'MoE layers':>17}  {'one expert':>10}  {'weights':>9}"]
    for model in models:
        shape = f"{len(model.moe_layers)} x {model.experts} top {model.top_k}"
        params = f"{billions(model.total_params):>8}  {billions(model.active_params):>8}"
        sizes = f"{format_size(model.expert_bytes()):>10}  {format_size(model.total_bytes):>9}"
        lines.append(f"{model.name:{width}}  {params}  {shape:>17}  {sizes}")
    return "\n".join(lines)
