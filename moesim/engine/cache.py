"""Expert slots: what is resident, and who leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush

from moesim.engine.own import Score, own_eviction
from moesim.policies import Eviction

_MASK = (1 << 64) - 1
NO_GUARD = 1 << 62  # later than every guard


class Entry:
    """An expert that holds a slot: on its way (`landed` False), in use (`busy`) or evictable."""

    __slots__ = (
        "brought", "busy", "bytes", "expert", "guard", "high_uses", "keep", "key", "landed", "last_step", "last_use",
        "layer", "next_use", "pinned", "plan", "prefetched", "read_end", "tokens", "uses",
    )  # fmt: skip

    def __init__(
        self, layer: int, expert: int, nbytes: int, brought: int, key: int,
        *, keep: bool = True, plan: float = 0.0, prefetched: bool = False, last_use: int = -1, next_use: int = 1 << 60,
    ) -> None:  # fmt: skip
        self.layer, self.expert, self.bytes, self.brought, self.key = layer, expert, nbytes, brought, key
        self.keep, self.plan, self.prefetched = keep, plan, prefetched
        self.last_use, self.next_use, self.read_end = last_use, next_use, -1
        self.landed = self.busy = self.pinned = False
        self.uses = self.high_uses = self.tokens = self.last_step = 0
        self.guard = -1  # position until which it is pinned because a prediction names it


def _hash(seed: int, draw: int, key: int) -> int:
    """The upper 53 bits of splitmix64 of (seed, draw, key): a random order that any engine can repeat."""
    z = (seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9 + key * 0x94D049BB133111EB) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 11


class Now:
    """What changing features refer to: where the device is, and what it believes."""

    def __init__(self, layers: int) -> None:
        self.position = -1  # step x layers + layer of the last router decision
        self.layers = layers
        self.sequence_steps = 0  # steps since the last request was admitted
        self.beliefs: dict[int, list[float]] = {}  # probabilities by layer


Pick = Callable[[list[Entry]], Entry]


class Pool:
    """One memory budget in bytes: a layer's, or all layers'.

    Where scores change only when an expert is touched, a heap holds (score, last use, key, arrival, entry) of
    evictable experts.
    A touch makes an item stale instead of searching for it; stale ones are skipped, and swept out when they outnumber
    the live. Scores that change by themselves are computed for every victim. pick: chooses in place of a score.
    """

    def __init__(self, capacity: int, score: Score, changing: bool, now: Now, pick: Pick | None = None) -> None:
        self.capacity, self.used = capacity, 0
        self.entries: dict[int, Entry] = {}
        self._score, self._changing, self._now, self._pick = score, changing, now, pick
        self._heap: list[tuple[float, int, int, int, Entry]] = []

    def add(self, entry: Entry) -> None:
        self.entries[entry.key] = entry
        self.used += entry.bytes

    def remove(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self.used -= entry.bytes

    def offer(self, entry: Entry) -> None:
        """`entry` has become evictable."""
        if self._changing or entry.pinned:
            return
        if len(self._heap) > 64 + 4 * len(self.entries):
            self.rebuild()
        heappush(self._heap, (self._score(entry), entry.last_use, entry.key, entry.brought, entry))

    def rebuild(self) -> None:
        """Score every evictable expert anew, after a plan changed or to sweep out stale items."""
        if not self._changing:
            free = [(k, e) for k, e in self.entries.items() if e.landed and not e.busy and not e.pinned]
            self._heap = [(self._score(e), e.last_use, key, e.brought, e) for key, e in free]
            heapify(self._heap)

    def victim(self, guarded: bool = False) -> Entry | None:
        """The evictable expert of the lowest score, or None; the caller removes it. guarded: predicted ones too."""
        position = NO_GUARD if guarded else self._now.position
        return self._lowest(position) if self._changing else self._top(position)

    def _lowest(self, position: int) -> Entry | None:
        free = [
            (self._score(e), e.last_use, key, e)
            for key, e in self.entries.items()
            if e.landed and not e.busy and not e.pinned and e.guard <= position
        ]
        if self._pick and free:
            return self._pick([item[3] for item in sorted(free)])
        return min(free)[3] if free else None

    def _top(self, position: int) -> Entry | None:
        heap, guarded = self._heap, []
        found = None
        while heap:
            _, last_use, key, _, entry = heap[0]
            if self.entries.get(key) is entry and entry.last_use == last_use and entry.landed and not entry.busy:
                if entry.guard <= position:
                    found = entry
                    break
                guarded.append(heap[0])
            heappop(heap)
        for item in guarded:
            heappush(heap, item)
        return found


def _within(horizon: int, now: Now) -> Score:
    """Next use as far as `horizon` positions reach; what is not needed by then is all alike."""
    return lambda e: -e.next_use if e.next_use - now.position <= horizon else -NO_GUARD


def scorer(
    eviction: Eviction, popularity: list[list[float]], totals: list[list[int]], now: Now, experts: int, seed: int
) -> tuple[Score, Pick | None]:
    """The score of an entry under `eviction`, as a function, larger is kept longer; and how a user's rule picks."""
    horizon = eviction.window * now.layers
    features: dict[str, Score] = {
        "lru": lambda e: e.last_use,
        "lfu": lambda e: e.uses,
        "count": lambda e: totals[e.layer][e.expert % experts],
        "fifo": lambda e: e.brought,
        "hot": lambda e: popularity[e.layer][e.expert % experts],
        "belady": (lambda e: -e.next_use) if not horizon else _within(horizon, now),
        "plan": lambda e: e.plan,
        "random": lambda e: _hash(seed, now.position, e.layer * experts + e.expert),
        "recency": lambda e: e.last_step / max(now.sequence_steps, 1),
        "frequency": lambda e: e.uses / max(now.sequence_steps, 1),
        "high": lambda e: e.high_uses / max(now.sequence_steps, 1),
        "near": lambda e: 1 - ((e.layer - now.position) % now.layers) / now.layers,
        "prob": lambda e: now.beliefs[e.layer][e.expert % experts] if e.layer in now.beliefs else 0.0,
    }
    if eviction.own is not None:
        return own_eviction(eviction.own, features, experts)
    return _combined(eviction, features), None


def _combined(eviction: Eviction, features: dict[str, Score]) -> Score:
    if len(eviction.score) == 1 and eviction.score[0][1] == 1:
        return features[eviction.score[0][0]]
    terms = [(features[name], weight) for name, weight in eviction.score]
    if eviction.combine == "product":
        return lambda e: math.prod(feature(e) ** weight for feature, weight in terms)
    return lambda e: sum(weight * feature(e) for feature, weight in terms)
