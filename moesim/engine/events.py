"""One device, event by event: the reference for what happens inside a step (docs/design.md, rules of time)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import Timeout

from moesim.engine.cache import Entry, Pool, scorer
from moesim.engine.clock import Clock
from moesim.engine.fluid import Fluid
from moesim.engine.host_tier import HostTier
from moesim.engine.links import Copy, Executor, Link
from moesim.policies import cheaper, reroute
from moesim.prediction import Beliefs
from moesim.records import KINDS, LINKS, Records
from moesim.systems.system import System
from moesim.trace import Trace

if TYPE_CHECKING:
    from moesim.costs.table import CostTable

NEVER = (1 << 31) - 1
FOREVER = 1 << 60
H2D, D2H, NVME, HOST = range(len(LINKS))
DEMAND, PREFETCH, LATE, PLANNED, WRITE_BACK, COMPUTE = range(len(KINDS))
MIXER, RESIDENT, ARRIVED, STEP = range(4)


@dataclass(frozen=True)
class Slots:
    """Device memory for experts, in bytes: one capacity per layer, or one for all; scratch counts experts."""

    per_layer: tuple[int, ...]
    scratch: int

    @property
    def total(self) -> int:
        return sum(self.per_layer)


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What the device may consult: arrays computed before time exists.

    popularity  [layers, experts], share of the calibration requests' choices
    next_use    int32 [tokens, layers, k], position (step x layers + layer) of the expert's next use; Belady only
    """

    popularity: NDArray[np.float64]
    beliefs: Beliefs | None = None
    next_use: NDArray[np.int32] | None = None


@dataclass(eq=False)
class Batch:
    """One forward pass: its token rows in service order.

    next_rows: the row each sequence will be at in the next step, for beliefs that reach across tokens.
    prefill: (new tokens, tokens already cached) of each chunk; contexts: tokens cached of each decoding sequence.
    """

    rows: NDArray[np.int64]
    next_rows: NDArray[np.int64]
    prefill: list[tuple[int, int]]
    contexts: list[int]


@dataclass
class Counts:
    """Totals over a run. Lookups are unique experts per layer and step; bytes are bytes moved."""

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
    routed: float = 0.0  # weight of all routed (token, expert) pairs
    rerouted: float = 0.0
    skipped: float = 0.0
    spent: Counter[str] = field(default_factory=Counter)  # ns on the critical path, by what it was spent on


