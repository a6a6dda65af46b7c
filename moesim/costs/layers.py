"""What a layer costs beside its routed experts: mixer, norms, router, shared experts, dense FFN, launches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.costs.roofline import Attended, Roofline
from moesim.units import many_ns, ns

if TYPE_CHECKING:
    from moesim.model import Model

_PASSES = 8  # reads and writes of the hidden state by a layer's small kernels: LLMServingSim dense.csv, RTX PRO 6000
ACTIVATION_BYTES = 2

Prefill = Sequence[tuple[int, int]]


class LayerCosts:
    """Costs of a model's layers, computed once per kind of layer: full, windowed or no attention; MoE or dense."""

    def __init__(self, model: Model, costs: Roofline, offloaded: Callable[[bool, int], bool]) -> None:
        self._model, self._costs = model, costs
        self._offloaded, self._route = offloaded, costs.routing()
        self.layer_bits, self.head_bits = weight_bits(model)
        self._attention_params = model.attention_params(model.kv_layers[0]) if model.kv_layers else 0
        stateful = model.layers - len(model.kv_layers)
        self._extra_params = model.extra_params / (stateful or model.layers)
        self._state_bytes = model.state_bytes / stateful if stateful else 0.0
        self._kv_bytes = model.kv_width * model.kv_bits / 8  # one cached token, one layer
        self._linear: dict[int, tuple[float, float, float, float]] = {}
        self._decoded: dict[tuple[int, int, int], list[int]] = {}
        groups = _groups(model)
        self._kinds = sorted(set(groups))
        self._pattern = [self._kinds.index(group) for group in groups]

    @property
    def pattern(self) -> list[int]:
        """The kind of each MoE layer: layers of one kind cost the same."""
        return self._pattern

    @property
    def partial_sums(self) -> list[int]:
        """By MoE layer: mixers and dense FFNs it answers for."""
        return [sum(self._kinds[kind]) for kind in self._pattern]

    def costs_ns(self, prefill: Prefill, decode_context: Sequence[int]) -> list[int]:
        """Per MoE layer, in whole nanoseconds; each includes the dense layers before it, the last those after it."""
        by_kind = self.kinds_ns(prefill, decode_context)
        return [by_kind[kind] for kind in self._pattern]

    def kinds_ns(self, prefill: Prefill, decode_context: Sequence[int]) -> list[int]:
        """Per kind of MoE layer."""
        tokens = len(decode_context) + sum(new for new, _ in prefill)
        if not tokens:
            return [0] * len(self._kinds)
        if not prefill:
            window = self._model.sliding_window
            seen = sum(decode_context) + len(decode_context)
            inside = sum(min(c + 1, window) for c in decode_context) if window else seen
            return self._decoding(tokens, seen, inside)
        full = self._attention(prefill, decode_context, 0)
        windowed = full
        if self._model.sliding_window:
            windowed = self._attention(prefill, decode_context, self._model.sliding_window)
        return self._by_kind(tokens, len(decode_context) + len(prefill), full, windowed, prompts=True)

    def passes_ns(self, contexts: Sequence[int], passes: int) -> NDArray[np.int64]:
        """The same for passes in which sequences decode one token each, from `contexts` on: [passes, kinds]."""
        count, window = len(contexts), self._model.sliding_window
        seen = sum(contexts) + count + count * np.arange(passes)
        inside = seen
        if window:
            ends = np.array(contexts)[:, None] + np.arange(1, passes + 1)
            inside = np.minimum(ends, window).sum(axis=0)
        if self._costs.many_at_once:
            full = self._decode_attention(count, seen, 0)
            return np.stack(self._by_kind(count, count, full, self._decode_attention(count, inside, window)), axis=-1)
        rows = zip(seen.tolist(), inside.tolist(), strict=True)
        return np.array([self._decoding(count, *row) for row in rows], dtype=np.int64)

    def _decoding(self, count: int, seen: int, inside: int) -> list[int]:
        """`count` sequences that see so many tokens together, and so many inside their windows; remembered."""
        key = (count, seen, inside)
        known = self._decoded.get(key)
        if known is None:
            full = self._decode_attention(count, seen, 0)
            window = self._model.sliding_window
            windowed = self._decode_attention(count, inside, window) if window else full
            known = self._decoded[key] = self._by_kind(count, count, full, windowed)
        return known

    def _by_kind(self, tokens: int, sequences: int, full: Any, windowed: Any, prompts: bool = False) -> list[Any]:
        """ns of every kind of layer; of many steps where `full` and `windowed`, seconds of attention, are arrays."""
        attending, stateful, dense, moe = self._linear.get(tokens) or self._weights(tokens)
        if self._offloaded(prompts, tokens):
            moe += self._route
        full, windowed = attending + full, attending + windowed
        if self._state_bytes:
            stateful += self._costs.attention(2 * sequences * self._state_bytes, 0)
        to_ns = many_ns if isinstance(full, np.ndarray) else ns
        return [to_ns(f * full + w * windowed + s * stateful + d * dense + moe) for f, w, s, d in self._kinds]

    def _weights(self, tokens: int) -> tuple[float, float, float, float]:
        """Seconds of (attention layer, layer without a KV cache, dense FFN, MoE parts) that depend on tokens only."""
        model, costs = self._model, self._costs
        small = costs.layer(_PASSES * ACTIVATION_BYTES * tokens * model.hidden)
        mixer = self._gemm(tokens, self._attention_params, 2 if model.mla is None else 5)
        extra = self._gemm(tokens, self._extra_params, 2)
        on_all = len(model.kv_layers) == model.layers
        router = costs.gemm(tokens, model.router_params, model.router_params * self.head_bits / 8, self.head_bits)
        moe = router + self._gemm(tokens, model.shared_params, 2)
        parts = (
            small + mixer + (extra if on_all else 0.0),
            small + extra,
            self._gemm(tokens, model.dense_params, 2),
            moe,
        )
        self._linear[tokens] = parts
        return parts

    def _gemm(self, tokens: int, params: float, kernels: int) -> float:
        return self._costs.gemm(tokens, params, params * self.layer_bits / 8, self.layer_bits, kernels)

    def _attention(self, prefill: Prefill, decode_context: Sequence[int], window: int) -> float:
        """Attention kernels of one layer: one for the decoding sequences, one for the chunks."""
        total = 0.0
        if decode_context:
            cached = (
                sum(min(c + 1, window) for c in decode_context) if window else sum(decode_context) + len(decode_context)
            )
            total += self._decode_attention(len(decode_context), cached, window)
        if prefill:
            cached = sum(min(old + new, window + new) if window else old + new for new, old in prefill)
            flops = sum(pairs(new, old, window) for new, old in prefill) * prefill_flops(self._model)
            total += self._costs.attention(cached * self._kv_bytes, flops, _alike(prefill, window))
        return total

    def _decode_attention(self, count: int, seen: Any, window: int) -> Any:
        shape = Attended(count, 0, seen / count, window)
        return self._costs.attention(seen * self._kv_bytes, seen * decode_flops(self._model), shape)


