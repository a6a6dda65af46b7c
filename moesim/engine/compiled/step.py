"""Steps, compiled: one call runs a device through as many steps as it is given (moesim.engine.events.Device.step)."""

from __future__ import annotations

import zlib
from pathlib import Path

from numba import njit

from moesim.engine.compiled import victims
from moesim.engine.compiled.beliefs import collect, make_plan, prefetch_calls, prefetch_later
from moesim.engine.compiled.jit import folded, inner
from moesim.engine.compiled.layer import begin_on_host, bring_in, classify, find_wanted, lacking_costs, substitute
from moesim.engine.compiled.state import (
    ARRIVED,
    ARRIVED_HEAD,
    AT_LAYER,
    AT_STEP,
    BEGAN,
    BLOCKING,
    BROUGHT,
    BULK,
    BYTES,
    COST_HIGH,
    COST_LOW,
    DEFER,
    DEFERRED,
    DETAIL,
    DONE_RUN,
    ERROR,
    EVENTS,
    EXPERTS,
    FLOW_END,
    FORESEEN,
    FULL,
    GUARD,
    HANDOFF,
    HIGH_USES,
    HITS,
    HITS_BEFORE,
    HOSTED_HERE,
    HOSTING,
    IDLE_NS,
    KEPT,
    KERNEL_ROWS,
    L_BUSY,
    L_FLIGHT,
    LANDED,
    LANDING,
    LANDING_AWAITED,
    LAST_STEP,
    LAST_USE,
    LATENCY,
    LATES,
    LATES_BEFORE,
    LAYER_ROWS,
    LAYERS,
    LINK_END,
    MISSES,
    MISSES_BEFORE,
    NEED_COSTS,
    NEEDS,
    NEXT_END,
    NEXT_USE,
    NONE,
    NOW,
    OUTSTANDING,
    PEAK,
    PHASE,
    PINNED,
    PLAN,
    POSITION,
    PRECISION,
    READ_END,
    REROUTE,
    RESIDENT,
    ROUTED,
    ROW_AT,
    ROW_END,
    RULE,
    S_EXPERT,
    S_POOL,
    SEQUENCE_STEPS,
    SETTLED,
    SKIP_RULE,
    SPENT_EXPERTS,
    SPENT_HOST,
    SPENT_MIXER,
    SPENT_NVME,
    SPENT_PCIE,
    SPENT_PREDICT,
    SPENT_STEP,
    STARTED,
    STEPS,
    STUCK,
    TIMERS,
    TOKENS,
    UNIFIED,
    UNTIL,
    USES,
    WAITED,
    WAKE,
    WAKING,
    WAVES,
)  # fmt: skip
from moesim.engine.compiled.transfers import (
    copy_ended,
    cost_key,
    cost_place,
    end_flow,
    end_layer,
    evict,
    find_cost,
    last_link,
    next_id,
    pop_event,
    release,
    schedule,
    work_ended,
)  # fmt: skip
from moesim.engine.compiled.victims import CAPACITY, MEMBERS, USED, bytes_of, static
from moesim.engine.residency import H2D, NVME

MIXER, RESIDENT_KERNEL, ARRIVED_KERNEL, STEP = range(4)  # moesim.records.KERNELS
NEW_STEP, NEW_LAYER, LOOK_UP, COMPUTE_RESIDENT, COMPUTE_ARRIVED = range(5)  # PHASE


@inner
def dispatch(s):
    """Let the next event happen; returns (its id, its kind)."""
    row = s.event[pop_event(s)]
    at, number, kind, a, b = row[0], row[1], row[2], row[3], row[4]
    s.g[NOW] = at
    if kind == LINK_END or (kind == FLOW_END and end_flow(s, a, b)):
        if a in (H2D, NVME):
            copy_ended(s, a)
        else:
            work_ended(s, a)
    elif kind == HANDOFF:
        begin_on_host(s, a)
    elif kind == FORESEEN:
        s.g[TIMERS] -= 1
        prefetch_calls(s, a, b)
    elif kind == PLAN:
        make_plan(s, s.values[a])
    return number, kind


@folded
def pass_time(s, ns):
    """The step goes on `ns` from now; whatever happens before, or was asked for earlier, happens first."""
    until, number = s.g[NOW] + ns, next_id(s)
    while s.g[EVENTS] and (s.event[0, 0] < until or (s.event[0, 0] == until and s.event[0, 1] < number)):
        dispatch(s)
    s.g[NOW] = until


@folded
def _await_flight(s, flight):
    while s.g[EVENTS]:
        number, _ = dispatch(s)
        if number == flight:
            return True
    return False


