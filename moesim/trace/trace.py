"""Trace: who asked when, and which experts each token chose at each layer. Facts only, never changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")
WEIGHT_ONE = 1 << 24  # gate weight 1 as an integer: every float16 weight is a whole number of these parts


@dataclass(frozen=True)
class TraceInfo:
    """What the routing belongs to and where it came from; travels in the file's metadata."""

    model: str
    experts: int  # routed experts per MoE layer
    top_k: int
    moe_layers: tuple[int, ...]  # layer numbers of the model, one per trace layer
    provenance: str = "real"  # real | synthetic
    id_space: str = "logical"  # logical experts, never physical replicas
    engine: str = ""  # what recorded it
    sampling: str = ""  # how tokens were chosen
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Requests:
    """One entry per request, in trace order."""

    request_id: tuple[str, ...]
    task: tuple[str, ...]  # "" where the trace has no task labels
    prompt_tokens: NDArray[np.int32]
    arrival_ns: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.request_id)


@dataclass(frozen=True, eq=False)
class Trace:
    """Rows are tokens, grouped by request and ordered by position within one.

    experts        int16   [tokens, layers, k], by rank: the router's first choice first; -1 where a rank is unused
    request        int32   [tokens], index into `requests`
    phase          uint8   [tokens], PREFILL or DECODE
    position       int32   [tokens], place of the token in its sequence
    weights        float16 [tokens, layers, k] or None: gate weight of each chosen expert
    probabilities  float16 [tokens, layers, experts] or None: the router's whole distribution
    """

    info: TraceInfo
    requests: Requests
    experts: NDArray[np.int16]
    request: NDArray[np.int32]
    phase: NDArray[np.uint8]
    position: NDArray[np.int32]
    weights: NDArray[np.float16] | None = None
    probabilities: NDArray[np.float16] | None = None
    content_hash: str = ""  # of the file it was read from

    @property
    def tokens(self) -> int:
        return self.experts.shape[0]

    @property
    def layers(self) -> int:
        return self.experts.shape[1]

    @property
    def top_k(self) -> int:
        return self.experts.shape[2]

    @cached_property
    def first_row(self) -> NDArray[np.int64]:
        """Row where each request starts, with the number of rows at the end: [requests + 1]."""
        return np.searchsorted(self.request, np.arange(len(self.requests) + 1)).astype(np.int64)

    @cached_property
    def decode_start(self) -> NDArray[np.int64]:
        """First decode row of each request (its end where it has none): [requests]."""
        prefill = np.bincount(self.request[self.phase == PREFILL], minlength=len(self.requests))
        return self.first_row[:-1] + prefill

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The task labels of its requests, sorted; ("",) where it has none."""
        return tuple(sorted(set(self.requests.task)))

    @cached_property
    def task_of_row(self) -> NDArray[np.int32]:
        """Index into `tasks` of each token's request: [tokens]."""
        number = {task: i for i, task in enumerate(self.tasks)}
        return np.array([number[task] for task in self.requests.task], dtype=np.int32)[self.request]

    def routed_weight(self, layer: int, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """Gate weight of each chosen expert in parts of 1 / WEIGHT_ONE, so that sums do not depend on their order.

        Equal shares of one where the trace has no weights; 0 at unused ranks: [rows, k].
        """
        used = self.experts[rows, layer] >= 0
        if self.weights is None:
            share = WEIGHT_ONE / np.maximum(used.sum(axis=1, keepdims=True), 1)
        else:
            share = self.weights[rows, layer].astype(np.float64) * WEIGHT_ONE
        return np.where(used, np.rint(share), 0).astype(np.int64)

    def popularity(self, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.int64]:
        """How often each expert was chosen: [layers, experts]."""
        chosen = self.experts[rows]
        out = np.empty((self.layers, self.info.experts), dtype=np.int64)
        for layer in range(self.layers):
            ids = chosen[:, layer].ravel()
            out[layer] = np.bincount(ids[ids >= 0], minlength=self.info.experts)
        return out
