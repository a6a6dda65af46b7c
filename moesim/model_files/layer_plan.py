"""Which layers of a config have routed experts, hold a KV cache, keep only a window, or mix tokens otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.architecture import MAX_LAYERS
from moesim.errors import ModelError
from moesim.model_files.config_keys import Keys

FULL = {"full_attention", "attention", "global_attention", "indexed_attention", "*"}
WINDOWED = {"sliding_attention", "chunked_attention", "local_attention"}
STATEFUL = {"linear_attention", "mamba", "mamba2", "conv", "short_conv", "M"}
NO_MIXER = {"moe", "E", "mlp", "-"}  # Nemotron-H: a layer is one block, an FFN or a mixer
SPARSE, DENSE = {"sparse", "moe"}, {"dense", "mlp"}


@dataclass(frozen=True)
class LayerPlan:
    moe: tuple[int, ...]
    attention: tuple[int, ...] | None  # None = all
    mixer: tuple[int, ...]  # neither attention nor FFN alone: Mamba and its like
    sliding: tuple[int, ...]
    window: int
    single_block: bool = False  # layers are one block each, so layers without experts have no FFN beside their mixer
    ffn_only: tuple[int, ...] = ()  # of those, the dense FFNs


def read_layers(keys: Keys, layers: int) -> LayerPlan:
    """What each of `layers` layers is; ModelError when a layer is of a kind we do not know."""
    if not 0 < layers <= MAX_LAYERS:
        raise ModelError(f"{keys.where}: {layers} layers; must be 1 to {MAX_LAYERS}")
    kinds = _kinds(keys, layers)
    window = _window(keys)
    unknown = sorted(set(kinds) - FULL - WINDOWED - STATEFUL - NO_MIXER)
    if unknown:
        raise ModelError(f"{keys.where}: layers of kind '{unknown[0]}' are unknown; use the model's GGUF")
    blocks = bool(NO_MIXER.intersection(kinds))
    attention = tuple(i for i, kind in enumerate(kinds) if kind in FULL | WINDOWED)
    sliding = tuple(i for i, kind in enumerate(kinds) if kind in WINDOWED)
    if sliding and not window:
        raise ModelError(f"{keys.where}: layers {sliding[:3]}... use a window, but sliding_window is missing")
    return LayerPlan(
        moe=tuple(i for i, k in enumerate(kinds) if k in ("moe", "E")) if blocks else moe_layers(keys, layers),
        attention=attention if len(attention) < layers else None,
        mixer=tuple(i for i, kind in enumerate(kinds) if kind in STATEFUL),
        sliding=sliding,
        window=window,
        single_block=blocks,
        ffn_only=tuple(i for i, kind in enumerate(kinds) if kind in ("mlp", "-")),
    )


def moe_layers(keys: Keys, layers: int) -> tuple[int, ...]:
    """The layers with routed experts, by whichever rule the config uses; all when it has none."""
    if keys.has("mlp_layer_types"):
        kinds = keys.per_layer("mlp_layer_types", layers)
        unknown = [kind for kind in kinds if kind not in SPARSE | DENSE]
        if unknown:
            raise ModelError(f"{keys.where}: mlp_layer_types has '{unknown[0]}'; known: {', '.join(SPARSE | DENSE)}")
        return tuple(i for i, kind in enumerate(kinds) if kind in SPARSE)
    if isinstance(keys.get("moe_layers"), list):
        return keys.layer_numbers("moe_layers", layers)
    if keys.text("moe_layers_enum"):
        return _enumerated(keys, layers)
    if isinstance(keys.get("moe_layer_freq"), list):
        return tuple(i for i, flag in enumerate(keys.per_layer("moe_layer_freq", layers)) if flag)
    if keys.has("expert_layer_period"):
        period, offset = keys.positive("expert_layer_period"), keys.number("expert_layer_offset", default=0)
        return tuple(i for i in range(layers) if i % period == offset)
    if keys.has("moe_layer_start_index"):
        start, end = keys.number("moe_layer_start_index"), _end_index(keys, layers)
        every = keys.positive("moe_layer_interval", default=1)
        return tuple(i for i in range(start, min(end + 1, layers)) if (i + 1) % every == 0)
    first = keys.number("first_k_dense_replace", "n_dense_layers", "num_dense_layers", default=0)
    every = keys.positive("moe_layer_freq", default=1)
    step = keys.positive("interleave_moe_layer_step", "decoder_sparse_step", default=1)
    dense = set(keys.layer_numbers("mlp_only_layers", layers)) if keys.has("mlp_only_layers") else set()
    return tuple(i for i in range(first, layers) if i % every == 0 and (i + 1) % step == 0 and i not in dense)


def _enumerated(keys: Keys, layers: int) -> tuple[int, ...]:
    """Step-3 writes its MoE layers as one text, `4,5,6`."""
    parts = keys.text("moe_layers_enum").split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ModelError(f"{keys.where}: moe_layers_enum must be layer numbers with commas between them")
    return tuple(sorted({int(part) for part in parts if int(part) < layers}))


def _end_index(keys: Keys, layers: int) -> int:
    """ERNIE 4.5's last MoE layer; -1 and absence mean the model's last."""
    end = keys.get("moe_layer_end_index")
    return layers - 1 if end in (None, -1) else keys.number("moe_layer_end_index")


def _kinds(keys: Keys, layers: int) -> list[str]:
    """One name per layer for how it mixes tokens, from whichever key the config uses."""
    for name in ("layers_block_type", "layer_types"):
        if keys.has(name):
            return [str(kind) for kind in keys.per_layer(name, layers)]
    if keys.text("hybrid_override_pattern"):
        return list(keys.text("hybrid_override_pattern"))[:layers]
    if keys.has("attn_layer_period"):
        period, offset = keys.positive("attn_layer_period"), keys.number("attn_layer_offset", default=0)
        return ["attention" if i % period == offset else "mamba" for i in range(layers)]
    if keys.has("full_attention_interval"):
        every = keys.positive("full_attention_interval")
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    if keys.has("attn_type_list"):  # MiniMax-01
        return ["attention" if flag else "linear_attention" for flag in keys.per_layer("attn_type_list", layers)]
    if keys.has("full_attn_idxs"):  # LFM2
        full = set(keys.layer_numbers("full_attn_idxs", layers))
        return ["attention" if i in full else "conv" for i in range(layers)]
    linear = keys.child("linear_attn_config")
    if linear is not None and linear.has("full_attn_layers"):  # Kimi Linear counts layers from 1
        full = set(linear.layer_numbers("full_attn_layers", layers, first=1))
        return ["attention" if i in full else "linear_attention" for i in range(layers)]
    return _windowed_kinds(keys, layers)


def _windowed_kinds(keys: Keys, layers: int) -> list[str]:
    """Plain attention everywhere; with a window, in the layers that use it."""
    if not _window(keys):
        return ["attention"] * layers
    if keys.has("attention_chunk_size"):  # Llama 4: layers without rotary embedding attend to everything
        rotary = keys.per_layer("no_rope_layers", layers) if keys.get("no_rope_layers") else None
        every = keys.positive("no_rope_layer_interval", default=4)
        chunked = rotary or [(i + 1) % every for i in range(layers)]
        return ["chunked_attention" if chunk else "attention" for chunk in chunked]
    if keys.has("sliding_window_pattern", "global_attn_every_n_layers"):
        every = keys.positive("sliding_window_pattern", "global_attn_every_n_layers")
        return ["attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    first = keys.number("max_window_layers", default=0) if keys.get("use_sliding_window") else 0  # Qwen
    return ["sliding_attention" if i >= first else "attention" for i in range(layers)]


def _window(keys: Keys) -> int:
    if keys.values.get("use_sliding_window") is False:
        return 0
    return keys.number("sliding_window", "attention_chunk_size", "sliding_window_size", default=0)
