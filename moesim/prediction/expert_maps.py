"""fMoE / FineMoE (arXiv 2502.05370): believe what followed the most similar gate maps of earlier iterations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError
from moesim.prediction.predictor import Beliefs
from moesim.trace import PREFILL, Trace

ROWS = 512  # searched at once, so that similarities stay in the processor's cache
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class ExpertMaps:
    """A store of at most `store` expert maps (a token's gate distributions, all layers), updated after each request.

    distance  d of the paper: the first d layers go by the semantic search when the step starts, layer l by the
              trajectory search over the layers up to l - d. Traces hold no embeddings, so the map of the token before
              stands in for a token's [inferred]; where nothing precedes it (prompts) the store's mean map is
              believed, trusted as far as the stored maps are like it.
    offline   the store holds the first 70 % of the requests, which get no beliefs themselves, and stays as it is.

    Experts are named in decreasing p until their sum reaches 1 - similarity, at least k of them (section 4.3). A full
    store overwrites the map most redundant to the new one, RDY = d/L cos(semantic) + (L-d)/L cos(maps) (section 4.4).
    Without the column `probabilities` maps hold the chosen experts only: their weights, or 1/k each.
    """

    needs: ClassVar[tuple[str, ...]] = ("gate probabilities (else the chosen experts)",)

    distance: int = 3
    store: int = 1000
    offline: bool = False

    def __post_init__(self) -> None:
        if self.distance < 1 or self.store < 1:
            raise PolicyError(f"expert maps: distance {self.distance} and store {self.store} must be at least 1")

    @property
    def provenance(self) -> str:
        return "learned"

    def notes(self, trace: Trace) -> tuple[str, ...]:
        found = ["expert maps: the map of the token before stands in for a token's embedding"]
        if trace.probabilities is None:
            found.append("expert maps hold the chosen experts only: the trace has no column 'probabilities'")
        return tuple(found)

    def predict(self, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
        shape = (trace.tokens, trace.layers, trace.info.experts)
        named = [np.full(shape, -1, dtype=np.int16) for _ in range(2)]
        maps = [np.zeros(shape, dtype=np.float16) for _ in range(2)]
        store = _Store(min(self.store, trace.tokens), min(self.distance, trace.layers), trace)
        learned = int(trace.first_row[int(0.7 * len(trace.requests))]) if self.offline else 0
        if learned:
            for rows in _blocks(0, learned):
                store.insert(rows)
        for first, last in zip(trace.first_row[:-1].tolist(), trace.first_row[1:].tolist(), strict=True):
            if first < learned:
                continue
            for rows in _blocks(first, last) if store.count else ():
                store.search(rows, *named, *maps)
            for rows in _blocks(first, last) if not self.offline else ():
                store.insert(rows)
        return (
            Beliefs(named[0], distance=0, map=maps[0]),
            Beliefs(named[1], distance=self.distance, map=maps[1]),
        )


def _blocks(first: int, last: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, last)) for start in range(first, last, ROWS))


def gate_maps(trace: Trace, rows: slice) -> Floats:
    """What the router said of each expert: [rows, layers, experts]; weights or 1/k of the chosen if that is all."""
    if trace.probabilities is not None:
        return trace.probabilities[rows].astype(np.float32)
    ids = trace.experts[rows].astype(np.int64)
    maps = np.zeros((*ids.shape[:2], trace.info.experts + 1), dtype=np.float32)  # the last column takes unused ranks
    weights = np.float32(1 / trace.top_k) if trace.weights is None else trace.weights[rows].astype(np.float32)
    np.put_along_axis(maps, np.where(ids < 0, trace.info.experts, ids), weights, axis=2)
    return maps[:, :, :-1]


class _Store:
    """Maps [count, layers, experts], their semantic keys of unit length, and the lengths of every prefix of layers."""

    def __init__(self, capacity: int, distance: int, trace: Trace) -> None:
        layers, experts = trace.layers, trace.info.experts
        self._trace, self._capacity, self._distance = trace, capacity, distance
        self._follows = np.zeros(trace.tokens, dtype=bool)  # decode rows know the token before them
        self._follows[1:] = (trace.request[1:] == trace.request[:-1]) & (trace.phase[1:] != PREFILL)
        self.count = 0
        self._maps = np.zeros((capacity, layers, experts), dtype=np.float32)
        self._keys = np.zeros((capacity, layers * experts), dtype=np.float32)
        self._lengths = np.ones((capacity, layers), dtype=np.float32)

    def _mean(self) -> tuple[Floats, float]:
        """The stored maps' mean [layers, experts] and its mean cosine with them; zeros before any is stored."""
        maps, lengths = self._maps[: max(self.count, 1)], self._lengths[: max(self.count, 1), -1]
        mean = maps.mean(axis=0)
        return mean, float((maps.reshape(len(maps), -1) @ _unit(mean.ravel()) / lengths).mean())

    def _semantic_keys(self, rows: slice) -> Floats:
        before = gate_maps(self._trace, slice(max(rows.start - 1, 0), rows.stop))
        keys = before[:-1] if rows.start else np.concatenate([before[:1], before[:-1]])
        keys[~self._follows[rows]] = self._mean()[0]
        return _unit(keys.reshape(len(keys), -1))

    def search(self, rows: slice, near: NDArray, far: NDArray, near_map: NDArray, far_map: NDArray) -> None:
        """Fill `rows` of names and maps: `near` by semantic search, `far` by trajectory."""
        stored, count, layers = self._maps[: self.count], self.count, self._trace.layers
        similar = self._semantic_keys(rows) @ self._keys[:count].T
        match = similar.argmax(axis=1)
        score = np.take_along_axis(similar, match[:, None], axis=1)[:, 0]
        believed = stored[match]
        alone = ~self._follows[rows]
        if alone.any():
            believed[alone], score[alone] = self._mean()
        near_map[rows] = believed
        for layer in range(self._distance):
            near[rows, layer] = _names(believed[:, layer], score, self._trace.top_k)
        maps = gate_maps(self._trace, rows)
        lengths = _prefix_lengths(maps)
        dots = np.zeros((len(maps), count), dtype=np.float32)
        for layer in range(self._distance, layers):
            seen = layer - self._distance
            dots += maps[:, seen] @ stored[:, seen].T
            similar = dots / self._lengths[:count, seen]
            match = similar.argmax(axis=1)
            score = np.take_along_axis(similar, match[:, None], axis=1)[:, 0] / lengths[:, seen]
            believed = stored[match, layer]
            far_map[rows, layer] = believed
            far[rows, layer] = _names(believed, score, self._trace.top_k)

    def insert(self, rows: slice) -> None:
        """Add the maps of `rows`, one after the other; each overwrites the most redundant where no place is left."""
        maps, keys = gate_maps(self._trace, rows), self._semantic_keys(rows)
        lengths = _prefix_lengths(maps)
        free = min(self._capacity - self.count, len(maps))
        self._put(np.arange(self.count, self.count + free), maps[:free], keys[:free], lengths[:free])
        self.count += free
        if free == len(maps):
            return
        maps, keys, lengths = maps[free:], keys[free:], lengths[free:]
        redundant = self._redundancy(maps, keys, lengths, self._maps, self._keys, self._lengths)
        among = self._redundancy(maps, keys, lengths, maps, keys, lengths)
        owner = np.full(self._capacity, -1)
        for new in range(len(maps)):
            place = redundant[new].argmax()
            owner[place] = new
            redundant[new + 1 :, place] = among[new + 1 :, new]
        places = np.flatnonzero(owner >= 0)
        kept = owner[places]
        self._put(places, maps[kept], keys[kept], lengths[kept])

    def _put(self, places: NDArray, maps: Floats, keys: Floats, lengths: Floats) -> None:
        self._maps[places], self._keys[places], self._lengths[places] = maps, keys, lengths

    def _redundancy(
        self, maps: Floats, keys: Floats, lengths: Floats, other_maps: Floats, other_keys: Floats, other_lengths: Floats
    ) -> Floats:
        """RDY of every new map against every other one."""
        share = self._distance / self._trace.layers
        whole = maps.reshape(len(maps), -1) @ other_maps.reshape(len(other_maps), -1).T
        whole /= lengths[:, -1:] * other_lengths[:, -1]
        return np.float32(share) * (keys @ other_keys.T) + np.float32(1 - share) * whole


def _unit(vectors: Floats) -> Floats:
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.maximum(length, np.float32(1e-12))


def _prefix_lengths(maps: Floats) -> Floats:
    """Euclidean length of the layers up to each one: [maps, layers]; never 0."""
    lengths = np.sqrt(np.cumsum(np.einsum("nle,nle->nl", maps, maps), axis=1))
    return np.maximum(lengths, np.float32(1e-12))


def _names(p: Floats, score: Floats, top_k: int) -> NDArray[np.int16]:
    """Experts in decreasing `p` [rows, experts] until they sum to 1 - score, at least k; then -1."""
    delta = np.clip(1 - score, 0, 1)[:, None]
    order = np.argsort(-p, axis=1, kind="stable").astype(np.int16)
    ranked = np.take_along_axis(p, order, axis=1)
    before = np.cumsum(ranked, axis=1) - ranked
    wanted = (before < delta) | (np.arange(p.shape[1]) < top_k)
    return np.where(wanted & (ranked > 0), order, np.int16(-1))