@folded
def _await_kind(s, kind):
    while s.g[EVENTS]:
        _, happened = dispatch(s)
        if happened == kind:
            return True
    return False


@inner
def _record_kernel(s, start, end, layer, what):
    if not s.choice[DETAIL]:
        return
    place = s.g[KERNEL_ROWS]
    if place == s.kernel_row.shape[0]:
        s.g[ERROR] = 3
        return
    row = s.kernel_row[place]
    row[0], row[1], row[2], row[3] = start, end, layer, what
    s.g[KERNEL_ROWS] = place + 1


@folded
def _foresee(s, layer):
    """What becomes known at this moment turns into prefetches."""
    first, count = collect(s, layer)
    if not count:
        return
    latency = s.choice[LATENCY]
    if latency and not s.choice[BLOCKING]:
        prefetch_later(s, first, count)
        return
    if latency:
        s.g[TIMERS] += 1  # so that the calls outlive others made meanwhile
        pass_time(s, latency)
        s.g[TIMERS] -= 1
        s.g[SPENT_PREDICT] += latency
    prefetch_calls(s, first, count)


@folded
def _settle(s):
    """Wait until nothing is on its way; what finds no slot is left for its layer."""
    since = s.g[NOW]
    while s.link[last_link(s), L_BUSY] or s.link[NVME, L_BUSY]:
        s.g[LANDING_AWAITED] = 1
        if not _await_kind(s, LANDING):
            return False
    s.g[SETTLED] = s.g[NOW] - since
    s.g[SPENT_NVME if s.choice[UNIFIED] else SPENT_PCIE] += s.g[SETTLED]
    return True


@inner
def resize(s, sizes):
    """New capacities between two steps; the lowest scores leave first. sizes: [pools] bytes."""
    for p in range(len(sizes)):
        s.pool[p, CAPACITY] = sizes[p]
        while s.pool[p, USED] > s.pool[p, CAPACITY]:
            who = victims.victim(s, p, False)
            if who == NONE:
                who = victims.victim(s, p, True)
            if who == NONE:
                break
            evict(s, who)


@inner
def resident_bytes(s):
    total = 0
    for p in range(s.pool.shape[0]):
        total += s.pool[p, USED]
    return total


@folded
def _start_step(s):
    g, at = s.g, s.g[AT_STEP]
    g[PEAK] = max(g[PEAK], resident_bytes(s))
    if s.slots.shape[0]:
        resize(s, s.slots[at])
    g[STARTED] = g[NOW]
    if s.step_ns[at]:
        pass_time(s, s.step_ns[at])
        g[SPENT_STEP] += s.step_ns[at]
    if s.choice[WAVES]:
        _foresee(s, -1)
    if s.choice[BULK] and not _settle(s):
        return False
    g[AT_LAYER], g[PHASE] = 0, NEW_LAYER
    return True


@folded
def _start_layer(s):
    g, layer = s.g, s.g[AT_LAYER]
    g[BEGAN] = g[NOW]
    mixer_ns = s.mixer_ns[g[AT_STEP], s.kind[layer]]
    if mixer_ns:
        pass_time(s, mixer_ns)
        g[SPENT_MIXER] += mixer_ns
    _record_kernel(s, g[BEGAN], g[NOW], layer, MIXER)
    g[POSITION] = g[STEPS] * s.choice[LAYERS] + layer
    g[ROUTED] = g[NOW]
    g[HITS_BEFORE], g[LATES_BEFORE], g[MISSES_BEFORE] = g[HITS], g[LATES], g[MISSES]
    find_wanted(s, layer)
    g[PHASE] = LOOK_UP


@folded
def _look_up(s):
    g, layer, rule = s.g, s.g[AT_LAYER], s.choice[RULE]
    n_late, n_missed = classify(s, layer)
    if rule in (REROUTE, SKIP_RULE) and (n_late or n_missed) and s.landed[layer]:
        substitute(s, layer, n_missed)
        n_late = n_missed = 0
    g[HOSTED_HERE] = bring_in(s, layer, n_late, n_missed)
    g[DEFERRED] = min(s.choice[DEFER], g[HOSTED_HERE]) if layer + 1 < s.choice[LAYERS] else 0
    if s.choice[WAVES]:
        _foresee(s, layer)
    g[WAITED], g[SETTLED] = g[SETTLED], 0
    g[PHASE] = COMPUTE_RESIDENT


