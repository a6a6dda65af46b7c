"""Model: the shapes of an MoE transformer and what follows from them: weights, bytes, KV cache, operations.

Sizes follow from the published shapes. Norms, biases and other vectors are left out (below 0.1 % of every model in the
catalogue). A text decoder is described: vision towers and multi-token-prediction layers are not part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moesim.errors import ModelError

MAX_LAYERS, MAX_EXPERTS, MAX_WIDTH = 10_000, 32_767, 1 << 24  # expert ids fit a trace's int16
MAX_BITS = 64


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values cached as one latent per token."""

    q_lora: int  # 0: queries are projected directly
    kv_lora: int
    qk_nope: int
    qk_rope: int
    v_head: int


@dataclass(frozen=True)
class TensorBytes:
    """Real bytes from a file's tensor table, where the precision differs from tensor to tensor."""

    experts: tuple[int, ...]  # one routed expert, per MoE layer
    other: int  # everything that is not a routed expert


@dataclass(frozen=True)
class Model:
    """What is served. Parameters are counts, sizes are bytes; per-layer figures say so."""

    name: str
    layers: int  # transformer layers
    moe_layers: tuple[int, ...]  # which of them have routed experts
    hidden: int
    experts: int  # routed experts per MoE layer
    top_k: int
    expert_ffn: int  # width of one routed expert
    shared_ffn: int  # summed width of the always-on shared experts of an MoE layer; 0 = none
    dense_ffn: int  # width of the FFN in the other layers; 0 = they have none
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    ffn_matrices: int = 3  # gate, up, down; 2 where the FFN is not gated
    mla: MLA | None = None
    tied_embeddings: bool = False
    sliding_window: int = 0  # tokens; 0 = none
    sliding_layers: tuple[int, ...] = ()  # layers that keep only the window
    attention_layers: tuple[int, ...] | None = None  # layers that hold a KV cache; None = all
    expert_bits: float = 16  # bits per routed-expert weight, scales included
    weight_bits: float = 16  # bits of all other weights, the scales included
    kv_bits: float = 16
    tensor_bytes: TensorBytes | None = None  # takes precedence over expert_bits and weight_bits
    source: str = ""
    embedding_bits: float | None = None  # embeddings and routers, which quantisers leave alone; None = weight_bits
    extra_params: int = 0  # always-on weights the shapes above do not cover: Mamba, linear or cross attention, gates
    state_bytes: int = 0  # recurrent state of one sequence, whatever its length
    kv_extra: int = 0  # further values cached per token and attention layer (sparse-attention index keys)
    expert_sizes: tuple[tuple[int, ...], ...] | None = None  # bytes of each expert, per MoE layer, where they differ
    pruned: bool = False  # a transform removed experts; one may be left

    def __post_init__(self) -> None:
        validate(self)

    # Weights

    @property
    def expert_params(self) -> int:
        """One routed expert: matrices x hidden x width."""
        return self.ffn_matrices * self.hidden * self.expert_ffn

    @property
    def shared_params(self) -> int:
        """The shared experts of one MoE layer."""
        return self.ffn_matrices * self.hidden * self.shared_ffn

    @property
    def dense_params(self) -> int:
        """The FFN of one layer without routed experts."""
        return self.ffn_matrices * self.hidden * self.dense_ffn

    @property
    def router_params(self) -> int:
        """The router of one MoE layer: hidden x experts."""
        return self.hidden * self.experts

    @property
    def embedding_params(self) -> int:
        """Input embedding and output head: vocabulary x hidden, twice unless tied."""
        return self.vocab * self.hidden * (1 if self.tied_embeddings else 2)

    def attention_params(self, layer: int) -> int:
        """Projections of one layer; 0 where it holds no KV cache (those weights are in `extra_params`).

        Query and output: 2 x hidden x heads x head size; key and value: 2 x hidden x KV heads x head size.
        MLA: arXiv 2405.04434, section 2.1.
        """
        if self.attention_layers is not None and layer not in self.attention_layers:
            return 0
        if self.mla is None:
            return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        m = self.mla
        q_out = self.heads * (m.qk_nope + m.qk_rope)
        query = self.hidden * m.q_lora + m.q_lora * q_out if m.q_lora else self.hidden * q_out
        key_value = self.hidden * (m.kv_lora + m.qk_rope) + m.kv_lora * self.heads * (m.qk_nope + m.v_head)
        return query + key_value + self.heads * m.v_head * self.hidden

    @property
    def other_params(self) -> int:
        """Every weight that is not in a routed expert."""
        moe = len(self.moe_layers)
        attention = sum(self.attention_params(layer) for layer in self.kv_layers)
        ffn = moe * (self.shared_params + self.router_params) + (self.layers - moe) * self.dense_params
        return self.embedding_params + attention + ffn + self.extra_params

    @property
    def total_params(self) -> int:
        return self.other_params + len(self.moe_layers) * self.experts * self.expert_params

    @property
    def active_params(self) -> int:
        """Weights multiplied with one token; an untied input table is a lookup and not counted (publishers differ)."""
        lookup = 0 if self.tied_embeddings else self.vocab * self.hidden
        return self.other_params - lookup + len(self.moe_layers) * self.top_k * self.expert_params

    # Bytes

    def expert_bytes(self, layer_index: int = 0, bits: float | None = None, expert: int | None = None) -> int:
        """One routed expert of the `layer_index`-th MoE layer, at `bits` per weight or as the model is stored.

        Without `expert` the largest of the layer: what a slot must hold.
        """
        if bits is None and self.expert_sizes is not None:
            sizes = self.expert_sizes[layer_index]
            return max(sizes) if expert is None else sizes[expert]
        if bits is None and self.tensor_bytes is not None:
            return self.tensor_bytes.experts[layer_index]
        return stored_bytes(self.expert_params, self.expert_bits if bits is None else bits)

    def mean_expert_bytes(self, layer_index: int) -> float:
        """The average expert of a layer."""
        if self.expert_sizes is not None:
            return sum(self.expert_sizes[layer_index]) / self.experts
        return self.expert_bytes(layer_index)

    @property
    def total_expert_bytes(self) -> int:
        if self.expert_sizes is not None:
            return sum(map(sum, self.expert_sizes))
        return self.experts * sum(self.expert_bytes(i) for i in range(len(self.moe_layers)))

    @property
    def other_bytes(self) -> int:
        """Everything that is not a routed expert."""
        if self.tensor_bytes is not None:
            return self.tensor_bytes.other
        kept = self.embedding_params + len(self.moe_layers) * self.router_params
        embedding_bits = self.weight_bits if self.embedding_bits is None else self.embedding_bits
        return stored_bytes(kept, embedding_bits) + stored_bytes(self.other_params - kept, self.weight_bits)

    @property
    def total_bytes(self) -> int:
        return self.total_expert_bytes + self.other_bytes

    # KV cache

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """The layers that hold a KV cache."""
        return tuple(range(self.layers)) if self.attention_layers is None else self.attention_layers

    @property
    def kv_width(self) -> int:
        """Values cached per token and attention layer: 2 x KV heads x head size, or MLA's latent and rope key."""
        if self.mla is not None:
            return self.mla.kv_lora + self.mla.qk_rope + self.kv_extra
        return 2 * self.kv_heads * self.head_dim + self.kv_extra

    def kv_bytes_per_token(self, context: int | None = None) -> int:
        """Bytes one more token adds over all layers; after `context` tokens, full windows add none."""
        full = context is not None and 0 < self.sliding_window <= context
        growing = len(self.kv_layers) - (len(self._windowed) if full else 0)
        return stored_bytes(growing * self.kv_width, self.kv_bits)

    def kv_bytes(self, context: int) -> int:
        """One sequence of `context` tokens: windows capped, the recurrent state of hybrid layers included."""
        return stored_bytes(self._attended(context) * self.kv_width, self.kv_bits) + self.state_bytes

    @property
    def _windowed(self) -> tuple[int, ...]:
        kept = set(self.kv_layers)
        return tuple(layer for layer in self.sliding_layers if layer in kept)

    def _attended(self, context: int) -> int:
        """Cached tokens over all layers."""
        if context < 0:
            raise ModelError(f"context {context}: must not be negative")
        windowed = len(self._windowed)
        return (len(self.kv_layers) - windowed) * context + windowed * min(context, self.sliding_window)

    # Operations

    def expert_flops(self, tokens: int) -> int:
        """One routed expert on `tokens` tokens: a multiply and an add per weight and token."""
        return 2 * self.expert_params * tokens

    def flops_per_token(self, context: int) -> int:
        """One decoded token after `context` others: its weights and the scores and sums over the cache.

        MLA is counted in its absorbed form, which scores the latent itself (arXiv 2405.04434, section 2.1.2).
        """
        width = 2 * self.head_dim if self.mla is None else 2 * self.mla.kv_lora + self.mla.qk_rope
        return 2 * self.active_params + 2 * self.heads * width * self._attended(context)

    def with_precision(
        self, expert_bits: float | None = None, weight_bits: float | None = None, kv_bits: float | None = None
    ) -> Model:
        """The same model stored otherwise; what is not given stays. Bits include scales: 4.25 is MXFP4."""
        changed = replace(
            self,
            expert_bits=self.expert_bits if expert_bits is None else expert_bits,
            weight_bits=self.weight_bits if weight_bits is None else weight_bits,
            kv_bits=self.kv_bits if kv_bits is None else kv_bits,
            tensor_bytes=None,
            expert_sizes=None if expert_bits is not None else self.expert_sizes,
        )
        if self.tensor_bytes is None:
            return changed
        one = changed.expert_bytes()
        experts = self.tensor_bytes.experts if expert_bits is None else (one,) * len(self.moe_layers)
        other = self.tensor_bytes.other if weight_bits is None else changed.other_bytes
        return replace(changed, tensor_bytes=TensorBytes(experts, other))


