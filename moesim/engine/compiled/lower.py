"""Lowering: a composition, its costs and its routing as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.compiled import state as st
from moesim.engine.compiled.state import State
from moesim.engine.compiled.victims import CAPACITY, FINGER, HEAD, OUT, TAIL
from moesim.engine.events import Knowledge
from moesim.engine.host_tier import HostTier
from moesim.engine.residency import D2H, H2D, HOST, NVME, Slots
from moesim.systems.system import System
from moesim.trace import Trace

if TYPE_CHECKING:
    from moesim.costs.table import CostTable

RULES = {"fetch": st.FETCH, "host": st.ON_HOST, "cheaper": st.CHEAPER, "reroute": st.REROUTE, "skip": st.SKIP_RULE,
         "precision": st.PRECISION}  # fmt: skip
ORDERS = {"layer": st.BY_LAYER, "linear": st.LINEAR, "inverse": st.INVERSE}
PLANS = 64  # under way at once
EVENTS = 1 << 14
SINGLE = 1 << 12  # tokens of one expert whose costs are found at once
ARENA = 1 << 21  # believed experts that a slow predictor may have under way


def _routing(trace: Trace, system: System, knowledge: Knowledge) -> dict[str, NDArray[Any]]:
    """The trace and the beliefs about it."""
    beliefs = knowledge.beliefs
    widths = [b.experts.shape[2] for b in beliefs]
    first = np.concatenate([[0], np.cumsum(widths)]).astype(np.int64)
    wave = np.zeros((len(beliefs), 5), dtype=np.int64)
    for i, b in enumerate(beliefs):
        wave[i] = first[i], widths[i], b.distance, b.wraps, b.map is not None
    shape = (trace.tokens, trace.layers)
    believed = np.zeros((*shape, 0), dtype=np.int16)
    if len(beliefs) == 1:
        believed = beliefs[0].experts
    elif beliefs:
        believed = np.concatenate([b.experts for b in beliefs], axis=2)
    maps = np.zeros((0, *shape, trace.info.experts), dtype=np.float32)
    if any(b.map is not None for b in beliefs):
        maps = np.stack([b.map.astype(np.float32) for b in beliefs if b.map is not None])
    share = np.zeros((0, trace.layers, trace.top_k), dtype=np.int64)
    if system.misses.changes_outputs:
        share = np.stack([trace.routed_weight(layer) for layer in range(trace.layers)], axis=1)
    preference = np.zeros((0, trace.layers, trace.info.experts), dtype=np.float32)
    if system.misses.rule == "reroute" and trace.probabilities is not None:
        preference = trace.probabilities.astype(np.float32)
    next_use = knowledge.next_use
    if next_use is None:
        next_use = np.zeros((0, trace.layers, trace.top_k), dtype=np.int32)
    return {
        "chosen": _plain(trace.experts, np.int16),
        "next_use": _plain(next_use, np.int32),
        "believed": _plain(believed, np.int16),
        "wave": wave,
        "maps": _plain(maps, np.float32),
        "share": _plain(share, np.int64),
        "task": _plain(trace.task_of_row, np.int32),
        "preference": _plain(preference, np.float32),
    }


def _plain(values: NDArray[Any], kind: Any) -> NDArray[Any]:
    """C order, of one type and writable, so that one compiled version serves all; copied only where it must be."""
    values = np.ascontiguousarray(values, dtype=kind)
    return values if values.flags.writeable else values.copy()


def lower_state(
    trace: Trace,
    table: CostTable,
    system: System,
    slots: Slots,
    knowledge: Knowledge,
    detail: bool,
    tier: HostTier | None,
    seed: int,
) -> State:
    """An empty device."""
    layers, experts = trace.layers, trace.info.experts
    keys = layers * 2 * experts
    copies = keys + 8 * experts + 64
    by_layer = system.eviction.scope == "layer"
    sizes = pool_sizes(system, slots)
    slots_in_pool = experts if by_layer else layers * experts

    def ints(*shape: int) -> st.I64:
        """Zeros that begin where a line of a core's cache does."""
        size = int(np.prod(shape))
        room = np.zeros(size + 8, dtype=np.int64)
        begin = -room.ctypes.data % 64 // 8
        return room[begin : begin + size].reshape(shape)

    def none(*shape: int) -> st.I64:
        values = ints(*shape)
        values[:] = st.NONE
        return values

    static, size, part_ns = _bytes_and_times(table, system, layers, experts, by_layer, tier is not None)
    g = ints(128)
    g[[st.POSITION, st.TIER_HEAD, st.TIER_TAIL]] = st.NONE
    g[st.SCRATCH] = slots.scratch
    copy = ints(copies, 32)
    copy[:, st.C_CHAIN] = [*range(1, copies), st.NONE]
    pool = ints(len(sizes), 8)
    pool[:, CAPACITY], pool[:, [HEAD, TAIL, FINGER]] = sizes, st.NONE
    choice = _choices(trace, table, system, slots, detail, tier, seed, len(knowledge.beliefs))
    uses, capacity, fluid = _sharing(table, system, tier is not None)
    choice[st.FLUID] = fluid
    weights = [weight for _, weight in system.eviction.score]
    s = State(
        g=g,
        choice=choice,
        weight=np.array(weights, dtype=np.float64),
        feature=np.array([st.FEATURES.index(name) for name, _ in system.eviction.score], dtype=np.int64),
        thresholds=np.array(system.misses.thresholds, dtype=np.float64),
        entry=ints(keys, 16),
        held=np.zeros(keys, dtype=np.int16),
        plan=np.zeros(keys),
        copy=copy,
        copy_plan=np.zeros(copies),
        coming=np.full(keys, st.NONE, dtype=np.int32),
        static=static,
        size=size,
        part_ns=part_ns,
        landed=ints(layers),
        here=ints(layers),
        pool=pool,
        member=ints(len(sizes), slots_in_pool),
        heap=ints(len(sizes), 1 if system.eviction.changing or choice[st.LISTED] else 2 * slots_in_pool),
        offered=none(keys, 3),
        offered_score=np.zeros(keys),
        popularity=_plain(knowledge.popularity, np.float64),
        totals=ints(layers, experts),
        belief=np.zeros((layers, experts)),
        has_belief=ints(layers),
        link=ints(4, 9),
        queue=none(8, 2),
        ring=ints(2, 4 * keys + 4096 if system.transfer.write_back else copies, 3),
        flow=np.zeros((4, 3)),
        flow_at=ints(4, 3),
        flow_order=ints(4),
        capacity=capacity,
        uses=uses,
        event=ints(EVENTS, 5),
        tier=ints(keys, 3),
        tier_bytes=ints(keys),
        arrived=ints(2 * experts + 1),
        done=ints(2 * experts),
        planned=ints(keys, 2),
        older=none(keys),
        wanted=ints(2 * experts + 1, 2),
        mark=ints(2 * experts),
        count=ints(2 * experts),
        tally=ints(experts),
        next_of=ints(experts),
        taken=ints(trace.top_k),
        resident=ints(2 * experts),
        late=ints(2 * experts),
        missed=ints(2 * experts),
        asked=ints(2 * experts),
        need=ints(6 * experts + 4, 3),
        single=none(3, SINGLE),
        cost_key=ints(1 << 12),
        cost_ns=ints(1 << 12),
        arena=ints(ARENA if system.prefetch.latency_ns else 1),
        call=ints(64 * layers + 4096, 4),
        rates=np.zeros(4),
        rank=np.zeros(1),
        ranked=ints(1, 3),
        values=np.zeros((PLANS, layers, experts) if system.refresh else (1, 1, 1)),
        altered=ints(3, layers, len(trace.tasks)),
        layer_row=ints(1, st.ROW_WIDTHS["layers"]),
        transfer_row=ints(1, st.ROW_WIDTHS["transfers"]),
        kernel_row=ints(1, st.ROW_WIDTHS["kernels"]),
        row=ints(0),
        first=ints(2),
        mixer_ns=ints(0, 1),
        kind=np.array(table.layer_kinds, dtype=np.int64),
        step_ns=ints(0),
        slots=ints(0, len(sizes)),
        end=ints(0),
        **_routing(trace, system, knowledge),
    )
    s.link[:, st.L_FLIGHT] = st.NONE
    s.entry[:, st.READ_END], s.entry[:, st.BEFORE] = -1, OUT
    if tier is not None:
        _fill_tier(s, tier, experts)
    return s


