"""Expert slots: what is resident, and who leaves."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush

from moesim.policies import Eviction

_MASK = (1 << 64) - 1


class Entry:
    """An expert that holds a slot: on its way (`landed` False), in use (`busy`) or evictable."""

    __slots__ = (
        "brought", "busy", "bytes", "expert", "keep", "landed", "last_use", "layer", "next_use", "pinned", "plan",
        "prefetched", "read_end", "tokens", "uses",
    )  # fmt: skip

    def __init__(
        self, layer: int, expert: int, nbytes: int, brought: int,
        *, keep: bool = True, plan: float = 0.0, prefetched: bool = False, last_use: int = -1, next_use: int = 1 << 60,
    ) -> None:  # fmt: skip
        self.layer, self.expert, self.bytes, self.brought = layer, expert, nbytes, brought
        self.keep, self.plan, self.prefetched = keep, plan, prefetched
        self.last_use, self.next_use, self.read_end = last_use, next_use, -1
        self.landed = self.busy = self.pinned = False
        self.uses = self.tokens = 0


def _hash(seed: int, draw: int, key: int) -> int:
    """splitmix64 of (seed, draw, key): a random order that any engine can repeat."""
    z = (seed * 0x9E3779B97F4A7C15 + draw * 0xBF58476D1CE4E5B9 + key * 0x94D049BB133111EB) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class Pool:
    """One memory budget in bytes: a layer's, or all layers'.

    The heap holds (score, last use, key, entry) of evictable experts. A touch makes an item stale instead of
    searching for it; stale ones are skipped, and swept out when they outnumber the live.
    """

    def __init__(self, capacity: int, score: Callable[[Entry], float] | None, seed: int, experts: int) -> None:
        self.capacity, self.used = capacity, 0
        self.entries: dict[int, Entry] = {}
        self._score = score  # None: the random order, drawn anew for every victim
        self._seed, self._draws, self._experts = seed, 0, experts
        self._heap: list[tuple[float, int, int, Entry]] = []

    def key(self, entry: Entry) -> int:
        return entry.layer * self._experts + entry.expert

    def add(self, entry: Entry) -> None:
        self.entries[self.key(entry)] = entry
        self.used += entry.bytes

    def remove(self, entry: Entry) -> None:
        del self.entries[self.key(entry)]
        self.used -= entry.bytes

    def offer(self, entry: Entry) -> None:
        """`entry` has become evictable."""
        if self._score is None or entry.pinned:
            return
        if len(self._heap) > 64 + 4 * len(self.entries):
            self.rebuild()
        heappush(self._heap, (self._score(entry), entry.last_use, entry.layer * self._experts + entry.expert, entry))

    def rebuild(self) -> None:
        """Score every evictable expert anew, after a plan changed or to sweep out stale items."""
        if self._score is not None:
            self._heap = [
                (self._score(e), e.last_use, key, e)
                for key, e in self.entries.items()
                if e.landed and not e.busy and not e.pinned
            ]
            heapify(self._heap)

    def victim(self) -> Entry | None:
        """The evictable expert of the lowest score, or None; the caller removes it."""
        if self._score is None:
            self._draws += 1
            free = [k for k, e in self.entries.items() if e.landed and not e.busy and not e.pinned]
            return self.entries[min(free, key=lambda k: _hash(self._seed, self._draws, k))] if free else None
        heap = self._heap
        while heap:
            _, last_use, key, entry = heap[0]
            if self.entries.get(key) is entry and entry.last_use == last_use and entry.landed and not entry.busy:
                return entry
            heappop(heap)
        return None


def scorer(
    eviction: Eviction, popularity: list[list[float]], totals: list[list[int]]
) -> Callable[[Entry], float] | None:
    """The score of an entry under `eviction`; None where it is the random order."""
    features: dict[str, Callable[[Entry], float]] = {
        "lru": lambda e: e.last_use,
        "lfu": lambda e: e.uses,
        "count": lambda e: totals[e.layer][e.expert],
        "fifo": lambda e: e.brought,
        "hot": lambda e: popularity[e.layer][e.expert],
        "belady": lambda e: -e.next_use,
        "plan": lambda e: e.plan,
    }
    names = [name for name, _ in eviction.score]
    if "random" in names:
        return None
    if len(names) == 1:
        return features[names[0]]
    terms = [(features[name], weight) for name, weight in eviction.score]
    return lambda e: sum(weight * feature(e) for feature, weight in terms)
