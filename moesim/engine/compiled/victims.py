"""Slots, compiled: scores, and who leaves a pool. The same arithmetic in the same order as moesim.engine.cache."""

from __future__ import annotations

import numpy as np

from moesim.engine.compiled.jit import inner
from moesim.engine.compiled.state import (
    ABSENT,
    AFTER,
    BEFORE,
    BROUGHT,
    BROUGHT_IN,
    BUSY,
    BYTES,
    CHANGING,
    EVICTIONS,
    EXPERTS,
    F_BELADY,
    F_COUNT,
    F_FIFO,
    F_FREQUENCY,
    F_HIGH,
    F_HOT,
    F_LFU,
    F_LRU,
    F_NEAR,
    F_PLAN,
    F_PROB,
    F_RANDOM,
    F_RECENCY,
    GUARD,
    HIGH_USES,
    HORIZON,
    KEPT,
    LANDED,
    LAST_STEP,
    LAST_USE,
    LAYERS,
    LISTED,
    MEMBER,
    NEXT_USE,
    NONE,
    PINNED,
    POSITION,
    PRODUCT,
    S_EXPERT,
    S_LAYER,
    S_POOL,
    S_REAL,
    S_SIZE,
    SEED,
    SEQUENCE_STEPS,
    TERMS,
    USES,
)  # fmt: skip

NO_GUARD = 1 << 62
# Columns of `pool`: bytes, bytes used, its experts; items of its heap, or its list: first, last, and who
# came last.
CAPACITY, USED, MEMBERS, ITEMS, HEAD, TAIL, FINGER = range(7)
O_PLACE, O_LAST_USE, O_BROUGHT = range(3)  # columns of `offered`: place in the heap or NONE, and what was true then
OUT = -2  # value of BEFORE: in no list


@inner
def static(s, key, what):
    return np.int64(s.static[key, what])


@inner
def bytes_of(s, key):
    return s.size[s.static[key, S_SIZE]]


@inner
def key_hash(seed, draw, key):
    """splitmix64 of (seed, draw, key), its upper 53 bits."""
    z = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(draw) * np.uint64(0xBF58476D1CE4E5B9)
    z += np.uint64(key) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) >> np.uint64(11)


@inner
def feature(s, which, key):
    e, g = s.entry[key], s.g
    layer, expert = static(s, key, S_LAYER), static(s, key, S_REAL)
    if which == F_LRU:
        return float(e[LAST_USE])
    if which == F_LFU:
        return float(e[USES])
    if which == F_COUNT:
        return float(s.totals[layer, expert])
    if which == F_FIFO:
        return float(e[BROUGHT])
    if which == F_HOT:
        return s.popularity[layer, expert]
    if which == F_BELADY:
        horizon = s.choice[HORIZON]
        if horizon and e[NEXT_USE] - g[POSITION] > horizon:
            return float(-NO_GUARD)
        return float(-e[NEXT_USE])
    if which == F_PLAN:
        return s.plan[key]
    if which == F_RANDOM:
        return float(key_hash(s.choice[SEED], g[POSITION], layer * s.choice[EXPERTS] + static(s, key, S_EXPERT)))
    steps = float(max(g[SEQUENCE_STEPS], 1))
    if which == F_RECENCY:
        return e[LAST_STEP] / steps
    if which == F_FREQUENCY:
        return e[USES] / steps
    if which == F_HIGH:
        return e[HIGH_USES] / steps
    if which == F_NEAR:
        layers = s.choice[LAYERS]
        return 1 - ((layer - g[POSITION]) % layers) / layers
    if which == F_PROB:
        return s.belief[layer, expert] if s.has_belief[layer] else 0.0
    return 0.0


@inner
def score(s, key):
    terms = s.choice[TERMS]
    if terms == 1 and s.weight[0] == 1.0:
        return feature(s, s.feature[0], key)
    if s.choice[PRODUCT]:
        total = 1.0
        for i in range(terms):
            total *= feature(s, s.feature[i], key) ** s.weight[i]
        return total
    total = 0.0
    for i in range(terms):
        total += s.weight[i] * feature(s, s.feature[i], key)
    return total