def stored_bytes(params: int, bits: float) -> int:
    """Whole bytes of `params` weights at `bits` each."""
    return math.ceil(params * bits / 8)


def validate(model: Model) -> None:
    """Raise ModelError at the first figure that cannot be."""
    _check_int(model, "layers", 1, MAX_LAYERS)
    _check_int(model, "experts", 1 if model.pruned else 2, MAX_EXPERTS)
    _check_int(model, "top_k", 1, model.experts)
    for field in ("hidden", "expert_ffn", "heads", "kv_heads", "head_dim", "vocab"):
        _check_int(model, field, 1, MAX_WIDTH)
    for field in ("shared_ffn", "dense_ffn", "sliding_window", "kv_extra"):
        _check_int(model, field, 0, MAX_WIDTH)
    for field in ("extra_params", "state_bytes"):
        _check_int(model, field, 0, 1 << 50)
    _check_int(model, "ffn_matrices", 2, 3)
    _check_layers(model, "moe_layers", model.moe_layers)
    if not model.moe_layers:
        raise ModelError(f"model '{model.name}': no layer has routed experts; moesim simulates MoE models only")
    if model.attention_layers is not None:
        _check_layers(model, "attention_layers", model.attention_layers)
    _check_layers(model, "sliding_layers", model.sliding_layers)
    if bool(model.sliding_layers) != (model.sliding_window > 0):
        raise ModelError(f"model '{model.name}': a sliding window needs its layers, and sliding layers their window")
    if model.mla is None and model.heads % model.kv_heads:
        raise ModelError(f"model '{model.name}': {model.heads} heads do not share {model.kv_heads} KV heads evenly")
    _check_precision(model)