def pool_sizes(system: System, slots: Slots) -> list[int]:
    """Bytes of each pool: full precision, then low."""
    if system.eviction.scope == "layer":
        return [*slots.per_layer, *slots.low]
    return [sum(slots.per_layer), *([sum(slots.low)] if slots.low else [])]


def _bytes_and_times(
    table: CostTable, system: System, layers: int, experts: int, by_layer: bool, reads: bool
) -> tuple[NDArray[np.int32], st.I64, st.I64]:
    """Per key: `static`; per size: bytes; per size and part: (bytes, ns over the link, ns from the drive, ns back)."""
    parts = table.matrices if system.transfer.unit == "matrix" else 1
    low_bits = system.misses.low_bits
    static = np.zeros((layers * 2 * experts, 8), dtype=np.int32)
    rows: dict[int, int] = {}  # of part_ns, by size
    reads = reads or table.unified
    for layer in range(layers):
        sizes = [table.expert_bytes(layer, None, e) for e in range(experts)]
        sizes += [table.expert_bytes(layer, low_bits) if low_bits else 0] * experts
        base = layer * 2 * experts
        for expert, size in enumerate(sizes):
            low = expert >= experts
            pool = low * (layers if by_layer else 1) + (layer if by_layer else 0)
            static[base + expert, :5] = pool, layer, expert, expert % experts, rows.setdefault(size, len(rows))
    times = [_part_times(table, size, parts, reads, system.transfer.write_back) for size in rows]
    return static, np.array(list(rows), dtype=np.int64), np.stack(times)


