"""A machine whose costs are round numbers, so that a test can say what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.engine.events import Device, Knowledge
from moesim.engine.host_tier import HostTier
from moesim.engine.residency import Slots
from moesim.records import Records
from moesim.systems import System
from moesim.trace import DECODE, PREFILL, Requests, Trace, TraceInfo


@dataclass
class FakeModel:
    layers: int = 1
    kv_per_token: int = 0

    def kv_bytes(self, context: int) -> int:
        return context * self.kv_per_token


@dataclass
class FakeTable:
    """Every cost is a constant or a simple product; bandwidths are so wide that nothing is shared unless asked."""

    layers: int
    mixer: int = 100
    step: int = 0
    per_expert: int = 10
    copy: int = 1000
    read: int = 3000
    host_expert: int = 500
    handoff_ns: int = 50
    size: int = 1000
    matrices: int = 3
    unified: bool = False
    dram_gbps: float = 1e9
    duplex_gbps: float = 1e9
    model: Any = field(default_factory=FakeModel)

    def step_ns(self, tokens: int, sequences: int) -> int:
        return self.step

    def layers_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        return [self.mixer] * self.layers

    @property
    def layer_kinds(self) -> list[int]:
        return [0] * self.layers

    def kinds_ns(self, prefill: Sequence[tuple[int, int]], decode_context: Sequence[int]) -> list[int]:
        return [self.mixer]

    def passes_ns(self, contexts: Sequence[int], passes: int) -> Any:
        return np.full((passes, 1), self.mixer)

    def grouped_ns(self, active: int, tokens: int, bits: float | None = None) -> int:
        return self.per_expert * active

    def expert_ns(self, tokens: int) -> int:
        return self.per_expert

    def host_expert_ns(self, tokens: int) -> int:
        return self.host_expert

    def expert_bytes(self, layer: int = 0, bits: float | None = None, expert: int | None = None) -> int:
        return self.size if bits is None else int(self.size * bits / 16)

    def copy_ns(self, nbytes: int) -> int:
        return self.copy * nbytes // self.size

    def copy_back_ns(self, nbytes: int) -> int:
        return self.copy_ns(nbytes)

    def network_ns(self, params: float, tokens: int) -> int:
        return 5

    def read_ns(self, nbytes: int) -> int:
        return self.read * nbytes // self.size

    @property
    def copy_rate(self) -> float:
        return self.size / max(self.copy, 1)

    read_rate = host_rate = copy_rate


def make_trace(
    experts: Any, count: int, requests: Sequence[tuple[int, int]] | None = None, tasks: Sequence[str] | None = None
) -> Trace:
    """A trace from [tokens, layers, k]; requests = (prompt rows, decode rows) each; one decode-only request if None."""
    ids = np.asarray(experts, dtype=np.int16)
    requests = requests or [(0, len(ids))]
    request = np.concatenate([np.full(p + d, i) for i, (p, d) in enumerate(requests)])
    phase = np.concatenate([[PREFILL] * p + [DECODE] * d for p, d in requests])
    position = np.concatenate([np.arange(p + d) for p, d in requests])
    return Trace(
        info=TraceInfo("fake", count, ids.shape[2], tuple(range(ids.shape[1]))),
        requests=Requests(
            tuple(f"r{i}" for i in range(len(requests))),
            tuple(tasks or [""] * len(requests)),
            np.array([p for p, _ in requests], dtype=np.int32),
        ),
        experts=ids,
        request=request.astype(np.int32),
        phase=phase.astype(np.uint8),
        position=position.astype(np.int32),
    )


def make_device(
    env: Any,
    trace: Trace,
    system: System,
    slots: int,
    table: FakeTable | None = None,
    tier: HostTier | None = None,
    **known: Any,
) -> Device:
    """A device with `slots` expert slots per layer and detailed records."""
    table = table or FakeTable(trace.layers)
    popularity = trace.popularity() / np.maximum(trace.popularity().sum(axis=1, keepdims=True), 1)
    return Device(
        env,
        trace,
        table,  # type: ignore[arg-type]
        system,
        Slots((slots * table.size,) * trace.layers, scratch=max(2, trace.top_k)),
        Knowledge(popularity, **known),
        Records(detail=True),
        tier,
        seed=0,
    )