def _check_precision(model: Model) -> None:
    for field in ("expert_bits", "weight_bits", "kv_bits", "embedding_bits"):
        bits = getattr(model, field)
        if bits is not None and not 0 < bits <= MAX_BITS:  # also refuses NaN
            raise ModelError(f"model '{model.name}': {field} is {bits}, but must be above 0 and at most {MAX_BITS}")
    if model.mla is not None:
        for part, size in vars(model.mla).items():
            if not isinstance(size, int) or not (0 if part in ("q_lora", "qk_rope") else 1) <= size <= MAX_WIDTH:
                raise ModelError(f"model '{model.name}': mla.{part} is {size}, but must be a positive width")
    sizes = model.expert_sizes
    if sizes is not None and (
        [len(row) for row in sizes] != [model.experts] * len(model.moe_layers) or min(map(min, sizes)) < 1
    ):
        raise ModelError(f"model '{model.name}': expert_sizes needs a positive size for each expert of its MoE layers")
    real = model.tensor_bytes
    if real is not None and (len(real.experts) != len(model.moe_layers) or min(real.experts) < 1 or real.other < 0):
        raise ModelError(f"model '{model.name}': tensor_bytes needs a positive size for each of its MoE layers")


def _check_int(model: Model, field: str, low: int, high: int) -> None:
    value = getattr(model, field)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ModelError(f"model '{model.name}': {field} is {value!r}, but must be a whole number from {low} to {high}")


def _check_layers(model: Model, field: str, layers: tuple[int, ...]) -> None:
    if list(layers) != sorted(set(layers)) or any(not 0 <= layer < model.layers for layer in layers):
        raise ModelError(
            f"model '{model.name}': {field} must be ascending layer numbers from 0 to {model.layers - 1}, each once"
        )
