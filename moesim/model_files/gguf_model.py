"""What a GGUF header says about a model: shapes from its tensors, the rest from its metadata.

Precision is the file's own: `Model.tensor_bytes` holds what each MoE layer's experts and everything else take, and the
bits are their averages. Weights the shapes do not cover (norms, recurrent mixers, gates) are counted in `extra_params`,
so totals are the file's. Layers for multi-token prediction are left out, weights and all.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.architecture import MAX_LAYERS, MLA, Model, TensorBytes
from moesim.errors import ModelError
from moesim.model_files.gguf import PART, Header, Tensor, read_header
from moesim.model_files.mixers import CONV_BYTES, STATE_BYTES

EXPERT = re.compile(r"ffn_(?:gate|up|down|gate_up)(?:_exps\.\w+|\.\d+\.weight)")
WINDOWS = {"gpt-oss": (0, 2), "llama4": (8192, 4)}  # window, and every n-th layer without: fixed in llama.cpp


class _File:
    """Metadata by short key, and tensors by layer."""

    def __init__(self, header: Header, where: str) -> None:
        self.values, self.where = header.values, where
        self.architecture = str(header.values.get("general.architecture", ""))
        if not self.architecture:
            raise ModelError(f"{where}: has no general.architecture; it is not a model")
        blocks = self.number("block_count")
        self.layers = blocks - self.number("nextn_predict_layers", 0)
        if not 0 < self.layers <= MAX_LAYERS:
            raise ModelError(f"{where}: has {self.layers} layers; must be 1 to {MAX_LAYERS}")
        self.blocks: list[dict[str, Tensor]] = [{} for _ in range(self.layers)]
        self.rest: dict[str, Tensor] = {}
        for name, tensor in header.tensors.items():
            match = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name)
            if match is None:
                self.rest[name] = tensor
            elif int(match[1]) < self.layers:
                self.blocks[int(match[1])][match[2]] = tensor

    def get(self, key: str) -> Any:
        return self.values.get(f"{self.architecture}.{key}")

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number; a per-layer array is read when its entries other than 0 agree."""
        value = self.get(key)
        if isinstance(value, tuple):
            distinct = {v for v in value if v}
            value = distinct.pop() if len(distinct) == 1 else value
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 40:
            shown = "missing" if value is None else repr(value)[:60]
            raise ModelError(f"{self.where}: {self.architecture}.{key} is {shown}, but must be one whole number")
        return value

    def width(self, layer: int, name: str, axis: int = 0) -> int:
        """Size of one dimension of a layer's tensor; 0 when it has no such tensor."""
        tensor = self.blocks[layer].get(name)
        return tensor.shape[axis] if tensor is not None and len(tensor.shape) > axis else 0


def read_gguf(path: Path) -> Model:
    """The model of a GGUF file, or of all parts of a split one; only headers are read."""
    file = _File(read_header(path), str(path))
    experts = file.number("expert_count", 0)
    moe = tuple(i for i, block in enumerate(file.blocks) if any(EXPERT.fullmatch(name) for name in block))
    if experts < 2 or not moe:
        raise ModelError(
            f"{path}: {file.architecture}.expert_count is {experts} and {len(moe)} layers have expert tensors; "
            "moesim simulates MoE models only"
        )
    model = _shapes(file, _name(path), experts, moe)
    return _with_bytes(file, model)


def _name(path: Path) -> str:
    match = PART.fullmatch(path.name)
    return match[1] if match else path.stem


def _shapes(file: _File, name: str, experts: int, moe: tuple[int, ...]) -> Model:
    hidden, heads = file.number("embedding_length"), file.number("attention.head_count")
    table = file.rest.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise ModelError(f"{file.where}: has no token_embd.weight; is a part of a split model missing its name?")
    mla = _mla(file)
    dense = [i for i in range(file.layers) if i not in set(moe)]
    attention = tuple(i for i in range(file.layers) if _holds_cache(file.blocks[i]))
    window, sliding = _window(file)
    return Model(
        name=name,
        layers=file.layers,
        moe_layers=moe,
        hidden=hidden,
        experts=experts,
        top_k=file.number("expert_used_count"),
        expert_ffn=_expert_ffn(file, moe, experts),
        shared_ffn=_uniform(file, moe, "ffn_down_shexp.weight"),
        dense_ffn=_uniform(file, dense, "ffn_down.weight"),
        heads=heads,
        kv_heads=heads if mla else file.number("attention.head_count_kv", heads),
        head_dim=mla.qk_nope + mla.qk_rope if mla else _head_dim(file, hidden, heads),
        vocab=table.shape[1],
        ffn_matrices=3 if any("gate" in name for name in file.blocks[moe[0]] if EXPERT.fullmatch(name)) else 2,
        mla=mla,
        tied_embeddings="output.weight" not in file.rest,
        sliding_window=window,
        sliding_layers=sliding,
        attention_layers=attention if len(attention) < file.layers else None,
        source=file.where,
        state_bytes=_state_bytes(file, sum(map(_recurrent, file.blocks))),
        kv_extra=file.number("attention.indexer.key_length", 0),
    )