def _part_times(table: CostTable, size: int, parts: int, reads: bool, back: bool) -> NDArray[np.int64]:
    times = np.zeros((3, 4), dtype=np.int64)
    left = size
    for i in range(parts if size else 0):
        part = -(-left // (parts - i))
        times[i] = part, 0 if table.unified else table.copy_ns(part), table.read_ns(part) if reads else 0, 0
        left -= part
    if back and size:
        times[0, 3] = table.copy_back_ns(size)
    return times


def _choices(
    trace: Trace, table: CostTable, system: System, slots: Slots, detail: bool, tier: HostTier | None, seed: int,
    waves: int,
) -> st.I64:  # fmt: skip
    eviction, misses, prefetch = system.eviction, system.misses, system.prefetch
    values = {
        st.LAYERS: trace.layers, st.EXPERTS: trace.info.experts, st.TOP_K: trace.top_k,
        st.GLOBAL: eviction.scope == "global", st.CHANGING: eviction.changing, st.TERMS: len(eviction.score),
        st.PRODUCT: eviction.combine == "product", st.HORIZON: eviction.window * trace.layers,
        st.LOOKS_AHEAD: eviction.looks_ahead, st.RULE: RULES[misses.rule], st.KEEP: misses.keep, st.DEFER: misses.defer,
        st.LATE_HOST: misses.late_host, st.HOST_BELOW: misses.host_below,
        st.WRITE_BACK: system.transfer.write_back, st.UNIT_LAYER: system.transfer.unit == "layer",
        st.PARTS: table.matrices if system.transfer.unit == "matrix" else 1,
        st.PER_LAYER: -1 if prefetch.per_layer is None else prefetch.per_layer,
        st.FIRST_MISSING: prefetch.first_missing, st.PIN: prefetch.pin, st.LATENCY: prefetch.latency_ns,
        st.BLOCKING: prefetch.blocking, st.ORDER: ORDERS[prefetch.order], st.BULK: prefetch.bulk,
        st.CACHE: system.cache,
        st.KEEPS_PREFETCHED: system.cache and (misses.keep or not system.placement.pinned),
        st.LOW_POOLS: bool(slots.low), st.UNIFIED: table.unified, st.HANDOFF_NS: table.handoff_ns,
        st.TIERED: tier is not None, st.TIER_CAPACITY: tier.capacity if tier else 0, st.DETAIL: detail, st.SEED: seed,
        st.WAVES: waves, st.COUNTS_TOTALS: any(name == "count" for name, _ in eviction.score),
        st.LISTED: eviction.score == (("lru", 1.0),) and not eviction.changing,
    }  # fmt: skip
    choice = np.zeros(64, dtype=np.int64)
    for at, value in values.items():
        choice[at] = value
    return choice


def _sharing(table: CostTable, system: System, reads: bool) -> tuple[st.I64, st.F64, bool]:
    """(uses of each link, capacities, whether anything is shared), as moesim.engine.residency connects them."""
    from moesim.engine.residency import shared_capacities

    shared = shared_capacities(table, system, reads)
    dram, pcie = int("dram" in shared), 2 * int("pcie" in shared)
    uses = np.zeros(4, dtype=np.int64)
    uses[[H2D, D2H, NVME, HOST]] = dram | pcie, dram | pcie, dram, dram
    return uses, np.array([shared.get("dram", np.inf), shared.get("pcie", np.inf)]), bool(shared)


def _fill_tier(s: State, tier: HostTier, experts: int) -> None:
    """What host memory holds at the start, in order of use."""
    before = st.NONE
    for layer, expert in tier.held:
        key = layer * 2 * experts + expert
        s.tier[key] = 1, before, st.NONE
        if before == st.NONE:
            s.g[st.TIER_HEAD] = key
        else:
            s.tier[before, 2] = key
        s.tier_bytes[key] = tier.held[layer, expert]
        before = key
    s.g[st.TIER_TAIL], s.g[st.TIER_USED] = before, tier.used
