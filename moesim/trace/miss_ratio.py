"""Misses of expert caches of every size at once, for policies that obey Mattson's inclusion property.

The rule is the engine's for a cache filled on demand (no prefetch, no plan, no other user of its memory, all experts in
host memory). One event is one step at one layer: its distinct experts are looked up together against what the cache
held before; each missing one takes a free slot or the place of the expert of lowest priority that is not of the event;
then all are touched in order of first appearance. Priorities do not depend on the cache's size:

    lru     last touch
    count   lookups so far, kept across evictions (LFU without aging); the least recently used of equals leaves
    belady  next use, sooner is higher (OPT); the least recently used of equals leaves

So of two caches that both hold the widest event, the larger holds all that the smaller does, also after an event of
several experts, and one pass over a priority stack counts the misses of all of them (Mattson, Gecsei, Slutz, Traiger
1970). A cache narrower than an event keeps what was computed last, hits before misses, which is no such order: sizes
below the widest event are replayed one by one. Every size is exact. `lfu`, which forgets counts of evicted experts, and
`fifo` are no stack policies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError, nearest
from moesim.trace.trace import Trace

Ints = NDArray[np.int64]
POLICIES = ("lru", "count", "belady")
SCOPES = ("layer", "global")
_FEW = 8  # sizes that are quicker replayed one by one than in a pass over a priority stack


@dataclass(frozen=True, eq=False)
class MissCurve:
    """misses[p, i]: of pool p (a MoE layer, or all of them) with capacities[i] experts, out of lookups[p]."""

    capacities: Ints
    misses: Ints
    lookups: Ints

    @property
    def ratio(self) -> NDArray[np.float64]:
        """Share of lookups that miss: [pools, capacities]."""
        return self.misses / np.maximum(self.lookups, 1)[:, None]


def miss_curve(
    trace: Trace,
    policy: str = "lru",
    scope: str = "layer",
    steps: Sequence[NDArray[np.int64]] | None = None,
    capacities: Sequence[int] | Ints | None = None,
) -> MissCurve:
    """Misses at every capacity, or at those given, in experts per pool.

    steps: trace rows of each forward pass in service order, as `engine.simulate.served_steps` returns them; None: every
    row alone, in the trace's order. Raises PolicyError for an unknown policy or scope, or a capacity below 1.
    """
    if policy not in POLICIES:
        raise PolicyError(f"miss ratio of '{policy}': no stack policy{nearest(policy, POLICIES)}")
    if scope not in SCOPES:
        raise PolicyError(f"scope '{scope}' must be one of {', '.join(SCOPES)}")
    ids, sizes = trace.experts, np.ones(trace.tokens, dtype=np.int64)
    if steps is not None:
        ids, sizes = ids[np.concatenate(steps)], np.array([len(step) for step in steps])
    return curve_of(ids, sizes, trace.info.experts, policy, scope, capacities)


def curve_of(
    ids: NDArray[np.int16],
    sizes: Ints,
    experts: int,
    policy: str,
    scope: str,
    capacities: Sequence[int] | Ints | None = None,
) -> MissCurve:
    """As `miss_curve`, of ids [tokens, layers, k] in service order and the tokens of each step."""
    layers = ids.shape[1]
    if scope == "layer":
        pools = [events(ids[:, layer], sizes, experts) for layer in range(layers)]
    else:
        pools = [events(*_interleaved(ids, sizes, experts), layers * experts)]
    n = experts if scope == "layer" else layers * experts
    sought = np.arange(1, n + 1) if capacities is None else np.asarray(capacities, dtype=np.int64)
    if (sought < 1).any():
        raise PolicyError(f"capacity {sought.min()}: a cache holds at least 1 expert")
    found = np.stack([misses(blocks, offsets, n, policy, sought) for blocks, offsets in pools])
    return MissCurve(sought, found, np.array([len(blocks) for blocks, _ in pools]))


def events(ids: NDArray[np.integer], sizes: Ints, n: int) -> tuple[NDArray[np.int32], Ints]:
    """Distinct experts of each event and where each begins; ids [rows, k] below n, -1 for none; rows per event."""
    from moesim.trace.stacks import unique_events

    return unique_events(np.ascontiguousarray(ids, dtype=np.int32), np.r_[0, np.cumsum(sizes)], n)


def _interleaved(ids: NDArray[np.int16], sizes: Ints, experts: int) -> tuple[NDArray[np.int32], Ints]:
    """Rows [tokens x layers, k] as a step works through them, layer by layer, numbered over all layers; their sizes."""
    tokens, layers, k = ids.shape
    own = np.where(ids >= 0, ids + np.arange(0, layers * experts, experts, dtype=np.int32)[:, None], np.int32(-1))
    flat = own.reshape(tokens * layers, k)
    if (sizes > 1).any():
        step = np.repeat(np.arange(len(sizes)), sizes)
        flat = flat[np.lexsort((np.tile(np.arange(layers), tokens), np.repeat(step, layers)))]
    return flat, np.repeat(sizes, layers)


def misses(blocks: NDArray[np.int32], offsets: Ints, n: int, policy: str, capacities: Ints) -> Ints:
    """Misses of one pool at each capacity; blocks and offsets as `events` returns them."""
    from moesim.trace import stacks

    code = POLICIES.index(policy)
    following = stacks.next_events(blocks, offsets, n) if policy == "belady" else np.empty(0, dtype=np.int64)
    widest = int(np.diff(offsets).max(initial=0))
    stacked = capacities >= widest
    if policy != "lru" and len(capacities) <= _FEW:
        stacked = np.zeros_like(stacked)
    out = np.empty(len(capacities), dtype=np.int64)
    for i in np.flatnonzero(~stacked):
        out[i] = stacks.replay(blocks, offsets, n, code, following, int(capacities[i]))
    if stacked.any():
        if policy == "lru":
            found = np.bincount(stacks.lru_depths(blocks, offsets, n), minlength=n + 1)
        else:
            found = stacks.priority_depths(blocks, offsets, n, code, following)
        hits = np.cumsum(found[:n])
        out[stacked] = len(blocks) - hits[np.minimum(capacities[stacked], n) - 1]
    return out