@inner
def _before(s, a, b):
    """Whether the expert of key a leaves before that of key b; both stand in one heap."""
    if s.offered_score[a] != s.offered_score[b]:
        return s.offered_score[a] < s.offered_score[b]
    if s.offered[a, O_LAST_USE] != s.offered[b, O_LAST_USE]:
        return s.offered[a, O_LAST_USE] < s.offered[b, O_LAST_USE]
    return a < b


@inner
def _sift_up(s, p, i, key):
    """Put `key` where it belongs, from place i up."""
    heap = s.heap[p]
    while i > 0:
        up = (i - 1) >> 1
        if not _before(s, key, heap[up]):
            break
        heap[i] = heap[up]
        s.offered[heap[i], O_PLACE] = i
        i = up
    heap[i] = key
    s.offered[key, O_PLACE] = i


@inner
def _sift_down(s, p, i, key):
    """Put `key` where it belongs, from place i down."""
    heap, items = s.heap[p], s.pool[p, ITEMS]
    while True:
        child = 2 * i + 1
        if child >= items:
            break
        if child + 1 < items and _before(s, heap[child + 1], heap[child]):
            child += 1
        if not _before(s, heap[child], key):
            break
        heap[i] = heap[child]
        s.offered[heap[i], O_PLACE] = i
        i = child
    heap[i] = key
    s.offered[key, O_PLACE] = i


@inner
def _pop(s, p):
    """Take the first out of the heap."""
    heap = s.heap[p]
    s.offered[heap[0], O_PLACE] = NONE
    s.pool[p, ITEMS] -= 1
    if s.pool[p, ITEMS]:
        _sift_down(s, p, 0, heap[s.pool[p, ITEMS]])


@inner
def _offer(s, p, key):
    """Into the heap with its present score, or to its new place."""
    e, o = s.entry[key], s.offered[key]
    worth = score(s, key)
    place = o[O_PLACE]
    if place == NONE:
        place = s.pool[p, ITEMS]
        s.pool[p, ITEMS] += 1
        s.offered_score[key], o[O_LAST_USE], o[O_BROUGHT] = worth, e[LAST_USE], e[BROUGHT]
        _sift_up(s, p, place, key)
        return
    s.offered_score[key], o[O_LAST_USE], o[O_BROUGHT] = worth, e[LAST_USE], e[BROUGHT]
    _sift_up(s, p, place, key)
    _sift_down(s, p, o[O_PLACE], key)


# Where the score is the last use, those evictable stand in a list in that order, then by key. They come in by and large
# in order, so the place of a newcomer is looked for from the end, or from where the one before went.


@inner
def _later(s, a, b):
    """Whether the expert of key a leaves after that of key b."""
    x, y = s.entry[a, LAST_USE], s.entry[b, LAST_USE]
    return x > y or (x == y and a > b)


@inner
def _enlist(s, p, key):
    pool = s.pool[p]
    before, after = pool[TAIL], NONE
    if before != NONE and _later(s, before, key):
        if pool[FINGER] != NONE:
            before = pool[FINGER]
        while before != NONE and _later(s, before, key):
            before = s.entry[before, BEFORE]
        after = pool[HEAD] if before == NONE else s.entry[before, AFTER]
        while after != NONE and not _later(s, after, key):
            before, after = after, s.entry[after, AFTER]
    e = s.entry[key]
    e[BEFORE], e[AFTER] = before, after
    if before == NONE:
        pool[HEAD] = key
    else:
        s.entry[before, AFTER] = key
    if after == NONE:
        pool[TAIL] = key
    else:
        s.entry[after, BEFORE] = key
    pool[FINGER] = key


@inner
def unlist(s, key):
    """Out of the list, if it is in there."""
    e = s.entry[key]
    before, after = e[BEFORE], e[AFTER]
    if before == OUT:
        return
    pool = s.pool[s.static[key, S_POOL]]
    if before == NONE:
        pool[HEAD] = after
    else:
        s.entry[before, AFTER] = after
    if after == NONE:
        pool[TAIL] = before
    else:
        s.entry[after, BEFORE] = before
    if pool[FINGER] == key:
        pool[FINGER] = before
    e[BEFORE] = OUT


@inner
def _oldest(s, p, position):
    """The first of the list that is not guarded."""
    key = s.pool[p, HEAD]
    while key != NONE and s.entry[key, GUARD] > position:
        key = s.entry[key, AFTER]
    return key


