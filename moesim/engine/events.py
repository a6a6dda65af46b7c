"""One device, event by event: the reference for what happens inside a step (docs/design.md, rules of time)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import Timeout

from moesim.engine.batch import Batch
from moesim.engine.cache import Entry
from moesim.engine.clock import Clock
from moesim.engine.host_tier import HostTier
from moesim.engine.links import Copy, Executor, Link
from moesim.engine.own import Miss, own_miss
from moesim.engine.residency import COMPUTE, FOREVER, HOST, LOWERED, NEVER, REROUTED, SKIPPED, Residency, Slots
from moesim.policies import LOW, SKIP, cheaper, precision_levels, reroute
from moesim.prediction import Beliefs
from moesim.records import Records
from moesim.systems.system import System
from moesim.trace import Trace

if TYPE_CHECKING:
    from moesim.costs.table import CostTable

MIXER, RESIDENT, ARRIVED, STEP = range(4)


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What the device may consult: arrays computed before time exists.

    popularity  [layers, experts], share of the calibration requests' choices
    next_use    int32 [tokens, layers, k], position (step x layers + layer) of the expert's next use; Belady only
    """

    popularity: NDArray[np.float64]
    beliefs: tuple[Beliefs, ...] = ()
    next_use: NDArray[np.int32] | None = None


Waves = tuple[Beliefs, list[list[int]], list[list[int]]]  # of this step's tokens and of the next step's, by layer


