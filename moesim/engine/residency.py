"""What is on the device and what is on its way: slots, links, copies, prefetches, plans (docs/design.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.cache import Entry, Now, Pool, scorer
from moesim.engine.clock import Clock
from moesim.engine.fluid import Fluid
from moesim.engine.host_tier import HostTier
from moesim.engine.links import Copy, Executor, Link
from moesim.engine.own import own_prefetch
from moesim.records import KINDS, LINKS, Records
from moesim.systems.system import System
from moesim.trace import WEIGHT_ONE

if TYPE_CHECKING:
    from moesim.costs.table import CostTable

NEVER = (1 << 31) - 1
FOREVER = 1 << 60
H2D, D2H, NVME, HOST = range(len(LINKS))
LOWERED, REROUTED, SKIPPED = range(3)
DEMAND, PREFETCH, LATE, PLANNED, WRITE_BACK, COMPUTE = range(len(KINDS))


@dataclass(frozen=True)
class Slots:
    """Device memory for experts, in bytes: one capacity per layer; `scratch` counts experts used once and forgotten.

    low: the same for low-precision copies, where the system keeps any.
    """

    per_layer: tuple[int, ...]
    scratch: int
    low: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.per_layer)


@dataclass
class Counts:  # noqa: PLW1641  (unhashable by the decorator)
    """Totals over a run. Lookups are unique experts per layer and step; bytes are bytes moved.

    altered: routed weight not served as chosen, in parts of 1 / WEIGHT_ONE: [LOWERED | REROUTED | SKIPPED, layers,
        tasks of the trace]. Whole numbers, so two engines agree in whatever order they add.
    """

    lookups: int = 0
    hits: int = 0
    lates: int = 0
    misses: int = 0
    hosted: int = 0
    evictions: int = 0
    prefetched: int = 0
    prefetched_bytes: int = 0
    prefetch_used_bytes: int = 0
    dropped: int = 0
    altered: NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 1, 1), dtype=np.int64))
    spent: Counter[str] = field(default_factory=Counter)  # ns on the critical path, by what it was spent on

    def weight(self, kind: int) -> float:
        """Routed weight LOWERED (computed at low precision), REROUTED or SKIPPED over all layers and tasks."""
        return int(self.altered[kind].sum()) / WEIGHT_ONE

    def __eq__(self, other: object) -> bool:
        plain = [vars(c) | {"altered": c.altered.tolist()} for c in (self, other) if isinstance(c, Counts)]
        return len(plain) == 2 and plain[0] == plain[1]


def shared_capacities(table: CostTable, system: System, reads: bool) -> dict[str, float]:
    """Bytes/ns of the resources that the links could oversubscribe together. reads: some experts lie on the drive."""
    back = table.copy_rate if system.transfer.write_back else 0.0
    host = table.host_rate if system.misses.may_host else 0.0
    demand = {
        "dram": table.copy_rate + back + host + (table.read_rate if reads else 0.0),
        "pcie": table.copy_rate + back,
    }
    capacity = {"dram": table.dram_gbps, "pcie": table.duplex_gbps}  # GB/s is bytes per ns
    return {name: size for name, size in capacity.items() if demand[name] > size}


class Residency:
    """Expert slots and the links that fill them. `arrived(entry)` is told of every expert a step waits for."""

    def __init__(
        self,
        env: Clock,
        table: CostTable,
        system: System,
        slots: Slots,
        popularity: NDArray[np.float64],
        records: Records,
        tier: HostTier | None,
        seed: int,
        arrived: Callable[[Entry], None],
    ) -> None:
        self._env, self._table, self._system, self._records, self._tier = env, table, system, records, tier
        self._arrived = arrived
        layers, self.experts = popularity.shape
        low_bits = system.misses.low_bits
        self._bytes = [[table.expert_bytes(layer, None, e) for e in range(self.experts)] for layer in range(layers)]
        self._low_bytes = [table.expert_bytes(layer, low_bits) for layer in range(layers)] if low_bits else []
        self._looks_ahead = system.eviction.looks_ahead
        # Pinned experts may fill the cache, so what comes beside them is used once and forgotten.
        self._keeps_prefetched = system.cache and (system.misses.keep or not system.placement.pinned)
        self.parts = table.matrices if system.transfer.unit == "matrix" else 1
        self._width = 2 * self.experts  # ids from `experts` on are low-precision copies
        self.here: list[dict[int, Entry]] = [{} for _ in range(layers)]  # experts that hold a slot, by layer
        self.coming: dict[int, Copy] = {}  # queued and flying copies, by `key`
        self._done: list[Entry] = []  # computed in the present layer, still protected
        self._planned: list[Copy] = []
        self._blocked = False
        self._landing: simpy.Event | None = None
        self._scratch_free = slots.scratch
        self._brought = 0
        self.tick = 0  # experts looked up so far
        self.now = Now(layers)
        self.counts = Counts()
        totals = [[0] * self.experts for _ in range(layers)]
        self.totals = totals if system.eviction.counts else None
        self._score, self._pick = scorer(system.eviction, popularity.tolist(), totals, self.now, self.experts, seed)
        self._pools = self._make_pools(slots.per_layer)
        self._low_pools = self._make_pools(slots.low)
        self._connect()

    def _make_pools(self, sizes: tuple[int, ...]) -> list[Pool]:
        """One pool per layer, or one and the same for all layers."""

        def make(size: int) -> Pool:
            return Pool(size, self._score, self._system.eviction.changing, self.now, self._pick)

        if self._system.eviction.scope == "layer":
            return [make(size) for size in sizes]
        return [make(sum(sizes))] * len(sizes)

    def key(self, layer: int, expert: int) -> int:
        return layer * self._width + expert

    def _pool(self, layer: int, expert: int) -> Pool:
        return self._pools[layer] if expert < self.experts else self._low_pools[layer]

    def _connect(self) -> None:
        """Links and executors, sharing only those resources that they could oversubscribe together."""
        table, env = self._table, self._env
        self._fluid = fluid = Fluid(env, shared_capacities(table, self._system, self._tier is not None))

        def link(uses: tuple[str, ...], part_ns: Callable[[int], int], last: bool, which: int) -> Link:
            return Link(
                env, fluid, uses, part_ns,
                reserve=self._reserve if last else lambda copy: True,
                passed=lambda copy: copy.expires <= self.now.position,
                drop=self._drop,
                landed=self._landed if last else self._read,
                record=partial(self._record_copy, which) if self._records.detail else None,
            )  # fmt: skip

        unified = table.unified
        self.nvme = link(("dram",), table.read_ns, unified, NVME)
        self.h2d = link(("dram", "pcie"), table.copy_ns, True, H2D)
        self.d2h = Executor(env, fluid, ("dram", "pcie"))
        self.host = Executor(env, fluid, ("dram",))
        self.last = self.nvme if unified else self.h2d

    def next_landing(self) -> simpy.Event | None:
        """Happens when the next copy has landed; None where nothing moves."""
        if not (self.last.busy or self.nvme.busy):
            return None
        self._landing = self._landing or self._env.event()
        return self._landing

    def _record_copy(self, which: int, copy: Copy, start: int, end: int, size: int) -> None:
        kind = LATE if copy.promoted else DEMAND if copy.demand else PLANNED if copy.plan else PREFETCH
        self._records.transfers.add((which, start, end, copy.layer, copy.expert, size, kind))

    # -- slots --------------------------------------------------------------------------------------------------

    def place(self, layer: int, expert: int, pinned: bool) -> bool:
        """Put an expert there before time begins; False where it does not fit."""
        entry = Entry(layer, expert, self._bytes[layer][expert], self._brought, self.key(layer, expert))
        pool = self._pools[layer]
        if pool.used + entry.bytes > pool.capacity:
            return False
        entry.landed, entry.pinned = True, pinned
        self._brought += 1
        pool.add(entry)
        pool.offer(entry)
        self.here[layer][expert] = entry
        return True

    def resize(self, slots: Slots) -> None:
        """New capacities between two steps, when the KV cache grew or shrank; the lowest scores leave first."""
        one = self._system.eviction.scope == "global"
        for own, sizes in ((self._pools, slots.per_layer), (self._low_pools, slots.low)):
            for pool, size in zip(own, [sum(sizes)] * len(sizes) if one else sizes, strict=True):
                pool.capacity = size
                while pool.used > pool.capacity and (victim := pool.victim() or pool.victim(guarded=True)):
                    self._evict(pool, victim)

    @property
    def resident_bytes(self) -> int:
        return sum({id(pool): pool.used for pool in (*self._pools, *self._low_pools)}.values())

    def new_sequence(self) -> None:
        """A request was admitted: policies that count per sequence forget."""
        if self._system.eviction.per_sequence:
            self.now.sequence_steps = 0
            for pool in dict.fromkeys((*self._pools, *self._low_pools)):
                for entry in pool.entries.values():
                    entry.uses = entry.high_uses = entry.last_step = 0
                pool.rebuild()

    def _reserve(self, copy: Copy) -> bool:
        """Take a slot for a copy that is about to start (rule 5); False where every slot is in use."""
        pool = self._pool(copy.layer, copy.expert)
        if not copy.keep:
            if self._scratch_free <= (0 if copy.demand else 1):  # a prefetch leaves one for demands
                self._blocked = True
                return False
            self._scratch_free -= 1
        else:
            while pool.used + copy.nbytes > pool.capacity:
                victim = pool.victim()
                if victim is None and copy.demand:
                    victim = self._computed_own(pool) or pool.victim(guarded=True)
                elif victim is not None and not copy.demand and self._looks_ahead and victim.next_use <= copy.expires:
                    victim = None  # who knows the future does not trade an expert for one needed no sooner
                if victim is None:
                    self._blocked = True
                    return False
                self._evict(pool, victim)
        entry = Entry(
            copy.layer, copy.expert, copy.nbytes, self._brought, copy.key, keep=copy.keep, plan=copy.plan,
            prefetched=not copy.demand, last_use=self.tick, next_use=min(copy.expires, NEVER),
        )  # fmt: skip
        self._brought += 1
        if self._system.prefetch.pin and not copy.demand:
            entry.guard = copy.expires
        if copy.wanted:
            entry.last_use, entry.next_use, entry.tokens = copy.wanted
            entry.busy, entry.uses, entry.last_step = True, 1, self.now.sequence_steps
            entry.high_uses = int(copy.expert < self.experts)
        if copy.keep:
            pool.add(entry)
        self.here[copy.layer][copy.expert] = copy.entry = entry
        return True

    def _evict(self, pool: Pool, victim: Entry) -> None:
        pool.remove(victim)
        del self.here[victim.layer][victim.expert]
        self.counts.evictions += 1
        if self._system.transfer.write_back:

            def written(_: simpy.Event | None) -> None:
                if self._records.detail:
                    row = (D2H, self.d2h.started, self._env.now, victim.layer, victim.expert, victim.bytes, WRITE_BACK)
                    self._records.transfers.add(row)

            self.d2h.submit(victim.bytes, self._table.copy_back_ns(victim.bytes), written)

    def _computed_own(self, pool: Pool) -> Entry | None:
        """More experts than slots: the one of this layer that was computed first makes room for the next."""
        for entry in self._done:
            if self._pool(entry.layer, entry.expert) is pool and not entry.pinned:
                self._done.remove(entry)
                return entry
        return None

    def release(self, entry: Entry) -> None:
        """Its tokens are computed. A cached expert stays protected until the layer ends, a scratch slot is free."""
        if entry.keep:
            self._done.append(entry)
            self._unblock()
        else:
            self._discard(entry)

    def _discard(self, entry: Entry) -> None:
        del self.here[entry.layer][entry.expert]
        self._scratch_free += 1
        self._unblock()

    def end_layer(self, layer: int) -> None:
        """The present event's experts may leave; scratch slots prefetched for it in vain are free."""
        for entry in self._done:
            entry.busy = False
            self._pool(layer, entry.expert).offer(entry)
        self._done.clear()
        if not (self._system.cache and self._system.misses.keep):
            for entry in [e for e in self.here[layer].values() if e.landed and not e.keep]:
                self._discard(entry)
        self._unblock()

    def _unblock(self) -> None:
        if self._blocked:
            self._blocked = False
            self.last.kick()

    def waiting(self) -> str:
        """What a run that stands still waits for."""
        held = ", ".join(
            f"layer {self.coming[k].layer} expert {self.coming[k].expert}" for k in sorted(self.coming)[:3]
        )
        return f"waiting for a slot: {held or 'none'}; give the cache more slots, or change misses.keep"

    # -- copies -------------------------------------------------------------------------------------------------

    def submit(self, copy: Copy) -> None:
        self.coming[copy.key] = copy
        (self.last if self.in_host(copy) else self.nvme).submit(copy)

    def in_host(self, copy: Copy) -> bool:
        """Whether the expert need not be read from the drive before it can cross the link or be computed on the CPU."""
        return self._tier is None or self._tier.touch(copy.layer, copy.expert)

    def read_for_host(self, copy: Copy, done: Callable[[], None]) -> None:
        """Bring an expert from the drive into host memory for the CPU to compute."""
        copy.on_read = done
        self.nvme.submit(copy)

    def copy(self, layer: int, expert: int, demand: bool, expires: int, keep: bool) -> Copy:
        nbytes = self._bytes[layer][expert] if expert < self.experts else self._low_bytes[layer]
        return Copy(layer, expert, self.key(layer, expert), nbytes, self.parts, demand, expires, keep)

    def rest_of_layer(self, layer: int, asked: Iterable[Copy]) -> tuple[list[Copy], list[Copy]]:
        """Every other expert of the layer, (on its way, not yet): an expert-agnostic engine moves whole layers."""
        here, names = self.here[layer], {copy.expert for copy in asked}
        coming, fresh = [], []
        for expert in range(self.experts):
            copy = self.coming.get(self.key(layer, expert))
            if expert in names or (copy is None and expert in here):
                continue
            if copy is None:
                copy = self.copy(layer, expert, True, FOREVER, self._system.misses.keep)
                fresh.append(copy)
            else:
                coming.append(copy)
            copy.wanted = (self.tick, NEVER, 0)
            if copy.entry is not None:
                copy.entry.busy = True
        return coming, fresh

    def _read(self, copy: Copy) -> None:
        """An NVMe read has reached host memory: the copy goes on over PCIe."""
        copy.read_end = self._env.now
        if self._tier is not None:
            self._tier.insert(copy.layer, copy.expert, copy.size)
        if copy.on_read is not None:
            copy.on_read()
            return
        copy.nbytes, copy.parts = copy.size, self.parts
        self.h2d.submit(copy)

    def _drop(self, copy: Copy) -> None:
        self.counts.dropped += 1
        del self.coming[copy.key]

    def _landed(self, copy: Copy) -> None:
        del self.coming[copy.key]
        if self._landing is not None:
            landing, self._landing = self._landing, None
            landing.succeed()
        entry = copy.entry
        assert entry is not None
        entry.landed = True
        if entry.prefetched:
            self.counts.prefetched += 1
            self.counts.prefetched_bytes += entry.bytes
            if entry.busy:
                self.used(entry)
        if entry.busy:
            entry.read_end = copy.read_end
            self._arrived(entry)
        elif entry.keep:
            self._pool(entry.layer, entry.expert).offer(entry)
            self._unblock()
        elif copy.expires <= self.now.position:  # its layer is over, and there is no cache to keep it in
            self._discard(entry)

    def used(self, entry: Entry) -> None:
        entry.prefetched = False
        self.counts.prefetch_used_bytes += entry.bytes

    def prefetch(self, target: int, believed: list[int], expires: int) -> int:
        """Queue the believed experts of layer `target`, in order of trust; `expires` is the position they are for.

        Returns how many are on their way to that layer now that were missing.
        """
        here, base, room = self.here[target], self.key(target, 0), self._system.prefetch.per_layer
        queued = 0
        if (own := self._system.prefetch.own) is not None:
            ids = self._width if self._low_pools else self.experts
            on_way = {e for e in range(ids) if base + e in self.coming}
            believed = own_prefetch(own, target, believed, on_way | set(here), ids)
        if not self._low_pools:  # a predictor of low-precision copies beside a miss rule that keeps none
            believed = [expert % self.experts if expert >= 0 else expert for expert in believed]
        for expert in dict.fromkeys(believed):
            entry = here.get(expert) or (here.get(expert - self.experts) if expert >= self.experts else None)
            if entry is not None and self._system.prefetch.pin:
                entry.guard = max(entry.guard, expires)
            if expert < 0 or entry is not None:
                continue
            if (coming := self.coming.get(base + expert)) is not None:
                coming.expires = max(coming.expires, expires)  # believed in again before it started
                continue
            if queued == room:
                break
            queued += 1
            self.submit(self.copy(target, expert, False, expires, self._keeps_prefetched))
        return queued

    def plan(self, values: NDArray[np.float64]) -> None:
        """Keep the experts of highest value [layers, experts]; bring in, layer after layer, those that are absent."""
        for copy in self._planned:  # an older plan's copies that have not started lapse, unless named again below
            if copy.entry is None and not copy.demand:
                copy.expires = -1
        older = {copy.key: copy for copy in self._planned if copy.expires < 0}
        self._planned = []
        for pool in dict.fromkeys(self._pools):
            layers = [layer for layer, own in enumerate(self._pools) if own is pool]
            for entry in pool.entries.values():
                entry.plan = float(values[entry.layer, entry.expert])
            pool.rebuild()
            self._bring_planned(pool, layers, values, older)

    def _bring_planned(
        self, pool: Pool, layers: list[int], values: NDArray[np.float64], older: dict[int, Copy]
    ) -> None:
        """Copies for the absent among as many of the most valuable as the pool holds; the resident win ties."""
        ranked = sorted(
            (-values[layer, expert], expert not in self.here[layer], layer, expert)
            for layer in layers
            for expert in range(self.experts)
            if values[layer, expert] > 0
        )
        room = pool.capacity // max(max(self._bytes[layer]) for layer in layers)
        for value, absent, layer, expert in sorted(ranked[:room], key=lambda r: (r[2], r[0], r[3])):
            key = self.key(layer, expert)
            renewed = older.get(key) if self.coming.get(key) is older.get(key) else None
            if not absent or (renewed is None and key in self.coming):
                continue
            copy = renewed or self.copy(layer, expert, False, FOREVER, True)
            copy.plan, copy.expires = -float(value), FOREVER
            self._planned.append(copy)
            if renewed is None:
                self.submit(copy)