@inner
def rebuild(s, p):
    """Score every evictable expert anew."""
    if s.choice[CHANGING] or s.choice[LISTED]:
        return
    for i in range(s.pool[p, ITEMS]):
        s.offered[s.heap[p, i], O_PLACE] = NONE
    s.pool[p, ITEMS] = 0
    for i in range(s.pool[p, MEMBERS]):
        key = s.member[p, i]
        e = s.entry[key]
        if s.held[key] == LANDED and not e[BUSY] and e[KEPT] != PINNED:
            _offer(s, p, key)


@inner
def offer(s, key):
    """The expert has become evictable."""
    e = s.entry[key]
    if s.choice[CHANGING] or e[KEPT] == PINNED:
        return
    if s.choice[LISTED]:
        _enlist(s, static(s, key, S_POOL), key)
    else:
        _offer(s, static(s, key, S_POOL), key)


@inner
def add(s, p, key):
    e = s.entry[key]
    place = s.pool[p, MEMBERS]
    s.member[p, place] = key
    e[MEMBER] = place
    s.pool[p, MEMBERS] = place + 1
    s.pool[p, USED] += e[BYTES]


@inner
def remove(s, p, key):
    e = s.entry[key]
    last = s.pool[p, MEMBERS] - 1
    moved = s.member[p, last]
    s.member[p, e[MEMBER]] = moved
    s.entry[moved, MEMBER] = e[MEMBER]
    s.pool[p, MEMBERS] = last
    s.pool[p, USED] -= e[BYTES]


@inner
def victim(s, p, guarded):
    """The evictable expert of the lowest score, or NONE. guarded: predicted ones too."""
    position = NO_GUARD if guarded else s.g[POSITION]
    if s.choice[LISTED]:
        return _oldest(s, p, position)
    if s.choice[CHANGING]:
        return _lowest(s, p, position)
    return _top(s, p, position)


@inner
def _lowest(s, p, position):
    best, best_score, best_use = NONE, 0.0, 0
    for i in range(s.pool[p, MEMBERS]):
        key = s.member[p, i]
        e = s.entry[key]
        if s.held[key] != LANDED or e[BUSY] or e[KEPT] == PINNED or e[GUARD] > position:
            continue
        value, use = score(s, key), e[LAST_USE]
        if best != NONE:
            if value > best_score:
                continue
            if value == best_score and (use > best_use or (use == best_use and key > best)):
                continue
        best, best_score, best_use = key, value, use
    return best


@inner
def _fresh(s, key):
    """Whether the heap still tells the truth of an expert: it is evictable, and was not touched since."""
    e, o = s.entry[key], s.offered[key]
    return s.held[key] == LANDED and not e[BUSY] and e[BROUGHT] == o[O_BROUGHT] and e[LAST_USE] == o[O_LAST_USE]


@inner
def _top(s, p, position):
    """Guarded experts are set aside, at the end of the heap's memory, and put back."""
    heap = s.heap[p]
    found, aside, end = NONE, 0, heap.shape[0] - 1
    while s.pool[p, ITEMS] > 0:
        key = heap[0]
        if _fresh(s, key):
            if s.entry[key, GUARD] <= position:
                found = key
                break
            heap[end - aside] = key
            aside += 1
        _pop(s, p)
    for i in range(aside):
        place = s.pool[p, ITEMS]
        s.pool[p, ITEMS] = place + 1
        _sift_up(s, p, place, heap[end - i])
    return found


@inner
def take_order(s):
    """The next number in the order of arrival."""
    order = s.g[BROUGHT_IN]
    s.g[BROUGHT_IN] += 1
    return order


@inner
def forget(s, key):
    """The expert gives its place up."""
    layer = static(s, key, S_LAYER)
    if s.held[key] == LANDED:
        s.landed[layer] -= 1
    s.here[layer] -= 1
    s.held[key] = ABSENT


@inner
def leave(s, key):
    """The expert is evicted from its pool."""
    if s.choice[LISTED]:
        unlist(s, key)
    remove(s, static(s, key, S_POOL), key)
    forget(s, key)
    s.g[EVICTIONS] += 1