class Device:
    """A GPU with its expert slots, copy engines, host executor and NVMe; `steps` runs a batch.

    slots_of: the slots beside KV caches of so many bytes, where experts and caches share one memory.
    """

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
        slots_of: Callable[[int], Slots] | None = None,
    ) -> None:
        self._env, self._trace, self._table, self._system = env, trace, table, system
        self._slots_of = slots_of
        self._peak = 0
        self._knowledge, self._records = knowledge, records
        self._layers = trace.layers
        self._substituting = system.misses.substitutes
        self._rule = system.misses.rule  # of the present pass
        self._levels = system.misses.rule == "precision"
        self._arrived: deque[Entry] = deque()  # landed, not computed yet
        self._outstanding = self._hosting = 0  # copies and host experts under way that a layer waits for
        self._deferred = 0  # host experts of the present layer that may outlast it: those that were asked for last
        self._settled = 0  # waited before the step, which its first layer answers for
        self._wake: simpy.Event | None = None
        self._answers: dict[int, str] = {}  # of a user's miss rule, about the present layer's misses
        self._step = 0
        self.memory = Residency(
            env, table, system, slots, knowledge.popularity, records, host_tier, seed, self._arrival
        )
        self.counts = self.memory.counts
        self.counts.altered = np.zeros((3, trace.layers, len(trace.tasks)), dtype=np.int64)

    def _arrival(self, entry: Entry) -> None:
        self._outstanding -= 1
        self._arrived.append(entry)
        self._waken()

    def _waken(self) -> None:
        if self._wake is not None:
            wake, self._wake = self._wake, None
            wake.succeed()

    def idle(self, gap: int) -> Generator[simpy.Event, Any, None]:
        yield Timeout(self._env, gap)

    def place(self, layer: int, expert: int, pinned: bool) -> None:
        """Put an expert there before time begins, if it fits."""
        self.memory.place(layer, expert, pinned)

    def new_sequence(self) -> None:
        """A request was admitted."""
        self.memory.new_sequence()

    def plan_later(self, delay: int, values: NDArray[np.float64]) -> None:
        """Plan the cache by the values [layers, experts], `delay` ns from now."""
        Timeout(self._env, delay).callbacks.append(lambda _: self.memory.plan(values))

    def waiting(self) -> str:
        """What a run that stands still waits for."""
        return self.memory.waiting()

    def finish(self) -> None:
        """The run is over."""

    @property
    def links(self) -> dict[str, tuple[int, int]]:
        """(busy ns, bytes) of every link and executor."""
        memory = self.memory
        links: dict[str, Link | Executor]
        links = {"h2d": memory.h2d, "d2h": memory.d2h, "nvme": memory.nvme, "host": memory.host}
        return {name: (link.busy_ns, link.nbytes) for name, link in links.items()}

    @property
    def peak_resident_bytes(self) -> int:
        """Of experts, as seen between steps."""
        return max(self._peak, self.memory.resident_bytes)

    def steps(self, batch: Batch) -> Generator[simpy.Event, Any, list[int]]:
        ends: list[int] = []
        for i in range(batch.passes):
            if i and self._env.now >= batch.until:
                break
            self._peak = self.peak_resident_bytes
            if self._slots_of is not None:
                self.memory.resize(self._slots_of(int(batch.kv_bytes[i])))
            yield from self._pass(batch, i)
            ends.append(self._env.now)
        return ends

    def _pass(self, batch: Batch, i: int) -> Generator[simpy.Event, Any, None]:
        """Run one forward pass; returns when its last layer has ended."""
        env, spent, detail = self._env, self.counts.spent, self._records.detail
        rows, next_rows = batch.rows_of(i), batch.next_rows_of(i)
        self._rule = self._system.misses.rule_of(bool(batch.prefill), len(rows))
        chosen = self._by_layer(self._trace.experts, rows)
        ahead = self._by_layer(self._knowledge.next_use, rows)
        believed = [
            (b, self._by_layer(b.experts, rows), self._by_layer(b.experts, next_rows) if b.wraps else [])
            for b in self._knowledge.beliefs
        ]
        start = env.now
        step_ns = self._table.step_ns(len(rows), batch.sequences)
        if step_ns:
            yield Timeout(env, step_ns)
            spent["step"] += step_ns
        yield from self._foresee(-1, rows, believed)
        if self._system.prefetch.bulk:
            yield from self._settle()
        for layer, mixer_ns in enumerate(self._table.layers_ns(batch.prefill, batch.contexts_of(i))):
            began = env.now
            if mixer_ns:
                yield Timeout(env, mixer_ns)
                spent["mixer"] += mixer_ns
            if detail:
                self._records.kernels.add((began, env.now, layer, MIXER))
            self.memory.now.position = self._step * self._layers + layer
            yield from self._experts_of(layer, began, rows, chosen[layer], ahead[layer] if ahead else None, believed)
        if detail:
            self._records.kernels.add((start, start + step_ns, -1, STEP))
        self._step += 1
        self.memory.now.sequence_steps += 1

    def _settle(self) -> Generator[simpy.Event, Any, None]:
        """Wait until nothing is on its way; what finds no slot is left for its layer."""
        since = self._env.now
        while (landing := self.memory.next_landing()) is not None:
            yield landing
        self._settled = self._env.now - since
        self.counts.spent["nvme" if self._table.unified else "pcie"] += self._settled

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
        believed: list[Waves],
    ) -> Generator[simpy.Event, Any, None]:
        """The routed experts of one layer: classify, bring in, compute what is here, then what arrives."""
        env, counts, link = self._env, self.counts, self.memory.last
        routed = env.now
        hits, lates, missed = counts.hits, counts.lates, counts.misses
        wanted = _tokens_per_expert(chosen, len(rows))
        next_use = dict(zip(chosen, ahead, strict=True)) if ahead else None
        if self._levels:
            wanted = self._lower(layer, rows, chosen)
        resident, late, misses = self._classify(layer, wanted, next_use)
        if misses and self._system.misses.own is not None:
            misses = self._decide(layer, rows, misses)
        if self._substituting and (misses or late) and self._any_landed(layer):
            resident = self._substitute(layer, rows, chosen)
            late, misses = [], []
        hosted = self._bring_in(layer, late, misses)
        self._deferred = min(self._system.misses.defer, hosted) if layer + 1 < self._layers else 0
        if believed:
            yield from self._foresee(layer, rows, believed)
        waited, self._settled = self._settled, 0
        if resident:
            ns = self._grouped_ns(resident)
            yield Timeout(env, ns)
            self._computed(ns, layer, RESIDENT)
            for entry in resident:
                self.memory.release(entry)
        while self._arrived or self._outstanding or self._hosting > self._deferred:
            if not self._arrived:
                since = env.now
                while not self._arrived and (self._outstanding or self._hosting > self._deferred):
                    flight = link.flight if self._outstanding else None
                    if flight is None:  # nothing to wait for by name: the next arrival or the host says so
                        self._wake = flight = env.event()
                    yield flight
                waited += env.now - since
                self._waited(since)
            if self._arrived:
                entry = self._arrived.popleft()
                if entry.tokens:
                    ns = self._grouped_ns([entry])
                    yield Timeout(env, ns)
                    self._computed(ns, layer, ARRIVED)
                self.memory.release(entry)
        self.memory.end_layer(layer)
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

    def _grouped_ns(self, entries: list[Entry]) -> int:
        """One grouped kernel per precision."""
        if not self._levels:
            return self._table.grouped_ns(len(entries), sum([e.tokens for e in entries]))
        count = self.memory.experts
        high = [e.tokens for e in entries if e.expert < count]
        ns = self._table.grouped_ns(len(high), sum(high)) if high else 0
        if len(high) < len(entries):
            low = [e.tokens for e in entries if e.expert >= count]
            ns += self._table.grouped_ns(len(low), sum(low), self._system.misses.low_bits)
        return ns

    def _foresee(self, layer: int, rows: NDArray[np.int64], believed: list[Waves]) -> Generator[simpy.Event, Any, None]:
        """What becomes known when `layer` has been routed (-1: when the step starts) turns into prefetches."""
        calls = [call for wave in believed for call in self._due(layer, rows, wave)]
        prefetch = self._system.prefetch
        if not calls:
            return
        if prefetch.latency_ns and not prefetch.blocking:
            Timeout(self._env, prefetch.latency_ns).callbacks.append(lambda _: self._prefetch(calls))
            return
        if prefetch.latency_ns:
            yield Timeout(self._env, prefetch.latency_ns)
            self.counts.spent["predict"] += prefetch.latency_ns
        self._prefetch(calls)

    def _due(self, layer: int, rows: NDArray[np.int64], wave: Waves) -> list[tuple[int, list[int], int]]:
        """(target layer, believed experts, position they are for) of one set of beliefs at this moment."""
        beliefs, here, following = wave
        if (beliefs.distance == 0) != (layer < 0):
            return []
        base = self._step * self._layers
        if layer < 0:
            for target in range(self._layers) if beliefs.map is not None else ():
                self._believe(beliefs, target, rows)
            return [(target, here[target], base + target) for target in range(self._layers)]
        target = layer + beliefs.distance
        wrapped = target >= self._layers
        lists = following if wrapped else here
        target -= wrapped * self._layers
        if not lists or target >= self._layers:
            return []
        if beliefs.map is not None and not wrapped:
            self._believe(beliefs, target, rows)
        return [(target, lists[target], base + wrapped * self._layers + target)]

    def _believe(self, beliefs: Beliefs, target: int, rows: NDArray[np.int64]) -> None:
        assert beliefs.map is not None
        self.memory.now.beliefs[target] = beliefs.map[rows, target].astype(float).mean(axis=0).tolist()

    def _ranked(self, calls: list[tuple[int, list[int], int]]) -> list[tuple[int, list[int], int]]:
        """The same beliefs expert by expert, most probable and nearest first over all layers together."""
        now, ranked = self.memory.now, []
        for target, experts, expires in calls:
            away = expires - now.position
            inverse = self._system.prefetch.order == "inverse"
            weight = 1 / max(away, 1) if inverse else 1 - away / (self._layers + 1)
            odds = now.beliefs.get(target)
            for expert in dict.fromkeys(experts):
                if expert >= 0:
                    trust = odds[expert % self.memory.experts] if odds else 0.0
                    ranked.append((-weight * trust, (target, [expert], expires)))
        ranked.sort(key=lambda item: item[0])
        return [call for _, call in ranked]

    def _prefetch(self, calls: list[tuple[int, list[int], int]]) -> None:
        if self._system.prefetch.order != "layer":
            calls = self._ranked(calls)
        for target, experts, expires in calls:
            if expires > self.memory.now.position:
                queued = self.memory.prefetch(target, experts, expires)
                if queued and self._system.prefetch.first_missing:
                    return

    def _classify(
        self, layer: int, wanted: dict[int, int], next_use: dict[int, int] | None
    ) -> tuple[list[Entry], list[Copy], list[Copy]]:
        """Hits, lates and misses of one atomic event, each touched in rank order; nothing is brought in yet."""
        memory, counts = self.memory, self.counts
        here, base, coming, totals = memory.here[layer], memory.key(layer, 0), memory.coming, memory.totals
        step, width = memory.now.sequence_steps, memory.experts
        resident: list[Entry] = []
        late: list[Copy] = []
        misses: list[Copy] = []
        lates = 0
        tick = memory.tick
        for expert, tokens in wanted.items():
            tick += 1
            ahead = next_use[expert % width] if next_use else NEVER
            if totals is not None:
                totals[layer][expert % width] += 1
            entry = here.get(expert)
            if entry is not None and entry.landed:
                if entry.prefetched:
                    self.memory.used(entry)
                _touch(entry, tick, ahead, tokens, step, expert < width)
                resident.append(entry)
                continue
            copy = coming.get(base + expert)
            if copy is None:
                copy = self.memory.copy(layer, expert, True, FOREVER, self._system.misses.keep)
                misses.append(copy)
            elif self._hosts_late(copy, tokens):
                copy = self.memory.copy(layer, expert, True, FOREVER, self._system.misses.keep)
                self._answers[copy.key] = "host"
                misses.append(copy)
                entry, lates = None, lates + 1
            else:
                late.append(copy)
                if self._substituting and self._any_landed(layer):
                    continue  # the token goes elsewhere and the copy lands in its own time
            copy.wanted = (tick, ahead, tokens)
            if entry is not None:
                _touch(entry, tick, ahead, tokens, step, expert < width)
        memory.tick = tick
        counts.lookups += len(wanted)
        counts.hits += len(resident)
        counts.lates += len(late) + lates
        counts.misses += len(misses) - lates
        return resident, late, misses

    def _decide(self, layer: int, rows: NDArray[np.int64], misses: list[Copy]) -> list[Copy]:
        """Ask a user's rule about every miss; those it skips are left out and accounted for."""
        tasks, weights = self._trace.task_of_row[rows], self._trace.routed_weight(layer, rows)
        experts, total = self._trace.experts[rows, layer], max(int(weights.sum()), 1)
        left = []
        for copy in misses:
            own = np.where(experts == copy.expert, weights, 0).sum(axis=1)
            tokens = copy.wanted[2] if copy.wanted else 0
            miss = Miss(
                layer, copy.expert, tokens, int(own.sum()) / total, copy.size,
                self._fetch_ns(copy, tokens), self._table.host_expert_ns(tokens),
            )  # fmt: skip
            answer = own_miss(self._system.misses.own, miss)
            if answer == "skip":
                np.add.at(self.counts.altered[SKIPPED, layer], tasks, own)
            else:
                self._answers[copy.key] = answer
                left.append(copy)
        return left

    def _fetch_ns(self, copy: Copy, tokens: int) -> int:
        """Copy an expert to the device and compute it there, with nothing else going on."""
        part = -(-copy.size // copy.parts)
        return copy.parts * self._table.copy_ns(part) + self._table.expert_ns(tokens)

    def _hosts_late(self, copy: Copy, tokens: int) -> bool:
        """Whether the CPU is quicker than waiting for what is on its way; both alone, and the copy goes on."""
        table, link = self._table, self.memory.last
        if not self._system.misses.late_host or self._rule == "fetch" or table.unified or copy.link is not link:
            return False
        parts = self.memory.parts
        left = copy.parts * table.copy_ns(-(-copy.size // parts)) - copy.flying * (self._env.now - link.started)
        return table.host_expert_ns(tokens) <= left + table.expert_ns(tokens)

    def _any_landed(self, layer: int) -> bool:
        return any(entry.landed for entry in self.memory.here[layer].values())

    def _bring_in(self, layer: int, late: list[Copy], misses: list[Copy]) -> int:
        """Queue demands in rank order and hand host experts over; returns how many run on the host."""
        table = self._table
        if self._system.transfer.unit == "layer":
            coming, fresh = self.memory.rest_of_layer(layer, late + misses)
            late = late + coming
            misses = misses + fresh if late or misses else []
        hosted: list[Copy] = []
        demands = list(late)
        for copy in misses:
            tokens = copy.wanted[2] if copy.wanted else 0
            choice = self._answers.pop(copy.key, self._rule)
            if table.unified:
                choice = "fetch"  # CPU and GPU see the same memory, and the expert is not in it
            elif choice == "cheaper":  # a read from the drive would come before either
                if below := self._system.misses.host_below:
                    choice = "host" if tokens < below else "fetch"
                else:
                    choice = cheaper(self._fetch_ns(copy, tokens), table.host_expert_ns(tokens))
            (hosted if choice == "host" else demands).append(copy)
        if late and misses:
            demands.sort(key=lambda copy: copy.wanted or (0,))
        self._outstanding = len(demands)
        promoted = {id(copy) for copy in late}
        for copy in demands:
            if id(copy) not in promoted:
                self.memory.submit(copy)
            elif not copy.demand:
                assert copy.link is not None
                copy.link.promote(copy)
        if hosted:
            self._compute_on_host(layer, hosted)
        return len(hosted)

    def _compute_on_host(self, layer: int, hosted: list[Copy]) -> None:
        """Activations go down once for the layer, then the experts run one after the other."""
        self._hosting += len(hosted)
        self.counts.hosted += len(hosted)

        def finished(copy: Copy, _: simpy.Event | None) -> None:
            self._hosting -= 1
            if self._records.detail:
                row = (HOST, self.memory.host.started, self._env.now, layer, copy.expert, copy.size, COMPUTE)
                self._records.transfers.add(row)
            if self._hosting <= self._deferred and not self._outstanding:
                self._waken()

        def compute(copy: Copy) -> None:
            tokens = copy.wanted[2] if copy.wanted else 0
            self.memory.host.submit(copy.size, self._table.host_expert_ns(tokens), partial(finished, copy))

        def begin(_: simpy.Event) -> None:
            for copy in hosted:
                if self.memory.in_host(copy):
                    compute(copy)
                else:
                    self.memory.read_for_host(copy, partial(compute, copy))

        Timeout(self._env, self._table.handoff_ns).callbacks.append(begin)

    def _substitute(self, layer: int, rows: NDArray[np.int64], chosen: list[int]) -> list[Entry]:
        """Reroute or skip absent experts, token by token, and keep account of the routed weight that moved."""
        here = {e.expert: e for e in self.memory.here[layer].values() if e.landed}
        altered, k = self.counts.altered, self._trace.top_k
        tokens: Counter[int] = Counter()
        for i, (row, task, weights) in enumerate(self._weighted(layer, rows)):
            picks = chosen[i * k : (i + 1) * k]
            if self._system.misses.rule == "reroute":
                new = reroute(picks, here, self._preference(layer, row))
            else:
                new = [e if e in here else -1 for e in picks]
            for old, now, weight in zip(picks, new, weights, strict=True):
                if now != old:
                    altered[SKIPPED if now < 0 else REROUTED, layer, task] += weight
            tokens.update(e for e in new if e >= 0)
        for expert, count in tokens.items():
            self.memory.tick += 0 if here[expert].busy else 1
            if here[expert].busy:
                here[expert].tokens = count
            else:
                now = self.memory.now.sequence_steps
                _touch(here[expert], self.memory.tick, here[expert].next_use, count, now, True)
        return [here[expert] for expert in tokens]

    def _lower(self, layer: int, rows: NDArray[np.int64], chosen: list[int]) -> dict[int, int]:
        """The copies the step needs: at full precision where resident, else at the level its tokens' weights ask for.

        An expert several tokens want is brought in once, at the highest level any of them asks for.
        """
        here, width = self.memory.here[layer], self.memory.experts
        k, thresholds = self._trace.top_k, self._system.misses.thresholds
        needs: dict[int, tuple[int, int]] = {}  # expert: level, tokens
        pairs: list[tuple[int, int, int]] = []  # expert, task, weight
        for i, (_, task, weights) in enumerate(self._weighted(layer, rows)):
            levels = precision_levels(weights, thresholds)
            for expert, level, weight in zip(chosen[i * k : (i + 1) * k], levels, weights, strict=True):
                if expert >= 0:
                    old = needs.get(expert, (SKIP, 0))
                    needs[expert] = (max(old[0], level), old[1] + 1)
                    pairs.append((expert, task, weight))
        wanted: dict[int, int] = {}
        fate: dict[int, int] = {}
        for expert, (level, tokens) in needs.items():
            entry, low = here.get(expert), here.get(expert + width)
            if (entry is not None and entry.landed) or level > LOW:
                wanted[expert] = tokens
            elif level == LOW or (low is not None and low.landed):
                wanted[expert + width] = tokens
                fate[expert] = LOWERED
            else:
                fate[expert] = SKIPPED
        for expert, task, weight in pairs if fate else ():
            if expert in fate:
                self.counts.altered[fate[expert], layer, task] += weight
        return wanted

    def _preference(self, layer: int, row: int) -> list[int]:
        """Experts in gate order, or by popularity where the trace keeps no probabilities."""
        probabilities = self._trace.probabilities
        scores = self._knowledge.popularity[layer] if probabilities is None else probabilities[row, layer]
        return np.argsort(-scores, kind="stable").tolist()

    def _weighted(self, layer: int, rows: NDArray[np.int64]) -> Iterator[tuple[int, int, list[int]]]:
        """(row, its task, gate weights by rank in whole parts) of each token."""
        tasks, weights = self._trace.task_of_row[rows], self._trace.routed_weight(layer, rows)
        return zip(rows.tolist(), tasks.tolist(), weights.tolist(), strict=True)


def _touch(entry: Entry, tick: int, next_use: int, tokens: int, step: int, high: bool) -> None:
    entry.busy, entry.tokens = True, tokens
    entry.last_use, entry.next_use, entry.last_step = tick, next_use, step
    entry.uses += 1
    entry.high_uses += high


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
