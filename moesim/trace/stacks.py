"""The loops behind moesim.trace.miss_ratio, compiled on first use. Import this module only where it is called.

blocks int32 [lookups]: what is looked up; offsets int64 [events + 1]: an event's blocks are blocks[offsets[i] :
offsets[i + 1]], all different. n: blocks are 0 .. n - 1.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numba import njit

NEVER = np.int64(1) << 60
LRU, COUNT, OPT = 0, 1, 2


@njit(cache=True)
def unique_events(ids, starts, n):
    """(blocks, offsets) of events that are rows starts[i] : starts[i + 1] of ids [rows, k]: distinct ids in order of
    first appearance; -1 is none."""
    blocks = np.empty(ids.size, dtype=np.int32)
    offsets = np.zeros(starts.size, dtype=np.int64)
    seen = np.full(n, -1, dtype=np.int64)
    count = 0
    for event in range(starts.size - 1):
        for row in range(starts[event], starts[event + 1]):
            for rank in range(ids.shape[1]):
                e = ids[row, rank]
                if e >= 0 and seen[e] != event:
                    seen[e] = event
                    blocks[count] = e
                    count += 1
        offsets[event + 1] = count
    return blocks[:count].copy(), offsets


@njit(cache=True)
def _add(tree, at, change):
    at += 1
    while at < tree.size:
        tree[at] += change
        at += at & -at


@njit(cache=True)
def _before(tree, at):
    """Sum of what was added at places below `at`."""
    total = 0
    while at > 0:
        total += tree[at]
        at -= at & -at
    return total


@njit(cache=True)
def lru_depths(blocks, offsets, n):
    """Distinct blocks touched since the last use of each block, counted before its event; n for a first use.

    A Fenwick tree over time marks each block's last touch; time is renumbered when the tree is full, so memory is
    O(n) whatever the length. O(log n) per lookup (Bennett and Kruskal 1975).
    """
    size = 4 * n + 64
    tree = np.zeros(size + 1, dtype=np.int32)
    last = np.full(n, -1, dtype=np.int64)
    at = np.full(size, -1, dtype=np.int32)  # block whose last touch is at a time
    depths = np.empty(blocks.size, dtype=np.int32)
    now = known = 0
    for event in range(offsets.size - 1):
        low, high = offsets[event], offsets[event + 1]
        for i in range(low, high):
            seen = last[blocks[i]]
            depths[i] = n if seen < 0 else known - _before(tree, seen + 1)
        if now + high - low > size:
            tree[:] = 0
            kept = 0
            for time in range(now):
                b = at[time]
                if b >= 0:
                    at[time] = -1
                    at[kept], last[b] = b, kept
                    _add(tree, kept, 1)
                    kept += 1
            now = kept
        for i in range(low, high):
            b = blocks[i]
            if last[b] >= 0:
                _add(tree, last[b], -1)
                at[last[b]] = -1
            else:
                known += 1
            last[b], at[now] = now, b
            _add(tree, now, 1)
            now += 1
    return depths


@njit(cache=True)
def next_events(blocks, offsets, n):
    """The event in which each looked-up block is looked up next; NEVER where there is none."""
    following = np.full(n, NEVER, dtype=np.int64)
    out = np.empty(blocks.size, dtype=np.int64)
    for event in range(offsets.size - 2, -1, -1):
        for i in range(offsets[event], offsets[event + 1]):
            out[i] = following[blocks[i]]
            following[blocks[i]] = event
    return out


@njit(cache=True)
def _touch(policy, block, lookup, following, score, last):
    """What keeping a block is worth after its lookup: larger (score, last) stays longer."""
    last[block] = lookup
    score[block] = lookup if policy == LRU else score[block] + 1 if policy == COUNT else -following[lookup]


@njit(cache=True)
def priority_depths(blocks, offsets, n, policy, following):
    """Lookups by place in the priority stack before their event, [n + 1]; the last counts first uses.

    The stack's first C places are what a cache of C blocks holds. An event's blocks come to the top; going down, each
    place below takes the block of the highest priority among those displaced so far and the one that was there (Mattson
    et al. 1970, section on priority lists, with an event of several blocks in the place of one reference).
    """
    stack = np.empty(n, dtype=np.int32)
    place = np.full(n, -1, dtype=np.int64)
    own = np.full(n, -1, dtype=np.int64)  # the event a block was last part of
    score, last = np.zeros(n, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    found = np.zeros(n + 1, dtype=np.int64)
    displaced = np.empty(n, dtype=np.int32)
    size = 0
    for event in range(offsets.size - 1):
        low, high = offsets[event], offsets[event + 1]
        wide = high - low
        absent = wide  # blocks of the event not met yet on the way down
        for i in range(low, high):
            b = blocks[i]
            own[b] = event
            found[n if place[b] < 0 else place[b]] += 1
        held = down = 0
        while down < size and absent > 0:
            b = stack[down]
            if own[b] == event:
                absent -= 1
            else:
                displaced[held] = b
                held += 1
            if down >= wide:
                held = _settle(displaced, held, stack, place, down, score, last)
            down += 1
        grown = size + absent
        for spot in range(max(size, wide), grown):  # blocks never seen push the rest further down
            held = _settle(displaced, held, stack, place, spot, score, last)
        size = grown
        for i in range(low, high):
            stack[i - low], place[blocks[i]] = blocks[i], i - low
            _touch(policy, blocks[i], i, following, score, last)
    return found


@njit(cache=True)
def _settle(displaced, held, stack, place, spot, score, last):
    """Move the displaced block of the highest priority to `spot`; the number still displaced."""
    best = 0
    for j in range(1, held):
        a, b = displaced[j], displaced[best]
        if score[a] > score[b] or (score[a] == score[b] and last[a] > last[b]):
            best = j
    b = displaced[best]
    stack[spot], place[b] = b, spot
    displaced[best] = displaced[held - 1]
    return held - 1


@njit(cache=True)
def replay(blocks, offsets, n, policy, following, capacity):
    """Misses of one cache of `capacity` blocks by the rule in moesim.trace.miss_ratio, event by event."""
    resident = np.zeros(n, dtype=np.bool_)
    score, last = np.zeros(n, dtype=np.int64), np.full(n, -1, dtype=np.int64)
    heap = [(np.int64(0), np.int64(-1), np.int32(0))]  # of what may leave; an entry that is outdated is skipped
    heappop(heap)
    missed = held = 0
    for event in range(offsets.size - 1):
        low, high = offsets[event], offsets[event + 1]
        brought = 0
        for i in range(low, high):
            brought += not resident[blocks[i]]
        missed += brought
        if high - low > capacity:
            held = _overflow(blocks, low, high, resident, capacity)
        for i in range(low, high):
            _touch(policy, blocks[i], i, following, score, last)
        if high - low <= capacity:
            held += brought
            while held > capacity:
                _, when, b = heappop(heap)
                if resident[b] and last[b] == when:
                    resident[b] = False
                    held -= 1
            for i in range(low, high):
                resident[blocks[i]] = True
        for i in range(low, high):
            b = blocks[i]
            if resident[b]:
                heappush(heap, (score[b], last[b], b))
    return missed


@njit(cache=True)
def _overflow(blocks, low, high, resident, capacity):
    """An event too wide for the cache leaves what was computed last: hits go first, then misses as they arrive."""
    kept = 0
    hits = np.empty(high - low, dtype=np.bool_)
    for i in range(low, high):
        hits[i - low] = resident[blocks[i]]
    resident[:] = False
    for hit in (False, True):
        for i in range(high - 1, low - 1, -1):
            if hits[i - low] == hit and kept < capacity:
                resident[blocks[i]] = True
                kept += 1
    return kept