@inner
def _grouped_ns(s):
    """One grouped kernel per precision over `resident`; NONE, with the need noted, where a cost is lacking."""
    experts = s.choice[EXPERTS]
    high = low = high_tokens = low_tokens = 0
    for i in range(s.g[RESIDENT]):
        key = s.resident[i]
        tokens = s.entry[key, TOKENS]
        if s.choice[RULE] == PRECISION and static(s, key, S_EXPERT) >= experts:
            low, low_tokens = low + 1, low_tokens + tokens
        else:
            high, high_tokens = high + 1, high_tokens + tokens
    total = 0
    s.g[NEEDS] = 0
    for kind, active, tokens in ((COST_HIGH, high, high_tokens), (COST_LOW, low, low_tokens)):
        if active:
            ns = find_cost(s, kind, active, tokens)
            if ns == NONE:
                need = s.need[s.g[NEEDS]]
                need[0], need[1], need[2] = kind, active, tokens
                s.g[NEEDS] += 1
            total += ns
    return NONE if s.g[NEEDS] else total


@inner
def _computed(s, ns, layer, what):
    s.g[SPENT_EXPERTS] += ns
    _record_kernel(s, s.g[NOW] - ns, s.g[NOW], layer, what)


@folded
def _compute_resident(s):
    """False where a cost is lacking."""
    g = s.g
    if g[RESIDENT]:
        ns = _grouped_ns(s)
        if ns == NONE:
            return False
        pass_time(s, ns)
        _computed(s, ns, g[AT_LAYER], RESIDENT_KERNEL)
        for i in range(g[RESIDENT]):
            release(s, s.resident[i])
    g[PHASE] = COMPUTE_ARRIVED
    return True


@inner
def _charge_wait(s, since):
    """To what ended it: the copy that arrived (its NVMe read first), or the host."""
    g, now = s.g, s.g[NOW]
    if not g[ARRIVED]:
        g[SPENT_HOST] += now - since
        return
    read_end = s.entry[s.arrived[g[ARRIVED_HEAD]], READ_END]
    if read_end > since:
        g[SPENT_NVME] += read_end - since
        since = read_end
    g[SPENT_NVME if s.choice[UNIFIED] else SPENT_PCIE] += now - since


@folded
def _compute_arrived(s):
    """What arrives, in order of arrival, until nothing is awaited; False where nothing can go on."""
    g, experts = s.g, s.choice[EXPERTS]
    while g[ARRIVED] or g[OUTSTANDING] or g[HOSTING] > g[DEFERRED]:
        if not g[ARRIVED]:
            since = g[NOW]
            while not g[ARRIVED] and (g[OUTSTANDING] or g[HOSTING] > g[DEFERRED]):
                flight = s.link[last_link(s), L_FLIGHT] if g[OUTSTANDING] else NONE
                if flight == NONE:  # nothing to wait for by name: the next arrival or the host says so
                    g[WAKING] = 1
                    if not _await_kind(s, WAKE):
                        return False
                elif not _await_flight(s, flight):
                    return False
            g[WAITED] += g[NOW] - since
            _charge_wait(s, since)
        if g[ARRIVED]:
            key = s.arrived[g[ARRIVED_HEAD]]
            g[ARRIVED_HEAD] += 1
            if g[ARRIVED_HEAD] == s.arrived.shape[0]:
                g[ARRIVED_HEAD] = 0
            g[ARRIVED] -= 1
            tokens = s.entry[key, TOKENS]
            if tokens:
                low = s.choice[RULE] == PRECISION and static(s, key, S_EXPERT) >= experts
                ns = find_cost(s, COST_LOW if low else COST_HIGH, 1, tokens)
                pass_time(s, ns)
                _computed(s, ns, g[AT_LAYER], ARRIVED_KERNEL)
            release(s, key)
    return True


@folded
def _end_layer(s):
    g, layer = s.g, s.g[AT_LAYER]
    end_layer(s, layer)
    if s.choice[DETAIL]:
        row = s.layer_row[g[LAYER_ROWS]]
        row[0], row[1], row[2], row[3], row[4] = g[STEPS], layer, g[BEGAN], g[ROUTED], g[NOW]
        row[5], row[6] = g[HITS] - g[HITS_BEFORE], g[LATES] - g[LATES_BEFORE]
        row[7], row[8], row[9] = g[MISSES] - g[MISSES_BEFORE], g[HOSTED_HERE], g[WAITED]
        g[LAYER_ROWS] += 1
    g[AT_LAYER] += 1
    g[PHASE] = NEW_LAYER


@folded
def _end_step(s):
    g, at = s.g, s.g[AT_STEP]
    _record_kernel(s, g[STARTED], g[STARTED] + s.step_ns[at], -1, STEP)
    s.end[at] = g[NOW]
    g[STEPS] += 1
    g[SEQUENCE_STEPS] += 1
    g[AT_STEP] += 1
    g[PHASE] = NEW_STEP


