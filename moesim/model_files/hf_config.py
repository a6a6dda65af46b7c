"""A Model from a Hugging Face config.json (or DeepSeek's, DBRX's and Mistral's own spellings of one).

Every key has its aliases in one place below. What would change sizes in a way Model cannot say is refused by name, so
that no model is read almost right; `docs/bring-a-model.md` lists what is derived from what.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.architecture import MLA, Model
from moesim.errors import ModelError
from moesim.model_files.config_keys import Keys, fill_from_children
from moesim.model_files.layer_plan import LayerPlan, read_layers
from moesim.model_files.mixers import Mixer, read_mixer
from moesim.model_files.quantization import Scheme, read_scheme

MAX_FILE = 16 << 20
EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts", "num_routed_experts")
TOP_K = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k",
    "top_k_experts", "n_activated_experts", "num_selected_experts",
)  # fmt: skip
FFN = ("intermediate_size", "ffn_hidden_size", "hidden_dim", "inter_dim", "ffn_dim")
EXPERT_FFN = ("moe_intermediate_size", "expert_ffn_hidden_size", "moe_ffn_hidden_size", "moe_inter_dim", *FFN)
DENSE_FFN = ("intermediate_size_mlp", "dense_intermediate_size", "prefix_dense_intermediate_size", *FFN)
SHARED_COUNT = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
SHARED_TOTAL = ("shared_expert_intermediate_size", "shared_intermediate_size", "share_expert_dim")
HIDDEN = ("hidden_size", "d_model", "dim", "n_embd")
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
KV_HEADS = ("num_key_value_heads", "kv_n_heads", "n_kv_heads", "num_kv_heads", "multi_query_group_num")
TEXT = ("thinker_config", "text_config", "llm_config", "language_config")
NESTED = ("ffn_config", "attn_config", "moe")
TIED_BY_DEFAULT = ("cohere2_moe", "ernie4_5_moe", "lfm2_moe")
OUTPUT_GATED = ("qwen3_next", "qwen3_5_moe", "qwen3_5_moe_text", "afmoe")
REFUSED_KEYS = {
    "zero_expert_num": "experts that compute nothing",
    "parallel_attn_mlp_res": "a dense network beside the experts",
    "enable_moe_block": "a dense network beside the experts",
    "moe_hidden_size": "experts narrower than the model",
    "moe_latent_size": "experts narrower than the model",
    "per_layer_config": "layers of different shapes",
    "swa_num_key_value_heads": "window layers with other heads",
    "hc_mult": "several residual streams",
    "hc_count": "several residual streams",
    "index_topk_blocks": "block-sparse attention",
    "use_cla": "layers that share a KV cache",
    "num_kv_shared_layers": "layers that share a KV cache",
}
REFUSED_TYPES = {
    "jetmoe": "attention heads that are routed too",
    "mimo_v2_flash": "window layers with other heads",
    "mimo_v2": "window layers with other heads",
    "doge": "experts of single vectors",
    "zaya": "compressed convolutional attention",
    "arctic": "a dense network beside the experts",
}


def read_config(path: Path) -> Model:
    """The model of a config.json; hf_quant_config.json beside it, if any, says how it is quantised."""
    values = _read_json(path)
    separate = path.with_name("hf_quant_config.json")
    quant = _read_json(separate) if separate.is_file() else None
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    return model_from_config(values, name, str(path), quant)


def model_from_config(values: dict[str, Any], name: str, where: str, quant: dict[str, Any] | None = None) -> Model:
    """The model a parsed config describes; `where` names it in errors and in `source`."""
    keys = Keys(_text_part(values), where)
    _refuse(keys)
    experts = _expert_count(keys)
    layers = keys.positive(*LAYERS) if keys.has(*LAYERS) else len(keys.get("layers_block_type") or ())
    plan = read_layers(keys, layers)
    hidden, heads = keys.positive(*HIDDEN), keys.positive(*HEADS)
    mla = _mla(keys)
    head_dim = mla.qk_nope + mla.qk_rope if mla else _head_dim(keys, hidden, heads)
    mixer = _mixer(keys, plan, hidden, heads, head_dim)
    model = Model(
        name=name,
        layers=layers,
        moe_layers=plan.moe,
        hidden=hidden,
        experts=experts,
        top_k=keys.positive(*TOP_K),
        expert_ffn=keys.positive(*EXPERT_FFN),
        shared_ffn=_shared_ffn(keys),
        dense_ffn=0 if plan.single_block or len(plan.moe) == layers else keys.positive(*DENSE_FFN),
        heads=heads,
        kv_heads=heads if mla else keys.positive(*KV_HEADS, default=heads),
        head_dim=head_dim,
        vocab=keys.positive("vocab_size"),
        ffn_matrices=2 if keys.text("mlp_hidden_act") == "relu2" else 3,
        mla=mla,
        tied_embeddings=bool(keys.values.get("tie_word_embeddings", keys.text("model_type") in TIED_BY_DEFAULT)),
        sliding_window=plan.window if plan.sliding else 0,
        sliding_layers=plan.sliding,
        attention_layers=plan.attention,
        source=where,
        state_bytes=mixer.state_bytes * len(plan.mixer),
        kv_extra=keys.number("index_head_dim", default=0) if keys.has("index_topk") else 0,
    )
    model = replace(model, extra_params=mixer.params * len(plan.mixer) + _extra_params(keys, model, plan))
    return _stored(model, read_scheme(keys, quant))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE:
            raise ModelError(f"{path}: larger than {MAX_FILE >> 20} MiB, too large for a model config")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object, so it is no model config")
    return values


def _text_part(values: dict[str, Any]) -> dict[str, Any]:
    """The language model of a multimodal config, with what only the outer level says (tied, quantised, type)."""
    for name in TEXT:  # in the order they nest
        inner = values.get(name)
        if isinstance(inner, dict):
            values = {**values, **inner}
    return fill_from_children(values, NESTED)


def _refuse(keys: Keys) -> None:
    if keys.get("is_encoder_decoder"):
        raise ModelError(f"{keys.where}: encoder-decoder configs are not read; by name there is switch-base-8")
    reason = REFUSED_TYPES.get(keys.text("model_type"))
    reasons = [reason] if reason else [f"{why} ({key})" for key, why in REFUSED_KEYS.items() if keys.get(key)]
    if reasons:
        raise ModelError(
            f"{keys.where}: has {', '.join(reasons)}, which a config.json reading cannot describe; try the model's GGUF"
        )


def _expert_count(keys: Keys) -> int:
    given = [keys.number(name) for name in EXPERTS if keys.has(name)]
    counts = {count for count in given if count > 1}
    if len(counts) > 1:
        raise ModelError(f"{keys.where}: {', '.join(n for n in EXPERTS if keys.has(n))} contradict each other: {given}")
    if counts:
        return counts.pop()
    hints = [k for k, v in keys.values.items() if re.search("expert|moe", k) and v and k not in EXPERTS]
    if given or not hints:
        raise ModelError(
            f"{keys.where}: a dense model; moesim simulates MoE models, which give one of {', '.join(EXPERTS)}"
        )
    raise ModelError(
        f"{keys.where}: looks like an MoE ({', '.join(sorted(hints)[:4])}), but its number of experts is missing; "
        f"looked for {', '.join(EXPERTS)}"
    )


def _mla(keys: Keys) -> MLA | None:
    if not keys.number("kv_lora_rank", default=0):
        return None
    return MLA(
        q_lora=keys.number("q_lora_rank", default=0),
        kv_lora=keys.positive("kv_lora_rank"),
        qk_nope=keys.positive("qk_nope_head_dim"),
        qk_rope=keys.number("qk_rope_head_dim"),
        v_head=keys.positive("v_head_dim"),
    )


def _head_dim(keys: Keys, hidden: int, heads: int) -> int:
    names = ("head_dim", "attention_head_dim", "kv_channels")
    if hidden % heads and not keys.has(*names):
        raise ModelError(f"{keys.where}: needs head_dim, as {heads} heads do not divide hidden size {hidden}")
    head_dim = keys.positive(*names, default=hidden // heads)
    value_dim = keys.number("v_head_dim", default=head_dim)
    if value_dim != head_dim:
        raise ModelError(f"{keys.where}: v_head_dim {value_dim} differs from head_dim {head_dim}; use the model's GGUF")
    return head_dim


def _shared_ffn(keys: Keys) -> int:
    """Summed width: a total where one is given, else count x width. Llama 4 always has one as wide as an expert."""
    if keys.text("model_type").startswith("llama4"):
        return keys.positive(*FFN)
    if keys.has(*SHARED_TOTAL):
        return keys.number(*SHARED_TOTAL)
    count = keys.number(*SHARED_COUNT, default=0)
    width = keys.number("moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", *EXPERT_FFN)
    return count * width


def _mixer(keys: Keys, plan: LayerPlan, hidden: int, heads: int, head_dim: int) -> Mixer:
    return read_mixer(keys, hidden, heads, head_dim) if plan.mixer else Mixer(0, 0)


def _extra_params(keys: Keys, model: Model, plan: LayerPlan) -> int:
    """Always-on weights beside the standard shapes: output gates, sparse-attention indexers, stand-alone FFNs."""
    gate = model.hidden * model.heads * model.head_dim
    gated = keys.get("attn_output_gate") or keys.text("model_type") in OUTPUT_GATED
    extra = gate * len(model.kv_layers) if gated else 0
    if model.mla is not None and keys.has("index_topk"):  # DeepSeek-V3.2: query, key and weight projections
        heads, dim = keys.positive("index_n_heads"), keys.positive("index_head_dim")
        kinds = keys.strings("indexer_types")[: model.layers]
        layers = kinds.count("full") if kinds else model.layers
        extra += layers * (model.mla.q_lora * heads * dim + model.hidden * (dim + heads))
    if plan.ffn_only:
        extra += len(plan.ffn_only) * model.ffn_matrices * model.hidden * keys.positive(*FFN)
    return extra


def _stored(model: Model, scheme: Scheme) -> Model:
    """The model at the scheme's precision; weights beside the experts get the average of what their layers say."""
    expert_bits = {scheme.experts(layer) for layer in model.moe_layers}
    if len(expert_bits) > 1:
        raise ModelError(f"{model.source}: experts of different precision in different layers; use the model's GGUF")
    moe, attention = set(model.moe_layers), set(model.kv_layers)
    parts = [(model.attention_params(layer), scheme.attention(layer)) for layer in attention]
    parts += [(model.shared_params, scheme.shared(layer)) for layer in moe if model.shared_params]
    parts += [(model.dense_params, scheme.dense(layer)) for layer in set(range(model.layers)) - moe]
    weights = sum(params for params, _ in parts)
    return replace(
        model,
        expert_bits=expert_bits.pop(),
        weight_bits=sum(params * bits for params, bits in parts) / weights if weights else scheme.base,
        embedding_bits=scheme.base,
        kv_bits=scheme.kv_bits,
    )