def _holds_cache(block: dict[str, Tensor]) -> bool:
    """Layers of linear attention have projections of the same names, but then also the tensors of their recurrence."""
    attends = any(name in block for name in ("attn_k.weight", "attn_qkv.weight", "attn_kv_a_mqa.weight"))
    return attends and not _recurrent(block)


def _recurrent(block: dict[str, Tensor]) -> bool:
    return any(name.startswith(("ssm_", "shortconv.")) for name in block)


def _expert_ffn(file: _File, moe: tuple[int, ...], experts: int) -> int:
    widths = {file.width(i, "ffn_down_exps.weight") or file.width(i, "ffn_down.0.weight") for i in moe}
    if len(widths) != 1 or 0 in widths:
        raise ModelError(
            f"{file.where}: experts are {sorted(widths)} wide; all MoE layers must have ffn_down of one width"
        )
    for layer in moe:
        for name, tensor in file.blocks[layer].items():
            if "_exps." in name and EXPERT.fullmatch(name) and tensor.shape[-1] != experts:
                raise ModelError(
                    f"{file.where}: blk.{layer}.{name} stacks {tensor.shape[-1]} experts, but the header says {experts}"
                )
    return widths.pop()


def _uniform(file: _File, layers: tuple[int, ...] | list[int], name: str) -> int:
    """The width these layers share for a tensor; 0 when they differ or lack it, and `extra_params` has the weights."""
    widths = {file.width(i, name) for i in layers}
    return widths.pop() if len(widths) == 1 else 0


def _mla(file: _File) -> MLA | None:
    kv_lora = file.number("attention.kv_lora_rank", 0)
    if not kv_lora:
        return None
    rope = file.number("rope.dimension_count")
    key = file.number("attention.key_length_mla", 0) or file.number("attention.key_length")
    value = file.number("attention.value_length_mla", 0) or file.number("attention.value_length")
    return MLA(file.number("attention.q_lora_rank", 0), kv_lora, key - rope, rope, value)


def _head_dim(file: _File, hidden: int, heads: int) -> int:
    key = file.number("attention.key_length", hidden // max(heads, 1))
    value = file.number("attention.value_length", key)
    if key != value:
        raise ModelError(f"{file.where}: keys of {key} and values of {value} per head; only equal sizes are described")
    return key


def _window(file: _File) -> tuple[int, tuple[int, ...]]:
    """Window and its layers; where neither the file nor llama.cpp says which layers, all attend to everything."""
    fixed, period = WINDOWS.get(file.architecture, (0, 0))
    window = file.number("attention.sliding_window", fixed)
    pattern = file.get("attention.sliding_window_pattern")
    period = pattern if isinstance(pattern, int) else period
    if isinstance(pattern, tuple):
        layers = tuple(i for i, windowed in enumerate(pattern[: file.layers]) if windowed)
    else:
        layers = tuple(i for i in range(file.layers) if period > 0 and (i + 1) % period)
    return (window, layers) if window and layers else (0, ())


def _state_bytes(file: _File, layers: int) -> int:
    """Recurrent and convolution state of one sequence in `layers` layers."""
    if not layers:
        return 0
    if file.get("shortconv.l_cache") is not None:
        return layers * file.number("shortconv.l_cache") * file.number("embedding_length") * CONV_BYTES
    if file.get("kda.head_dim") is not None:
        state = file.number("kda.head_dim")
        inner = state * file.number("attention.head_count")
        channels = 3 * inner
    else:
        inner, state = file.number("ssm.inner_size"), file.number("ssm.state_size")
        channels = inner + 2 * file.number("ssm.group_count", 0) * state
    return layers * (inner * state * STATE_BYTES + channels * file.number("ssm.conv_kernel") * CONV_BYTES)


def _with_bytes(file: _File, model: Model) -> Model:
    """The model with the file's real sizes, its averages as bits, and what the shapes do not cover as extra weights."""
    experts = []
    for layer in model.moe_layers:
        size = sum(t.bytes for name, t in file.blocks[layer].items() if EXPERT.fullmatch(name))
        experts.append(-(-size // model.experts))
    others = [*file.rest.values()]
    others += [t for block in file.blocks for name, t in block.items() if not EXPERT.fullmatch(name)]
    other_bytes, other_params = sum(t.bytes for t in others), sum(t.elements for t in others)
    extra = other_params - model.other_params
    if extra < 0:
        raise ModelError(
            f"{file.where}: its tensors hold {-extra} fewer weights than its metadata describes; it is damaged or of a "
            f"layout not known for '{file.architecture}'"
        )
    return replace(
        model,
        extra_params=extra,
        expert_bits=8 * sum(experts) / (len(experts) * model.expert_params),
        weight_bits=8 * other_bytes / other_params,
        tensor_bytes=TensorBytes(tuple(experts), other_bytes),
    )
