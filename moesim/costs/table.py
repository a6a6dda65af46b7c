"""CostTable: what the engine asks, in whole nanoseconds, composed of a machine's primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moesim.costs.ceiling import ceiling_seconds
from moesim.costs.esmm import grouped_seconds as esmm_seconds
from moesim.costs.layers import ACTIVATION_BYTES, LayerCosts
from moesim.costs.loop import active_seconds, all_seconds
from moesim.costs.roofline import Roofline
from moesim.costs.samoyeds import grouped_seconds
from moesim.costs.sparse import grouped_seconds as sparse24_seconds
from moesim.machine import Machine
from moesim.units import ns

if TYPE_CHECKING:
    from moesim.model import Model


def _grouped(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """One grouped kernel over all active experts."""
    pair_bytes = ACTIVATION_BYTES * (2 * model.hidden + 3 * model.expert_ffn)
    params = model.expert_params
    return costs.grouped(active, pairs, params=params, nbytes=nbytes, pair_bytes=pair_bytes, bits=bits)


# Seconds of (costs, model, active experts, (token, expert) pairs, bytes and bits per weight of one expert).
KERNELS: dict[str, Callable[[Roofline, Model, int, int, float, float], float]] = {
    "grouped": _grouped,
    "samoyeds": grouped_seconds,
    "sparse24": sparse24_seconds,
    "esmm": esmm_seconds,
    "loop": active_seconds,
    "loop-all": all_seconds,
}


class CostTable:
    """Costs of `model` on one device of `machine` with the primitives `costs`; the same question has the same answer.

    offloaded: the host follows the routing, as every expert cache must, which costs each MoE layer a synchronisation;
    asked with whether a pass holds prompt tokens, and how many tokens, where that matters;
    False when all experts are resident. Per-expert costs are those of the model's average expert. kernel: which one
    computes experts on the device.
    """

    def __init__(
        self, model: Model, machine: Machine, costs: Roofline, offloaded: bool | Callable[[bool, int], bool] = True,
        kernel: str = "grouped",
    ) -> None:  # fmt: skip
        costs = costs.serving(model)
        self.model, self.machine, self.costs = model, machine, costs
        self.label = costs.label
        self.unified = machine.unified
        self.matrices = model.ffn_matrices
        self.dram_gbps, self.duplex_gbps = costs.dram_gbps, costs.duplex_gbps
        self.copy_rate, self.read_rate, self.host_rate = costs.copy_gbps, costs.read_gbps, costs.host_gbps
        self.handoff_ns = ns(costs.handoff())
        self._experts = KERNELS[kernel]
        self._layers = LayerCosts(model, costs, (lambda *_: offloaded) if isinstance(offloaded, bool) else offloaded)
        self._expert_bytes = model.total_expert_bytes / (model.experts * len(model.moe_layers))
        self._grouped: dict[tuple[int, int, float | None], int] = {}
        self._host: dict[tuple[int, float | None], int] = {}
        self._copy: dict[tuple[int, int], int] = {}
        self._step: dict[tuple[int, int], int] = {}

    # Once per step

    def step_ns(self, tokens: int, sequences: int) -> int:
        """Embedding, final norm, output head and sampling for `sequences` rows, and the host's work."""
        key = (tokens, sequences)
        cost = self._step.get(key)
        if cost is None:
            model, bits = self.model, self._layers.head_bits
            params = model.vocab * model.hidden
            head = self.costs.gemm(sequences, params, params * bits / 8, bits)
            edges = self.costs.layer(4 * ACTIVATION_BYTES * tokens * model.hidden)  # embedding and final norm
            cost = self._step[key] = ns(self.costs.step(sequences) + edges + head)
        return cost

    def layers_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        """Per MoE layer, all but its routed experts; dense layers are charged to the next MoE layer, trailing ones to
        the last.

        prefill: (new tokens, tokens cached before) per chunk; decode_context: cached tokens of each decoding sequence.
        """
        return self._layers.costs_ns(prefill, decode_context)

    @property
    def layer_kinds(self) -> list[int]:
        """The kind of each MoE layer in `kinds_ns` and `passes_ns`."""
        return self._layers.pattern

    @property
    def partial_sums(self) -> list[int]:
        """Of each MoE layer and the dense ones charged to it: sums that GPUs which share its parts must add up before
        its routed experts, one per mixer and one per dense FFN."""
        return self._layers.partial_sums

    def kinds_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        """`layers_ns` by kind of layer."""
        return self._layers.kinds_ns(prefill, decode_context)

    def passes_ns(self, contexts: Sequence[int], passes: int) -> NDArray[np.int64]:
        """`kinds_ns` of so many passes, in which the sequences decode one token each: [passes, kinds]."""
        return self._layers.passes_ns(contexts, passes)

    # Routed experts

    def grouped_ns(self, active: int, tokens: int, bits: float | None = None) -> int:
        """`tokens` (token, expert) pairs over `active` resident experts, in one grouped kernel."""
        key = (active, tokens, bits)
        cost = self._grouped.get(key)
        if cost is None:
            nbytes, precision = self._one_expert(bits)
            seconds = self._experts(self.costs, self.model, active, tokens, nbytes, precision)
            cost = self._grouped[key] = ns(seconds)
        return cost

    def expert_ns(self, tokens: int, bits: float | None = None) -> int:
        """One expert in a kernel of its own."""
        return self.grouped_ns(1, tokens, bits)

    def host_expert_ns(self, tokens: int, bits: float | None = None) -> int:
        """One expert on the CPU, hand-off not included."""
        key = (tokens, bits)
        cost = self._host.get(key)
        if cost is None:
            nbytes, _ = self._one_expert(bits)
            cost = self._host[key] = ns(self.costs.host_expert(tokens, self.model.expert_params, nbytes))
        return cost

    def _one_expert(self, bits: float | None) -> tuple[float, float]:
        """Bytes and bits per weight of the average expert."""
        if bits is None:
            return self._expert_bytes, 8 * self._expert_bytes / self.model.expert_params
        return self.model.expert_bytes(0, bits), bits

    def network_ns(self, params: float, tokens: int) -> int:
        """One pass of a small dense network of 16-bit weights over `tokens` tokens: a learned predictor."""
        return ns(self.costs.gemm(tokens, params, 2 * params))

    # Transfers

    def expert_bytes(self, layer_index: int = 0, bits: float | None = None, expert: int | None = None) -> int:
        return self.model.expert_bytes(layer_index, bits, expert)

    def copy_ns(self, nbytes: int, matrices: int = 1) -> int:
        """Host to device alone on an idle link; each of `matrices` transfers pays its fixed time."""
        key = (nbytes, matrices)
        cost = self._copy.get(key)
        if cost is None:
            cost = self._copy[key] = ns(self.costs.copy(nbytes, matrices))
        return cost

    def copy_back_ns(self, nbytes: int) -> int:
        """Device to host; measured pinned rates differ by 5 % or less."""
        return self.copy_ns(nbytes)

    def read_ns(self, nbytes: int) -> int:
        """NVMe to host memory, or to the one memory of a unified machine."""
        key = (nbytes, -1)
        cost = self._copy.get(key)
        if cost is None:
            cost = self._copy[key] = ns(self.costs.read(nbytes))
        return cost

    # The ceiling

    def ceiling_step_ns(
        self,
        prefill: Sequence[tuple[int, int]],
        decode_context: Sequence[int],
        active_by_layer: Sequence[int],
        hosted: bool = False,
    ) -> int:
        """No step of these tokens can be faster on this GPU, if `hosted` with its CPU: all resident, nominal rates, no
        overheads."""
        return ns(ceiling_seconds(self.model, self.costs, prefill, decode_context, active_by_layer, hosted))
