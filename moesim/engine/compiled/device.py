"""CompiledDevice: a device behind the same methods as moesim.engine.events.Device, its steps run by compiled code."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from simpy.events import Timeout

from moesim.engine.batch import Batch, Standstill
from moesim.engine.clock import Clock
from moesim.engine.compiled import state, step, victims
from moesim.engine.compiled.lower import RULES, lower_state, pool_sizes
from moesim.engine.events import Knowledge
from moesim.engine.host_tier import HostTier
from moesim.engine.residency import Counts, Slots
from moesim.output import told_if_slow
from moesim.records import LINKS, Records
from moesim.systems.system import System
from moesim.trace import Trace

if TYPE_CHECKING:
    import simpy

    from moesim.costs.table import CostTable

COUNTED = {
    "lookups": state.LOOKUPS, "hits": state.HITS, "lates": state.LATES, "misses": state.MISSES, "hosted": state.HOSTED,
    "evictions": state.EVICTIONS, "prefetched": state.PREFETCHED_N, "prefetched_bytes": state.PREFETCHED_BYTES,
    "prefetch_used_bytes": state.PREFETCH_USED_BYTES, "dropped": state.DROPPED,
}  # fmt: skip
BLOCK = 1 << 17  # numbers in a block of records at least: small enough for a core's own cache
OVERFULL = {1: "events", 2: "write-backs", 3: "records", 4: "copies", 5: "beliefs"}


# The first call of a process loads the machine code, or makes it where there is none.
_COMPILING = "compiling the engine: once per machine and version, about a minute; --engine events does without"


class CompiledDevice:
    """See moesim.engine.events.Device."""

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
        self._env, self._table, self._system, self._records = env, table, system, records
        self._slots_of = slots_of
        self._s = lower_state(trace, table, system, slots, knowledge, records.detail, host_tier, seed)
        self._costs = 0  # in the table
        self._plans = 0

    # What serving asks

    def steps(self, batch: Batch) -> Generator[simpy.Event, Any, list[int]]:
        self._give(batch)
        self._make_room(batch)
        yield Timeout(self._env, self._advance())
        return self._s.end[: self._s.g[state.AT_STEP]].tolist()

    def idle(self, gap: int) -> Generator[simpy.Event, Any, None]:
        self._make_room(None)
        self._s.g[state.IDLE_NS] = gap
        yield Timeout(self._env, self._advance())

    def _advance(self) -> int:
        """Do what was given; returns how long it took."""
        g = self._s.g
        began = int(g[state.NOW])
        with contextlib.nullcontext() if step.advance.signatures else told_if_slow(_COMPILING):
            ended = step.advance(self._s)
        while ended != state.DONE_RUN:
            if ended == state.NEED_COSTS:
                self._fill_costs()
            elif ended == state.STUCK:
                raise Standstill(int(g[state.NOW]))
            else:
                raise RuntimeError(f"compiled engine: no room for {OVERFULL[int(g[state.ERROR])]}")
            ended = step.advance(self._s)
        return int(g[state.NOW]) - began

    def _give(self, batch: Batch) -> None:
        s, table, passes = self._s, self._table, batch.passes
        if passes == 1:
            mixer = np.array([table.kinds_ns(batch.prefill, batch.contexts)], dtype=np.int64)
        else:
            mixer = table.passes_ns(batch.contexts, passes)
        step_ns = table.step_ns(int(batch.first[1]), batch.sequences)
        s.put("row", np.concatenate([batch.rows, batch.tail]) if len(batch.tail) else batch.rows)
        s.put("first", np.append(batch.first, batch.first[-1]))
        s.put("mixer_ns", mixer)
        s.put("step_ns", np.full(passes, step_ns, dtype=np.int64))
        s.put("end", np.zeros(passes, dtype=np.int64))
        if self._slots_of is not None:
            sizes = [pool_sizes(self._system, self._slots_of(kv)) for kv in batch.kv_bytes.tolist()]
            s.put("slots", np.array(sizes, dtype=np.int64))
        s.choice[state.RULE] = RULES[self._system.misses.rule_of(bool(batch.prefill), int(batch.first[1]))]
        s.g[state.UNTIL], s.g[state.AT_STEP] = batch.until, 0

    def _fill_costs(self) -> None:
        s, table = self._s, self._table
        low_bits = self._system.misses.low_bits
        for kind, active, tokens in s.need[: s.g[state.NEEDS]].tolist():
            if kind == state.COST_HOST:
                ns = table.host_expert_ns(tokens)
            else:
                ns = table.grouped_ns(active, tokens, low_bits if kind == state.COST_LOW else None)
            self._costs += step.put_cost(s, kind, active, tokens, ns)
            if 2 * self._costs > len(s.cost_key):
                self._enlarge_costs()
        s.g[state.NEEDS] = 0

    def _enlarge_costs(self) -> None:
        s = self._s
        keys, times = s.cost_key, s.cost_ns
        s.put("cost_key", np.zeros(4 * len(keys), dtype=np.int64))
        s.put("cost_ns", np.zeros(4 * len(keys), dtype=np.int64))
        step.rehash(s, keys, times)

    # What planning and placing ask

    def place(self, layer: int, expert: int, pinned: bool) -> None:
        step.place(self._s, layer, expert, int(pinned))

    def new_sequence(self) -> None:
        if self._system.eviction.per_sequence:
            step.new_sequence(self._s)

    def plan_later(self, delay: int, values: NDArray[np.float64]) -> None:
        s = self._s
        slot = self._plans % len(s.values)
        self._plans += 1
        s.values[slot] = values
        step.plan_later(s, delay, slot)

    def waiting(self) -> str:
        s, width = self._s, 2 * int(self._s.choice[state.EXPERTS])
        keys = np.flatnonzero(s.coming != state.NONE)[:3].tolist()
        held = ", ".join(f"layer {key // width} expert {key % width}" for key in keys)
        return f"waiting for a slot: {held or 'none'}; give the cache more slots, or change misses.keep"

    # What happened

    @property
    def counts(self) -> Counts:
        g = self._s.g
        spent = Counter({name: int(g[at]) for name, at in state.SPENT.items() if g[at]})
        counted = {name: int(g[at]) for name, at in COUNTED.items()}
        return Counts(**counted, altered=self._s.altered.copy(), spent=spent)

    @property
    def links(self) -> dict[str, tuple[int, int]]:
        link = self._s.link
        return {name: (int(link[i, 4]), int(link[i, 5])) for i, name in enumerate(LINKS)}

    @property
    def peak_resident_bytes(self) -> int:
        return max(int(self._s.g[state.PEAK]), int(self._s.pool[:, victims.USED].sum()))

    def _make_room(self, batch: Batch | None) -> None:
        """Rows for everything that can be recorded, queued or believed before the next look at it."""
        s, choice = self._s, self._s.choice
        layers, experts, detail = int(choice[state.LAYERS]), int(choice[state.EXPERTS]), bool(choice[state.DETAIL])
        passes = batch.passes if batch else 0
        tokens = int(batch.first[1]) if batch else 0
        unique = min(tokens * int(choice[state.TOP_K]), experts)
        believed = self._s.believed.shape[2] * tokens if batch else 0
        started = int((s.coming != state.NONE).sum()) + passes * layers * (unique + believed)

        def enough(name: str, rows: int) -> None:
            array = getattr(s, name)
            if len(array) < rows:
                s.put(name, np.zeros((max(rows, 2 * len(array)), *array.shape[1:]), dtype=array.dtype))

        if detail:
            self._room_to_record("layer_row", state.LAYER_ROWS, passes * layers)
            self._room_to_record("kernel_row", state.KERNEL_ROWS, passes * (layers * (unique + 2) + 1))
            self._room_to_record("transfer_row", state.TRANSFER_ROWS, 2 * int(choice[state.PARTS]) * started + 4096)
        if believed and not s.g[state.TIMERS]:
            enough("arena", layers * believed + 16)
            enough("rank", layers * believed + 16)
            enough("ranked", layers * believed + 16)

    def _room_to_record(self, name: str, at: int, rows: int) -> None:
        """What was written is the table's and its place free again where the present block may not do."""
        s, block = self._s, getattr(self._s, name)
        if len(block) - s.g[at] >= rows:
            return
        self._take_records(name)
        width = block.shape[1]
        if len(block) < rows:
            s.put(name, np.empty((max(rows, BLOCK // width), width), dtype=np.int64))

    def _take_records(self, name: str) -> None:
        table, at = {
            "layer_row": (self._records.layers, state.LAYER_ROWS),
            "transfer_row": (self._records.transfers, state.TRANSFER_ROWS),
            "kernel_row": (self._records.kernels, state.KERNEL_ROWS),
        }[name]
        table.extend(getattr(self._s, name)[: self._s.g[at]])
        self._s.g[at] = 0

    def finish(self) -> None:
        """The run is over: all records are handed over."""
        for name in ("layer_row", "transfer_row", "kernel_row"):
            self._take_records(name)
            self._s.put(name, np.empty((0, getattr(self._s, name).shape[1]), dtype=np.int64))