@inner
def _advance(s):
    """Run steps from `AT_STEP` on; returns how it ended. NEED_COSTS: fill the table in and call again."""
    g, layers = s.g, s.choice[LAYERS]
    steps = s.first.shape[0] - 2
    if g[IDLE_NS]:
        pass_time(s, g[IDLE_NS])
        g[IDLE_NS] = 0
        return DONE_RUN
    while True:
        if g[ERROR]:
            return FULL
        if g[PHASE] == NEW_STEP:
            at = g[AT_STEP]
            if at == steps or (at and g[NOW] >= g[UNTIL]):
                return DONE_RUN
            g[ROW_AT], g[ROW_END], g[NEXT_END] = s.first[at], s.first[at + 1], s.first[at + 2]
            if at + 1 == steps:
                g[NEXT_END] = s.row.shape[0]
            if not _start_step(s):
                return STUCK
        if g[PHASE] == NEW_LAYER:
            _start_layer(s)
        if g[PHASE] == LOOK_UP:
            if lacking_costs(s):
                return NEED_COSTS
            _look_up(s)
        if g[PHASE] == COMPUTE_RESIDENT and not _compute_resident(s):
            return NEED_COSTS
        if not _compute_arrived(s):
            return STUCK
        _end_layer(s)
        if g[AT_LAYER] == layers:
            _end_step(s)


@inner
def _place(s, layer, expert, pinned):
    """Put an expert there before time begins, if it fits."""
    key = layer * 2 * s.choice[EXPERTS] + expert
    p = static(s, key, S_POOL)
    if s.pool[p, USED] + bytes_of(s, key) > s.pool[p, CAPACITY]:
        return
    e = s.entry[key]
    s.held[key] = LANDED
    e[BYTES], e[BROUGHT], e[KEPT] = bytes_of(s, key), victims.take_order(s), PINNED if pinned else 1
    e[LAST_USE], e[NEXT_USE], e[GUARD] = -1, 1 << 60, -1
    s.landed[layer] += 1
    s.here[layer] += 1
    victims.add(s, p, key)
    victims.offer(s, key)


@inner
def _new_sequence(s):
    """Uses are forgotten."""
    s.g[SEQUENCE_STEPS] = 0
    for p in range(s.pool.shape[0]):
        for i in range(s.pool[p, MEMBERS]):
            e = s.entry[s.member[p, i]]
            e[USES] = e[HIGH_USES] = e[LAST_STEP] = 0
        victims.rebuild(s, p)


@inner
def _plan_later(s, delay, slot):
    schedule(s, delay, PLAN, slot, 0)


@inner
def _put_cost(s, kind, active, tokens, ns):
    """Whether it is new to the table."""
    if active <= 1 and tokens < s.single.shape[1]:
        s.single[kind, tokens] = ns
        return False
    key = cost_key(kind, active, tokens)
    place = cost_place(s.cost_key, key)
    if s.cost_key[place] == key:
        return False
    s.cost_key[place], s.cost_ns[place] = key, ns
    return True


@inner
def _rehash(s, keys, times):
    for i in range(len(keys)):
        if keys[i]:
            place = cost_place(s.cost_key, keys[i])
            s.cost_key[place], s.cost_ns[place] = keys[i], times[i]


def _sources() -> int:
    """A sum over these files, which together make the machine code of an entry."""
    names = ("jit", "state", "victims", "transfers", "beliefs", "layer", "step")
    return zlib.crc32(b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)) | 1


def _entries(sources):
    """What Python calls, compiled and cached.

    A cache is looked up by the file of a function and by what its closure holds. These hold the machine code of all of
    `_sources`, so their sum is in the closure; the functions themselves are globals, which are not looked at.
    """
    entry = njit(cache=True, nogil=True, error_model="numpy")

    @entry
    def advance(s):
        assert sources
        return _advance(s)

    @entry
    def place(s, layer, expert, pinned):
        assert sources
        return _place(s, layer, expert, pinned)

    @entry
    def new_sequence(s):
        assert sources
        return _new_sequence(s)

    @entry
    def plan_later(s, delay, slot):
        assert sources
        return _plan_later(s, delay, slot)

    @entry
    def put_cost(s, kind, active, tokens, ns):
        assert sources
        return _put_cost(s, kind, active, tokens, ns)

    @entry
    def rehash(s, keys, times):
        assert sources
        return _rehash(s, keys, times)

    return advance, place, new_sequence, plan_later, put_cost, rehash


advance, place, new_sequence, plan_later, put_cost, rehash = _entries(_sources())