def _alike(prefill: Prefill, window: int) -> Attended:
    """As many equal chunks with the same (query, key) pairs: the root mean square of the new tokens, and mean past."""
    count = len(prefill)
    tokens = math.sqrt(sum(new * new for new, _ in prefill) / count)
    past = sum(new * old for new, old in prefill) / (count * tokens)
    return Attended(count, tokens, past, window)


def weight_bits(model: Model) -> tuple[float, float]:
    """Bits of a layer's always-on weights, and of embeddings and routers; a file's real bytes are spread evenly."""
    if model.tensor_bytes is not None:
        average = 8 * model.tensor_bytes.other / model.other_params
        return average, average
    return model.weight_bits, model.weight_bits if model.embedding_bits is None else model.embedding_bits


def decode_flops(model: Model) -> int:
    """Per layer and cached token: scores and weighted sum over every head; MLA scores the latent itself."""
    if model.mla is None:
        return 4 * model.heads * model.head_dim
    return 2 * model.heads * (2 * model.mla.kv_lora + model.mla.qk_rope)


def prefill_flops(model: Model) -> int:
    """Per layer and (query, key) pair; MLA expands the latent during prefill."""
    if model.mla is None:
        return 4 * model.heads * model.head_dim
    return 2 * model.heads * (model.mla.qk_nope + model.mla.qk_rope + model.mla.v_head)


def pairs(new: int, cached: int, window: int = 0) -> int:
    """(query, key) pairs of causal attention: the i-th new token sees cached + i keys, at most `window` if not 0."""
    inside = new if not window else max(0, min(new, window - cached))
    return inside * cached + inside * (inside + 1) // 2 + (new - inside) * window


def _groups(model: Model) -> list[tuple[int, int, int, int]]:
    """Per MoE layer, how many layers it answers for: (full, windowed, no KV cache, dense FFN)."""
    attending, windowed, moe = set(model.kv_layers), set(model.sliding_layers), set(model.moe_layers)
    ends = [*model.moe_layers[:-1], model.layers - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    groups = []
    for start, end in zip(starts, ends, strict=True):
        layers = range(start, end + 1)
        with_cache = sum(layer in attending for layer in layers)
        with_window = sum(layer in attending and layer in windowed for layer in layers)
        dense = sum(layer not in moe for layer in layers)
        groups.append((with_cache - with_window, with_window, len(layers) - with_cache, dense))
    return groups
