"""What holds a slot and what is on its way, decided by a system's own choices from what has really happened.

Written from the rules of time in docs/design.md, apart from the simulator's own residency, with which it shares only
the choices themselves: the score of an expert and the pools that rank by it. Every method is called under the lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from numpy.typing import NDArray
from torch import Tensor

from moesim.engine.cache import Entry, Now, Pool, scorer
from moesim.engine.residency import FOREVER, NEVER, Slots
from moesim.systems import System
from validate.live.loader import Job
from validate.live.weights import HIGH_BITS, LOW_BITS, Shape


class Residency:
    """Slots and queued copies of one run. `submit` and `promote` reach the loader."""

    def __init__(
        self,
        shape: Shape,
        system: System,
        slots: Slots,
        popularity: NDArray,
        memory: dict[int, list[Tensor]],
        seed: int,
    ) -> None:
        self.experts, self._system, self._shape = shape.experts, system, shape
        self._free = {bits: list(tensors) for bits, tensors in memory.items()}
        self.slot: dict[int, Tensor] = {}  # by key, of everything that holds one
        self.here: list[dict[int, Entry]] = [{} for _ in range(shape.layers)]
        self.coming: dict[int, Job] = {}
        self.arrived: deque[Entry] = deque()
        self.outstanding = 0  # copies the present layer waits for
        self.evicted: list[tuple[int, int]] = []
        self.dropped_count = self.tick = self._brought = 0
        self.now = Now(shape.layers)
        self.totals = [[0] * shape.experts for _ in range(shape.layers)]
        self._score, self._pick = scorer(
            system.eviction, popularity.tolist(), self.totals, self.now, shape.experts, seed
        )
        self._high, self._low = self._pools(slots.per_layer), self._pools(slots.low)
        self._scratch = slots.scratch
        self._done: list[Entry] = []
        self._parts = 3 if system.transfer.unit == "matrix" else 1
        self._keeps_prefetched = system.cache and (system.misses.keep or not system.placement.pinned)
        self.submit: Callable[[Job], None] = lambda job: None
        self.promote: Callable[[Job], None] = lambda job: None

    def _pools(self, sizes: tuple[int, ...]) -> list[Pool]:
        changing = self._system.eviction.changing
        if self._system.eviction.scope == "layer":
            return [Pool(size, self._score, changing, self.now, self._pick) for size in sizes]
        return [Pool(sum(sizes), self._score, changing, self.now, self._pick)] * len(sizes)

    def key(self, layer: int, expert: int) -> int:
        return layer * 2 * self.experts + expert

    def bits(self, expert: int) -> int:
        return HIGH_BITS if expert < self.experts else LOW_BITS

    def _pool(self, layer: int, expert: int) -> Pool:
        return (self._high if expert < self.experts else self._low)[layer]

    def place(self, layer: int, expert: int, pinned: bool) -> bool:
        """Give an expert a slot before time begins; the caller copies it. False where it does not fit."""
        pool, nbytes = self._pool(layer, expert), self._shape.nbytes()
        if pool.used + nbytes > pool.capacity:
            return False
        entry = Entry(layer, expert, nbytes, self._brought, self.key(layer, expert))
        self._brought += 1
        entry.landed, entry.pinned = True, pinned
        pool.add(entry)
        pool.offer(entry)
        self._hold(entry)
        return True

    def _hold(self, entry: Entry) -> None:
        self.here[entry.layer][entry.expert] = entry
        self.slot[entry.key] = self._free[self.bits(entry.expert)].pop()

    def _let_go(self, entry: Entry) -> None:
        del self.here[entry.layer][entry.expert]
        self._free[self.bits(entry.expert)].append(self.slot.pop(entry.key))

    # What the loader asks

    def reserve(self, job: Job) -> bool:
        """A slot for a copy that is about to start; False where every one is in use."""
        pool = self._pool(job.layer, job.expert)
        if not job.keep:
            if self._scratch <= (0 if job.demand else 1):
                return False
            self._scratch -= 1
        while job.keep and pool.used + job.nbytes > pool.capacity:
            victim = pool.victim()
            if victim is None and job.demand:
                victim = self._computed_own(pool) or pool.victim(guarded=True)
            if victim is None:
                return False
            pool.remove(victim)
            self._let_go(victim)
            self.evicted.append((victim.layer, victim.expert))
        entry = Entry(
            job.layer, job.expert, job.nbytes, self._brought, job.key, keep=job.keep, prefetched=not job.demand,
            last_use=self.tick, next_use=min(job.expires, NEVER),
        )  # fmt: skip
        self._brought += 1
        if self._system.prefetch.pin and not job.demand:
            entry.guard = job.expires
        if job.wanted is not None:
            self.touch(entry, *job.wanted)
        if job.keep:
            pool.add(entry)
        self._hold(entry)
        job.entry = entry
        return True

    def touch(self, entry: Entry, tick: int, tokens: int) -> None:
        """The present layer uses it."""
        entry.busy, entry.last_use, entry.next_use, entry.tokens = True, tick, NEVER, tokens
        entry.last_step = self.now.sequence_steps
        entry.uses += 1
        entry.high_uses += entry.expert < self.experts

    def _computed_own(self, pool: Pool) -> Entry | None:
        """More experts than slots: the one of this layer that was computed first makes room."""
        for entry in self._done:
            if self._pool(entry.layer, entry.expert) is pool and not entry.pinned:
                self._done.remove(entry)
                return entry
        return None

    def passed(self, job: Job) -> bool:
        return job.expires <= self.now.position

    def dropped(self, job: Job) -> None:
        del self.coming[job.key]
        self.dropped_count += 1

    def landed(self, job: Job) -> None:
        """The whole expert is there."""
        del self.coming[job.key]
        entry = job.entry
        assert entry is not None
        entry.landed = True
        if entry.busy:
            entry.prefetched = False
            self.outstanding -= 1
            self.arrived.append(entry)
        elif entry.keep:
            self._pool(entry.layer, entry.expert).offer(entry)
        elif job.expires <= self.now.position:
            self._discard(entry)

    # What a step asks

    def demand(self, layer: int, expert: int, tokens: int) -> Job:
        job = self._job(layer, expert, True, FOREVER, self._system.misses.keep)
        job.wanted = (self.tick, tokens)
        return job

    def _job(self, layer: int, expert: int, demand: bool, expires: int, keep: bool) -> Job:
        nbytes = self._shape.nbytes(self.bits(expert))
        return Job(layer, expert, self.key(layer, expert), nbytes, self._parts, demand, expires, keep)

    def ask(self, job: Job) -> None:
        self.coming[job.key] = job
        self.submit(job)

    def prefetch(self, target: int, believed: list[int], expires: int) -> int:
        """Queue the believed experts of a layer in order of trust; how many were missing."""
        here, room, queued = self.here[target], self._system.prefetch.per_layer, 0
        if not self._low:
            believed = [expert % self.experts if expert >= 0 else expert for expert in believed]
        for expert in dict.fromkeys(believed):
            entry = here.get(expert) or (here.get(expert - self.experts) if expert >= self.experts else None)
            if entry is not None and self._system.prefetch.pin:
                entry.guard = max(entry.guard, expires)
            if expert < 0 or entry is not None:
                continue
            if (job := self.coming.get(self.key(target, expert))) is not None:
                job.expires = max(job.expires, expires)
            elif queued == room:
                break
            else:
                queued += 1
                self.ask(self._job(target, expert, False, expires, self._keeps_prefetched))
        return queued

    def release(self, entry: Entry) -> None:
        """Its tokens are computed; a cached expert stays protected until the layer ends."""
        if entry.keep:
            self._done.append(entry)
        else:
            self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        self._let_go(entry)
        self._scratch += 1

    def end_layer(self, layer: int) -> None:
        for entry in self._done:
            entry.busy = False
            self._pool(layer, entry.expert).offer(entry)
        self._done.clear()
        if not (self._system.cache and self._system.misses.keep):
            for entry in [e for e in self.here[layer].values() if e.landed and not e.keep]:
                self._discard(entry)

    def new_sequence(self) -> None:
        """A request was admitted: policies that count per sequence forget."""
        if self._system.eviction.per_sequence:
            self.now.sequence_steps = 0
            for pool in dict.fromkeys((*self._high, *self._low)):
                for entry in pool.entries.values():
                    entry.uses = entry.high_uses = entry.last_step = 0
                pool.rebuild()
