"""How routing looks back: reuse within a request, stack distances and the LRU curves they give."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.trace.miss_ratio import curve_of, events

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ids = NDArray[np.int16]

WINDOWS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, eq=False)
class Reuse:
    """How soon a request chooses an expert again, per layer."""

    within: dict[int, Floats]  # share of a token's experts that its request used in the previous 1, 2, 4, .. tokens
    chance: dict[int, Floats]  # the same for independent tokens of the layer's popularity
    same_request: Floats  # next-token reuse if each request's tokens stood in random order


@dataclass(frozen=True, eq=False)
class Lru:
    """LRU caches of every size at once, each layer a cache of its own; ratios are of choices, cold misses included."""

    capacities: Ints  # top_k .. experts: the sizes for which the curve is exact
    miss_ratio: Floats  # [layers, capacities]
    belady: Floats  # [layers, capacities]: a cache that knows the future, so the least that any can miss
    shared: Floats  # [capacities]: LRU again, in one cache for all layers of capacities x layers experts
    static: Floats  # [layers, capacities]: the best fixed set of that size, chosen in hindsight
    random: Floats  # [capacities]: a random fixed set
    distances: Ints  # [layers, experts + 1]: choices by distinct experts since the last use; the last: first uses


@dataclass(frozen=True, eq=False)
class History:
    """What the choices of a trace look back on, by task where tasks are asked about."""

    within: dict[int, Floats]  # as in Reuse
    distances: Ints  # [tasks, layers, experts + 1], as in Lru
    next_token: Floats  # [tasks] next-token reuse


def look_back(ids: Ids, request: Ints, experts: int, task: Ints) -> History:
    """One pass over tokens in the order of a batch of one; ids [tokens, layers, k], request and task [tokens]."""
    layers, tasks = ids.shape[1], int(task.max()) + 1
    place = place_in_request(request)
    distances = np.zeros((tasks, layers, experts + 1), dtype=np.int64)
    within = {w: np.full(layers, np.nan) for w in WINDOWS}
    next_token = np.zeros((2, tasks))
    for layer in range(layers):
        chosen = ids[:, layer]
        used, gap = chosen >= 0, token_gaps(chosen)
        code = (task[:, None] * (experts + 1) + stack_distances(chosen, experts))[used]
        distances[:, layer] = np.bincount(code, minlength=tasks * (experts + 1)).reshape(tasks, -1)
        for w in WINDOWS:
            far = place >= w  # only tokens with w predecessors in their own request
            if used[far].any():
                within[w][layer] = (gap[far] <= w)[used[far]].mean()
        far = place >= 1
        for row, mask in enumerate((used & (gap <= 1), used)):
            next_token[row] += np.bincount(task[far], mask[far].sum(1), tasks)
    return History(within, distances, ratio(next_token[0], next_token[1]))


def place_in_request(request: Ints) -> Ints:
    """How many rows of the same request come before each row; a request's rows are contiguous."""
    row = np.arange(request.size)
    starts = np.r_[True, request[1:] != request[:-1]]
    return row - np.maximum.accumulate(np.where(starts, row, 0))


def token_gaps(ids: Ids) -> Ints:
    """Tokens since the last use of each chosen expert of one layer, [tokens, k]; tokens + 1 where there is none.

    Requests are not told apart: a gap longer than the token's place in its request reaches into another one.
    """
    tokens, k = ids.shape
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    again = flat[order[1:]] == flat[order[:-1]]
    gap = np.full(flat.size, tokens + 1)
    gap[order[1:][again]] = (np.diff(order // k))[again]
    return gap.reshape(tokens, k)


def stack_distances(ids: Ids, experts: int) -> Ints:
    """Distinct experts of one layer touched since the last use of each chosen one, [tokens, k]; first uses: `experts`.

    A token is one event, so they are counted before it: a cache of at least k slots hits exactly the choices whose
    distance is below its size (moesim.trace.miss_ratio). Unused ranks (-1) get a meaningless value.
    """
    from moesim.trace.stacks import lru_depths

    blocks, offsets = events(ids, np.ones(len(ids), dtype=np.int64), experts)
    distance = np.full(ids.shape, experts, dtype=np.int64)
    distance[ids >= 0] = lru_depths(blocks, offsets, experts)
    return distance


def chance_reuse(counts: Ints, tokens: int) -> dict[int, Floats]:
    """Reuse within w tokens if tokens chose independently: 1 - sum_e share_e (1 - q_e)^w, q_e = P(a token uses e)."""
    share, q = counts / counts.sum(1, keepdims=True), counts / tokens
    return {w: 1 - (share * (1 - q) ** w).sum(1) for w in WINDOWS}


def same_request_reuse(ids: Ids, request: Ints, experts: int) -> Floats:
    """Chance that another token of the same request, drawn at random, uses an expert of this one: [layers]."""
    size = np.bincount(request)
    out = np.full(ids.shape[1], np.nan)
    if size.max() < 2:
        return out
    for layer in range(ids.shape[1]):
        counts = request_counts(ids[:, layer], request, experts)[size > 1]
        others = size[size > 1, None] - 1
        out[layer] = (counts * (counts - 1) / others).sum() / counts.sum()
    return out


def request_counts(ids: Ids, request: Ints, experts: int) -> Ints:
    """Choices of one layer [tokens, k] counted by request [tokens], numbered from 0: [requests, experts]."""
    rows = int(request.max()) + 1
    code = (request[:, None] * experts + ids)[ids >= 0]
    return np.bincount(code, minlength=rows * experts).reshape(rows, experts)


def lru_curves(distances: Ints, counts: Ints, ids: Ids) -> Lru:
    """Miss ratios of all cache sizes from the stack distances [layers, experts + 1], choices [layers, experts] and
    ids [tokens, layers, k]."""
    tokens, layers, top_k = ids.shape
    experts = counts.shape[1]
    capacities = np.arange(top_k, experts + 1)
    total = counts.sum(1, keepdims=True)
    hits = np.cumsum(distances, axis=1)[:, capacities - 1]
    static = np.cumsum(np.sort(counts, axis=1)[:, ::-1], axis=1)[:, capacities - 1]
    alone = np.ones(tokens, dtype=np.int64)
    return Lru(
        capacities=capacities,
        miss_ratio=1 - hits / total,
        belady=curve_of(ids, alone, experts, "belady", "layer", capacities).ratio,
        shared=curve_of(ids, alone, experts, "lru", "global", layers * capacities).ratio[0],
        static=1 - static / total,
        random=1 - capacities / experts,
        distances=distances,
    )


def ratio(part: NDArray, whole: NDArray) -> Floats:
    """part / whole, nan where there is nothing to divide by."""
    whole = np.broadcast_to(whole, np.shape(part))
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=whole > 0)
