"""MoE-Infinity (arXiv 2401.14361): believe the activation counts of the most similar earlier request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError
from moesim.prediction.predictor import Beliefs
from moesim.trace import Trace

ROWS = 512  # searched at once
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RequestCounts:
    """How often a request chose each expert, [layers, experts], against those of at most `store` earlier requests.

    Before each decode step the counts so far pick the stored request of highest cosine, averaged over layers; what it
    chose is believed of all layers, most often chosen first. A prompt's step comes before any count, so nothing is
    believed of it. Counts enter the store when their request ends; a full store loses the least often picked.
    The paper matches again after every layer; here once per step, as soon as the token before is known.
    """

    needs: ClassVar[tuple[str, ...]] = ("several requests",)

    store: int = 1000

    def __post_init__(self) -> None:
        if self.store < 1:
            raise PolicyError(f"request counts: store {self.store} must be at least 1")

    @property
    def provenance(self) -> str:
        return "learned"

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        shape = (trace.tokens, trace.layers, trace.info.experts)
        named, maps = np.full(shape, -1, dtype=np.int16), np.zeros(shape, dtype=np.float16)
        store = _Store(min(self.store, len(trace.requests)), *shape[1:])
        for request, first in enumerate(trace.first_row[:-1].tolist()):
            decode, last = int(trace.decode_start[request]), int(trace.first_row[request + 1])
            counts = trace.popularity(slice(first, decode)).astype(np.float32)
            for start in range(decode, last, ROWS):
                rows = slice(start, min(start + ROWS, last))
                chosen = _chosen(trace, rows)
                running = np.cumsum(chosen, axis=0)
                if store.count:
                    named[rows], maps[rows] = store.match(counts + running - chosen)
                counts = counts + running[-1]
            store.insert(counts)
        return (Beliefs(named, distance=0, map=maps),)


class _Store:
    """Count matrices of past requests: as unit vectors per layer, as shares, and as experts in decreasing order."""

    def __init__(self, capacity: int, layers: int, experts: int) -> None:
        self.count = 0
        self._units = np.zeros((capacity, layers * experts), dtype=np.float32)
        self._shares = np.zeros((capacity, layers, experts), dtype=np.float16)
        self._order = np.zeros((capacity, layers, experts), dtype=np.int16)
        self._picked = np.zeros(capacity, dtype=np.int64)

    def match(self, counts: Floats) -> tuple[NDArray[np.int16], NDArray[np.float16]]:
        """(experts named, their shares) for the `counts` so far, [rows, layers, experts]; nothing where all are 0."""
        known = counts.reshape(len(counts), -1).any(axis=1)
        best = (_unit_layers(counts) @ self._units[: self.count].T).argmax(axis=1)
        self._picked += np.bincount(best[known], minlength=len(self._picked))
        named, shares = self._order[best], self._shares[best]
        named[~known], shares[~known] = -1, 0
        return named, shares

    def insert(self, counts: Floats) -> None:
        """Remember a request; a full store forgets the one picked least often, the oldest place of equals."""
        place = self.count if self.count < len(self._units) else int(self._picked.argmin())
        self.count = max(self.count, place + 1)
        order = np.argsort(-counts, axis=1, kind="stable")
        self._order[place] = np.where(np.take_along_axis(counts, order, axis=1) > 0, order, -1)
        self._shares[place] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        self._units[place], self._picked[place] = _unit_layers(counts[None])[0], 0


def _chosen(trace: Trace, rows: slice) -> Floats:
    """1 where a token chose an expert: [rows, layers, experts]."""
    ids = trace.experts[rows].astype(np.int64)
    out = np.zeros((*ids.shape[:2], trace.info.experts + 1), dtype=np.float32)  # the last column takes unused ranks
    np.put_along_axis(out, np.where(ids < 0, trace.info.experts, ids), 1, axis=2)
    return out[:, :, :-1]


def _unit_layers(counts: Floats) -> Floats:
    """Every layer scaled to length 1, so that one product of the flat vectors sums the cosines of all layers."""
    lengths = np.linalg.norm(counts, axis=2, keepdims=True)
    lengths[lengths == 0] = 1
    return (counts / lengths).reshape(len(counts), -1)