class Device:
    """A GPU with its expert slots, copy engines, host executor and NVMe; `step` runs one batch."""

    def __init__(
        self,
        env: Clock,
        trace: Trace,
        table: CostTable,
        system: System,
        slots: Slots,
        knowledge: Knowledge,
        records: Records,
        host_tier: HostTier | None,
        seed: int,
    ) -> None:
        self._env, self._trace, self._table, self._system = env, trace, table, system
        self._knowledge, self._records, self._tier = knowledge, records, host_tier
        self._layers, self._experts = trace.layers, trace.info.experts
        self._bytes = [table.expert_bytes(layer) for layer in range(trace.layers)]
        self._parts = table.matrices if system.transfer.unit == "matrix" else 1
        self._here: list[dict[int, Entry]] = [{} for _ in range(self._layers)]
        self._coming: dict[int, Copy] = {}
        self._arrived: deque[Entry] = deque()
        self._done: list[Entry] = []  # computed in the present layer, still protected
        self._outstanding = self._hosting = 0  # copies and host experts the present layer still waits for
        self._wake: simpy.Event | None = None
        self._blocked = False
        self._scratch_free = slots.scratch
        self._tick = self._brought = self._step = 0
        self.position = -1  # step x layers + layer of the last router decision
        self.counts = Counts()
        self._substituting = system.misses.changes_outputs
        totals = [[0] * self._experts for _ in range(self._layers)]
        self._totals = totals if any(name == "count" for name, _ in system.eviction.score) else None
        score = scorer(system.eviction, knowledge.popularity.tolist(), totals)
        if system.eviction.scope == "layer":
            self._pools = [Pool(size, score, seed, self._experts) for size in slots.per_layer]
        else:
            self._pools = [Pool(slots.total, score, seed, self._experts)] * self._layers
        self._planned: list[Copy] = []
        self._connect()

    # -- wiring -------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Links and executors, sharing only those resources that they could oversubscribe together."""
        table, env = self._table, self._env
        back = table.copy_rate if self._system.transfer.write_back else 0.0
        host = table.host_rate if self._system.misses.rule in ("host", "cheaper") else 0.0
        demand = {
            "dram": table.copy_rate + back + host + (table.read_rate if self._tier else 0.0),
            "pcie": table.copy_rate + back,
        }
        capacity = {"dram": table.dram_gbps, "pcie": table.duplex_gbps}  # GB/s is bytes per ns
        self._fluid = fluid = Fluid(env, {n: c for n, c in capacity.items() if demand[n] > c})

        def link(uses: tuple[str, ...], part_ns: Callable[[int], int], last: bool, which: int) -> Link:
            return Link(
                env, fluid, uses, part_ns,
                reserve=self._reserve if last else lambda copy: True,
                passed=lambda copy: copy.expires <= self.position,
                drop=self._drop,
                landed=self._landed if last else self._read,
                record=partial(self._record_copy, which) if self._records.detail else None,
            )  # fmt: skip

        unified = table.unified
        self.nvme = link(("dram",), table.read_ns, unified, NVME)
        self.h2d = link(("dram", "pcie"), table.copy_ns, True, H2D)
        self.d2h = Executor(env, fluid, ("dram", "pcie"))
        self.host = Executor(env, fluid, ("dram",))
        self._last = self.nvme if unified else self.h2d

    def _record_copy(self, which: int, copy: Copy, start: int, end: int, size: int) -> None:
        kind = LATE if copy.promoted else DEMAND if copy.demand else PLANNED if copy.plan else PREFETCH
        self._records.transfers.add((which, start, end, copy.layer, copy.expert, size, kind))

    # -- slots --------------------------------------------------------------------------------------------------

    def place(self, layer: int, expert: int, pinned: bool) -> bool:
        """Put an expert there before time begins; False where it does not fit."""
        entry = Entry(layer, expert, self._bytes[layer], self._brought)
        pool = self._pools[layer]
        if pool.used + entry.bytes > pool.capacity:
            return False
        entry.landed, entry.pinned = True, pinned
        self._brought += 1
        pool.add(entry)
        pool.offer(entry)
        self._here[layer][expert] = entry
        return True

    def resize(self, per_layer: Iterable[int]) -> None:
        """New capacities between two steps, when the KV cache grew or shrank; the lowest scores leave first."""
        sizes = list(per_layer)
        pools = self._pools if self._system.eviction.scope == "layer" else self._pools[:1]
        for pool, size in zip(pools, sizes if len(pools) > 1 else [sum(sizes)], strict=True):
            pool.capacity = size
            while pool.used > pool.capacity and (victim := pool.victim()):
                self._evict(pool, victim)

    @property
    def resident_bytes(self) -> int:
        return sum({id(pool): pool.used for pool in self._pools}.values())

    def _reserve(self, copy: Copy) -> bool:
        """Take a slot for a copy that is about to start (rule 5); False where every slot is in use."""
        pool = self._pools[copy.layer]
        if not copy.keep:
            if not self._scratch_free:
                self._blocked = True
                return False
            self._scratch_free -= 1
        else:
            while pool.used + copy.nbytes > pool.capacity:
                victim = pool.victim() or (self._computed_own(pool) if copy.demand else None)
                if victim is None:
                    self._blocked = True
                    return False
                self._evict(pool, victim)
        entry = Entry(
            copy.layer, copy.expert, copy.nbytes, self._brought, keep=copy.keep, plan=copy.plan,
            prefetched=not copy.demand, last_use=self._tick, next_use=min(copy.expires, NEVER),
        )  # fmt: skip
        self._brought += 1
        if copy.wanted:
            entry.last_use, entry.next_use, entry.tokens = copy.wanted
            entry.busy, entry.uses = True, 1
        if copy.keep:
            pool.add(entry)
        self._here[copy.layer][copy.expert] = copy.entry = entry
        return True

    def _evict(self, pool: Pool, victim: Entry) -> None:
        pool.remove(victim)
        del self._here[victim.layer][victim.expert]
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
            if self._pools[entry.layer] is pool:
                self._done.remove(entry)
                return entry
        return None

    def _release(self, entry: Entry) -> None:
        """Its tokens are computed. A cached expert stays protected until the layer ends, a scratch slot is free."""
        if entry.keep:
            self._done.append(entry)
        else:
            del self._here[entry.layer][entry.expert]
            self._scratch_free += 1
        self._unblock()

    def _end_layer(self) -> None:
        done = self._done
        if done:
            offer = self._pools[done[0].layer].offer
            for entry in done:
                entry.busy = False
                offer(entry)
            done.clear()
            self._unblock()

    def _unblock(self) -> None:
        if self._blocked:
            self._blocked = False
            self._last.kick()

    # -- copies -------------------------------------------------------------------------------------------------

    def _submit(self, copy: Copy) -> None:
        self._coming[copy.layer * self._experts + copy.expert] = copy
        absent = self._tier is not None and not self._tier.touch(copy.layer, copy.expert, copy.size)
        (self.nvme if absent else self._last).submit(copy)

    def _copy(self, layer: int, expert: int, demand: bool, expires: int, keep: bool) -> Copy:
        return Copy(layer, expert, self._bytes[layer], self._parts, demand, expires, keep)

    def _read(self, copy: Copy) -> None:
        """An NVMe read has reached host memory: the copy goes on over PCIe."""
        copy.read_end = self._env.now
        copy.nbytes, copy.parts = copy.size, self._parts
        self.h2d.submit(copy)

    def _drop(self, copy: Copy) -> None:
        self.counts.dropped += 1
        del self._coming[copy.layer * self._experts + copy.expert]

    def _landed(self, copy: Copy) -> None:
        del self._coming[copy.layer * self._experts + copy.expert]
        entry = copy.entry
        assert entry is not None
        entry.landed = True
        if entry.prefetched:
            self.counts.prefetched += 1
            self.counts.prefetched_bytes += entry.bytes
            if entry.busy:
                self._used(entry)
        if entry.busy:
            self._outstanding -= 1
            self._arrived.append(entry)
            entry.read_end = copy.read_end
            self._waken()
        else:
            self._pools[entry.layer].offer(entry)
            self._unblock()

    def _used(self, entry: Entry) -> None:
        entry.prefetched = False
        self.counts.prefetch_used_bytes += entry.bytes

    def _waken(self) -> None:
        if self._wake is not None:
            wake, self._wake = self._wake, None
            wake.succeed()

    def _prefetch(self, layer: int, believed: list[list[int]], believed_next: list[list[int]]) -> None:
        """Queue what is believed of the layer `distance` ahead; believed lists are per layer, in order of trust."""
        beliefs = self._knowledge.beliefs
        assert beliefs is not None
        target = layer + beliefs.distance
        wrapped = target >= self._layers
        if wrapped:
            target -= self._layers
        wanted = believed_next if wrapped else believed
        if not wanted or target >= self._layers:
            return
        expires = (self._step + wrapped) * self._layers + target
        here, base, room = self._here[target], target * self._experts, self._system.prefetch.per_layer
        for expert in dict.fromkeys(wanted[target]):
            if expert < 0 or expert in here or base + expert in self._coming:
                continue
            if room is not None:
                if not room:
                    return
                room -= 1
            self._submit(self._copy(target, expert, False, expires, self._system.cache))

    def plan(self, values: NDArray[np.float64]) -> None:
        """Keep the experts of highest value [layers, experts]; bring in, layer after layer, those that are absent."""
        for copy in self._planned:
            copy.expires = -1  # an older plan's copies that have not started are dropped
        self._planned = []
        for layer in range(self._layers):
            here, row = self._here[layer], values[layer].tolist()
            room = self._pools[layer].capacity // self._bytes[layer]
            order = sorted(range(self._experts), key=lambda e: (-row[e], e not in here, e))
            for expert, entry in here.items():
                entry.plan = row[expert]
            self._pools[layer].rebuild()
            for expert in order[:room]:
                if row[expert] > 0 and expert not in here and layer * self._experts + expert not in self._coming:
                    copy = self._copy(layer, expert, False, FOREVER, True)
                    copy.plan = row[expert]
                    self._planned.append(copy)
                    self._submit(copy)

    # -- a step -------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> Generator[simpy.Event, Any, None]:
        """Run one forward pass; returns when its last layer has ended."""
        env, spent, detail = self._env, self.counts.spent, self._records.detail
        rows = batch.rows
        chosen = self._by_layer(self._trace.experts, rows)
        ahead = self._by_layer(self._knowledge.next_use, rows)
        beliefs = self._knowledge.beliefs
        believed = self._by_layer(beliefs.experts, rows) if beliefs else []
        believed_next = self._by_layer(beliefs.experts, batch.next_rows) if beliefs and beliefs.wraps else []
        if self._substituting:
            self.counts.routed += self._routed_weight(rows)
        start = env.now
        step_ns = self._table.step_ns(len(rows), len(batch.prefill) + len(batch.contexts))
        if step_ns:
            yield Timeout(env, step_ns)
            spent["step"] += step_ns
        for layer, mixer_ns in enumerate(self._table.layers_ns(batch.prefill, batch.contexts)):
            began = env.now
            if mixer_ns:
                yield Timeout(env, mixer_ns)
                spent["mixer"] += mixer_ns
            if detail:
                self._records.kernels.add((began, env.now, layer, MIXER))
            self.position = self._step * self._layers + layer
            yield from self._experts_of(layer, began, rows, chosen[layer], ahead[layer] if ahead else None,
                                        (believed, believed_next))  # fmt: skip
        if detail:
            self._records.kernels.add((start, start + step_ns, -1, STEP))
        self._step += 1

    @staticmethod
    def _by_layer(values: NDArray[Any] | None, rows: NDArray[np.int64]) -> list[list[int]]:
        """[rows, layers, n] as one flat list per layer, token after token."""
        if values is None or not len(rows):
            return []
        if len(rows) == 1:
            return values[rows[0]].tolist()
        block = values[rows]
        return block.transpose(1, 0, 2).reshape(block.shape[1], -1).tolist()

    def _experts_of(
        self,
        layer: int,
        began: int,
        rows: NDArray[np.int64],
        chosen: list[int],
        ahead: list[int] | None,
        believed: tuple[list[list[int]], list[list[int]]],
    ) -> Generator[simpy.Event, Any, None]:
        """The routed experts of one layer: classify, bring in, compute what is here, then what arrives."""
        env, counts, table = self._env, self.counts, self._table
        routed = env.now
        hits, lates, missed = counts.hits, counts.lates, counts.misses
        wanted = _tokens_per_expert(chosen, len(rows))
        next_use = dict(zip(chosen, ahead, strict=True)) if ahead else None
        resident, late, misses = self._classify(layer, wanted, next_use)
        if self._substituting and (misses or late) and self._here[layer]:
            resident = self._substitute(layer, rows, chosen)
            late, misses = [], []
        hosted = self._bring_in(layer, late, misses)
        if self._knowledge.beliefs is not None:
            self._prefetch(layer, *believed)
        waited = 0
        if resident:
            ns = table.grouped_ns(len(resident), sum(entry.tokens for entry in resident))
            yield Timeout(env, ns)
            self._computed(ns, layer, RESIDENT)
            for entry in resident:
                self._release(entry)
        while self._arrived or self._outstanding or self._hosting:
            if not self._arrived:
                since = env.now
                while not self._arrived and (self._outstanding or self._hosting):
                    flight = self._last.flight if self._outstanding else None
                    if flight is None:  # nothing to wait for by name: the next arrival or the host says so
                        self._wake = flight = env.event()
                    yield flight
                waited += env.now - since
                self._waited(since)
            if self._arrived:
                entry = self._arrived.popleft()
                if entry.tokens:
                    ns = table.expert_ns(entry.tokens)
                    yield Timeout(env, ns)
                    self._computed(ns, layer, ARRIVED)
                self._release(entry)
        self._end_layer()
        if self._records.detail:
            self._records.layers.add(
                (self._step, layer, began, routed, env.now, counts.hits - hits, counts.lates - lates,
                 counts.misses - missed, hosted, waited)
            )  # fmt: skip

    def _computed(self, ns: int, layer: int, what: int) -> None:
        self.counts.spent["experts"] += ns
        if self._records.detail:
            self._records.kernels.add((self._env.now - ns, self._env.now, layer, what))

    def _waited(self, since: int) -> None:
        """Charge a wait to what ended it: the copy that arrived (its NVMe read first), or the host."""
        spent, now = self.counts.spent, self._env.now
        if not self._arrived:
            spent["host"] += now - since
            return
        read_end = self._arrived[0].read_end
        if read_end > since:
            spent["nvme"] += read_end - since
            since = read_end
        spent["nvme" if self._table.unified else "pcie"] += now - since

    def _classify(
        self, layer: int, wanted: dict[int, int], next_use: dict[int, int] | None
    ) -> tuple[list[Entry], list[Copy], list[Copy]]:
        """Hits, lates and misses of one atomic event, each touched in rank order; nothing is brought in yet."""
        here, base, counts, coming = self._here[layer], layer * self._experts, self.counts, self._coming
        resident: list[Entry] = []
        late: list[Copy] = []
        misses: list[Copy] = []
        tick = self._tick
        for expert, tokens in wanted.items():
            tick += 1
            ahead = next_use[expert] if next_use else NEVER
            if self._totals is not None:
                self._totals[layer][expert] += 1
            entry = here.get(expert)
            if entry is not None and entry.landed:
                if entry.prefetched:
                    self._used(entry)
                _touch(entry, tick, ahead, tokens)
                resident.append(entry)
                continue
            copy = coming.get(base + expert)
            if copy is None:
                copy = self._copy(layer, expert, True, FOREVER, self._system.misses.keep)
                misses.append(copy)
            else:
                late.append(copy)
                if self._substituting and here:
                    continue  # the token goes elsewhere and the copy lands in its own time
            copy.wanted = (tick, ahead, tokens)
            if entry is not None:
                _touch(entry, tick, ahead, tokens)
        self._tick = tick
        counts.lookups += len(wanted)
        counts.hits += len(resident)
        counts.lates += len(late)
        counts.misses += len(misses)
        return resident, late, misses

    def _bring_in(self, layer: int, late: list[Copy], misses: list[Copy]) -> int:
        """Queue demands in rank order and hand host experts over; returns how many run on the host."""
        table, rule = self._table, self._system.misses.rule
        if misses and self._system.transfer.unit == "layer":
            misses = misses + self._rest_of_layer(layer, {copy.expert for copy in misses})
        hosted: list[Copy] = []
        demands = list(late)
        for copy in misses:
            tokens = copy.wanted[2] if copy.wanted else 0
            choice = rule
            if rule == "cheaper":
                fetch_ns = table.copy_ns(copy.size) + table.expert_ns(tokens)
                choice = cheaper(fetch_ns, table.host_expert_ns(tokens))
            (hosted if choice == "host" else demands).append(copy)
        if late and misses:
            demands.sort(key=lambda copy: copy.wanted or (0,))
        self._outstanding = len(demands)
        promoted = {id(copy) for copy in late}
        for copy in demands:
            if id(copy) not in promoted:
                self._submit(copy)
            elif not copy.demand:
                assert copy.link is not None
                copy.link.promote(copy)
        if hosted:
            self._compute_on_host(layer, hosted)
        return len(hosted)

    def _rest_of_layer(self, layer: int, demanded: set[int]) -> list[Copy]:
        """Every other expert of the layer: an expert-agnostic engine moves whole layers."""
        here, base = self._here[layer], layer * self._experts
        rest = []
        for expert in range(self._experts):
            if expert not in here and expert not in demanded and base + expert not in self._coming:
                copy = self._copy(layer, expert, True, FOREVER, self._system.misses.keep)
                copy.wanted = (self._tick, NEVER, 0)
                rest.append(copy)
        return rest

    def _compute_on_host(self, layer: int, hosted: list[Copy]) -> None:
        """Activations go down once for the layer, then the experts run one after the other."""
        self._hosting += len(hosted)
        self.counts.hosted += len(hosted)

        def finished(copy: Copy, _: simpy.Event | None) -> None:
            self._hosting -= 1
            if self._records.detail:
                row = (HOST, self.host.started, self._env.now, layer, copy.expert, copy.size, COMPUTE)
                self._records.transfers.add(row)
            if not self._hosting and not self._outstanding:
                self._waken()

        def begin(_: simpy.Event) -> None:
            for copy in hosted:
                tokens = copy.wanted[2] if copy.wanted else 0
                self.host.submit(copy.size, self._table.host_expert_ns(tokens), partial(finished, copy))

        Timeout(self._env, self._table.handoff_ns).callbacks.append(begin)

    def _substitute(self, layer: int, rows: NDArray[np.int64], chosen: list[int]) -> list[Entry]:
        """Reroute or skip absent experts, token by token, and keep account of the routed weight that moved."""
        here = {e.expert: e for e in self._here[layer].values() if e.landed}
        counts, k = self.counts, self._trace.top_k
        tokens: Counter[int] = Counter()
        for i, row in enumerate(rows.tolist()):
            picks = chosen[i * k : (i + 1) * k]
            if self._system.misses.rule == "reroute":
                new = reroute(picks, here, self._preference(layer, row))
            else:
                new = [e if e in here else -1 for e in picks]
            for old, now, weight in zip(picks, new, self._weights(layer, row, k), strict=True):
                if now < 0 <= old:
                    counts.skipped += weight
                elif now != old:
                    counts.rerouted += weight
            tokens.update(e for e in new if e >= 0)
        for expert, count in tokens.items():
            self._tick += 0 if here[expert].busy else 1
            if here[expert].busy:
                here[expert].tokens = count
            else:
                _touch(here[expert], self._tick, here[expert].next_use, count)
        return [here[expert] for expert in tokens]

    def _preference(self, layer: int, row: int) -> list[int]:
        """Experts in gate order, or by popularity where the trace keeps no probabilities."""
        probabilities = self._trace.probabilities
        scores = self._knowledge.popularity[layer] if probabilities is None else probabilities[row, layer]
        return np.argsort(-scores, kind="stable").tolist()

    def _routed_weight(self, rows: NDArray[np.int64]) -> float:
        weights = self._trace.weights
        return float(len(rows) * self._layers if weights is None else weights[rows].astype(float).sum())

    def _weights(self, layer: int, row: int, k: int) -> list[float]:
        weights = self._trace.weights
        return [1.0 / k] * k if weights is None else weights[row, layer].astype(float).tolist()


def _touch(entry: Entry, tick: int, next_use: int, tokens: int) -> None:
    entry.busy, entry.tokens = True, tokens
    entry.last_use, entry.next_use = tick, next_use
    entry.uses += 1


def _tokens_per_expert(chosen: list[int], tokens: int) -> dict[int, int]:
    """Unique experts in order of first appearance, with how many tokens chose each."""
    if tokens == 1:
        wanted = dict.fromkeys(chosen, 1)
    else:
        wanted = {}
        for expert in chosen:
            wanted[expert] = wanted.get(expert, 0) + 1
    wanted.pop(-1, None)
    return wanted
