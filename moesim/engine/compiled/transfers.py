"""Events, shared bandwidth, links and executors, compiled: moesim.engine.fluid and links, event by event."""

from __future__ import annotations

import math

from moesim.engine.compiled import victims
from moesim.engine.compiled.jit import folded, inner
from moesim.engine.compiled.state import (
    ARRIVED,
    ARRIVED_HEAD,
    BLOCKED,
    BROUGHT,
    BUSY,
    BYTES,
    C_AFTER,
    C_BEFORE,
    C_CHAIN,
    C_DEMAND,
    C_EXPERT,
    C_EXPIRES,
    C_FLYING,
    C_KEEP,
    C_KEY,
    C_LAYER,
    C_LEFT,
    C_LINK,
    C_NEXT,
    C_ON_READ,
    C_PARTS,
    C_PROMOTED,
    C_QUEUE,
    C_READ_END,
    C_RESERVED,
    C_SIZE,
    C_TICK,
    C_TOKENS,
    C_USED,
    C_WANTED,
    CACHE,
    COST_HOST,
    DEFERRED,
    DETAIL,
    DONE,
    DROPPED,
    ERROR,
    EVENT_ID,
    EVENTS,
    EXPERTS,
    FLOW_END,
    FLOW_VERSION,
    FLOWS,
    FLUID,
    FREE_COPY,
    GUARD,
    HIGH_USES,
    HOSTING,
    KEEP,
    KEPT,
    L_BUSY,
    L_BUSY_NS,
    L_BYTES,
    L_COPY,
    L_COUNT,
    L_FLIGHT,
    L_HEAD,
    L_PART,
    L_STARTED,
    LANDED,
    LANDING,
    LANDING_AWAITED,
    LAST_STEP,
    LAST_USE,
    LINK_END,
    LOOKS_AHEAD,
    NEXT_USE,
    NONE,
    NOW,
    OUTSTANDING,
    PARTS,
    PIN,
    PINNED,
    POSITION,
    PREFETCH_USED_BYTES,
    PREFETCHED,
    PREFETCHED_BYTES,
    PREFETCHED_N,
    READ_END,
    RESERVED,
    S_EXPERT,
    S_LAYER,
    S_POOL,
    S_SIZE,
    SCRATCH,
    SEQUENCE_STEPS,
    THROTTLED,
    TICK,
    TIER_CAPACITY,
    TIER_HEAD,
    TIER_TAIL,
    TIER_USED,
    TIERED,
    TOKENS,
    TRANSFER_ROWS,
    UNIFIED,
    USES,
    WAKE,
    WAKING,
    WRITE_BACK,
)  # fmt: skip
from moesim.engine.compiled.victims import CAPACITY, USED, bytes_of, static
from moesim.engine.residency import COMPUTE, D2H, DEMAND, H2D, HOST, LATE, NEVER, NVME, PLANNED, PREFETCH
from moesim.engine.residency import WRITE_BACK as WRITTEN_BACK

LEFT, OWN, RATE = range(3)  # columns of `flow`
SINCE, END, VERSION = range(3)  # columns of `flow_at`
NO_PLAN = 0.0


# -- events: a heap by time, then by the order in which they were asked for, as SimPy's ------------------------------


@inner
def next_id(s):
    s.g[EVENT_ID] += 1
    return s.g[EVENT_ID]


@inner
def schedule(s, delay, kind, a, b):
    """An event after `delay` ns; returns its id."""
    event, i = s.event, s.g[EVENTS]
    if i == event.shape[0] - 1:
        s.g[ERROR] = 1
        return NONE
    s.g[EVENTS] = i + 1
    at, number = s.g[NOW] + delay, next_id(s)
    while i > 0:
        up = (i - 1) >> 1
        if event[up, 0] <= at:  # ids grow, so of equal times the older stays above
            break
        for c in range(5):
            event[i, c] = event[up, c]
        i = up
    event[i, 0], event[i, 1], event[i, 2], event[i, 3], event[i, 4] = at, number, kind, a, b
    return number


@inner
def pop_event(s):
    """Move the first event to the row behind the last, and return that row."""
    event, last = s.event, s.g[EVENTS] - 1
    s.g[EVENTS] = last
    for c in range(5):
        event[last, c], event[0, c] = event[0, c], event[last, c]
    at, number = event[0, 0], event[0, 1]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            break
        if child + 1 < last and (
            event[child + 1, 0] < event[child, 0]
            or (event[child + 1, 0] == event[child, 0] and event[child + 1, 1] < event[child, 1])
        ):
            child += 1
        if event[child, 0] > at or (event[child, 0] == at and event[child, 1] > number):
            break
        for c in range(5):
            event[i, c], event[child, c] = event[child, c], event[i, c]
        i = child
    return last


# -- shared bandwidth ---------------------------------------------------------------------------------------------


@inner
def run_flow(s, which, nbytes, alone_ns):
    """Start an activity of one link; returns the id of its end where that is certain already, else NONE."""
    uses = s.uses[which]
    if not s.choice[FLUID] or not uses or not nbytes or not alone_ns:
        return schedule(s, alone_ns, LINK_END, which, 0)
    now = s.g[NOW]
    s.flow[which, LEFT] = float(nbytes)
    s.flow[which, OWN] = nbytes / alone_ns
    s.flow[which, RATE] = s.flow[which, OWN]
    s.flow_at[which, SINCE], s.flow_at[which, END] = now, now + alone_ns
    s.flow_order[s.g[FLOWS]] = which
    s.g[FLOWS] += 1
    _schedule_flow(s, which)
    share(s)
    return NONE


@inner
def _schedule_flow(s, which):
    s.g[FLOW_VERSION] += 1
    s.flow_at[which, VERSION] = s.g[FLOW_VERSION]
    schedule(s, s.flow_at[which, END] - s.g[NOW], FLOW_END, which, s.g[FLOW_VERSION])


@inner
def _fair_rates(s, rates):
    """Max-min fair rates of the flows in their order, as moesim.engine.fluid.fair_rates computes them."""
    n = s.g[FLOWS]
    left0, left1 = s.capacity[0], s.capacity[1]
    rising = (1 << n) - 1
    for i in range(n):
        rates[i] = 0.0
        if not s.flow[s.flow_order[i], OWN] > 0:
            rising &= ~(1 << i)
    while rising:
        users0 = users1 = 0
        rise = math.inf
        for i in range(n):
            if rising >> i & 1:
                which = s.flow_order[i]
                users0 += s.uses[which] & 1
                users1 += s.uses[which] >> 1 & 1
                rise = min(rise, s.flow[which, OWN] - rates[i])
        if users0:
            rise = min(rise, left0 / users0)
        if users1:
            rise = min(rise, left1 / users1)
        for i in range(n):
            if rising >> i & 1:
                rates[i] += rise
        left0 -= rise * users0
        left1 -= rise * users1
        full = (1 if left0 <= 1e-12 * s.capacity[0] else 0) | (2 if left1 <= 1e-12 * s.capacity[1] else 0)
        for i in range(n):
            which = s.flow_order[i]
            own = s.flow[which, OWN]
            if rising >> i & 1 and (own - rates[i] <= 1e-12 * own or s.uses[which] & full):
                rising &= ~(1 << i)


@inner
def share(s):
    """Give every flow its rate; only those whose rate changes get a new end."""
    n = s.g[FLOWS]
    load0 = load1 = 0.0
    for i in range(n):
        which = s.flow_order[i]
        if s.uses[which] & 1:
            load0 += s.flow[which, OWN]
        if s.uses[which] & 2:
            load1 += s.flow[which, OWN]
    if not s.g[THROTTLED] and load0 <= s.capacity[0] and load1 <= s.capacity[1]:
        return
    rates = s.rates
    _fair_rates(s, rates)
    now = s.g[NOW]
    throttled = 0
    for i in range(n):
        which = s.flow_order[i]
        own, rate = s.flow[which, OWN], rates[i]
        if abs(rate - s.flow[which, RATE]) > 1e-9 * own:
            s.flow[which, LEFT] -= s.flow[which, RATE] * (now - s.flow_at[which, SINCE])
            s.flow_at[which, SINCE], s.flow[which, RATE] = now, rate
            s.flow_at[which, END] = now + max(0, math.ceil(s.flow[which, LEFT] / rate - 1e-6))
            _schedule_flow(s, which)
        if s.flow[which, RATE] < own * (1 - 1e-9):
            throttled = 1
    s.g[THROTTLED] = throttled


@inner
def end_flow(s, which, version):
    """Whether this is its true end: an end that was moved leaves its old event behind."""
    if s.flow_at[which, VERSION] != version:
        return False
    s.flow_at[which, VERSION] = 0
    place = 0
    while s.flow_order[place] != which:
        place += 1
    s.g[FLOWS] -= 1
    for i in range(place, s.g[FLOWS]):
        s.flow_order[i] = s.flow_order[i + 1]
    share(s)
    return True


# -- executors: the host and the way back -------------------------------------------------------------------------


@inner
def submit_work(s, which, nbytes, alone_ns, what):
    ring = s.ring[0 if which == D2H else 1]
    link = s.link[which]
    if link[L_COUNT] == ring.shape[0]:
        s.g[ERROR] = 2
        return
    place = (link[L_HEAD] + link[L_COUNT]) % ring.shape[0]
    ring[place, 0], ring[place, 1], ring[place, 2] = nbytes, alone_ns, what
    link[L_COUNT] += 1
    if not link[L_BUSY]:
        _start_work(s, which)


@inner
def _start_work(s, which):
    ring, link = s.ring[0 if which == D2H else 1], s.link[which]
    head = link[L_HEAD]
    link[L_BUSY], link[L_STARTED] = 1, s.g[NOW]
    run_flow(s, which, ring[head, 0], ring[head, 1])


@inner
def work_ended(s, which):
    ring, link = s.ring[0 if which == D2H else 1], s.link[which]
    head = link[L_HEAD]
    nbytes, what = ring[head, 0], ring[head, 2]
    link[L_HEAD] = (head + 1) % ring.shape[0]
    link[L_COUNT] -= 1
    link[L_BUSY_NS] += s.g[NOW] - link[L_STARTED]
    link[L_BYTES] += nbytes
    link[L_BUSY] = 0
    if which == D2H:
        layer, expert = static(s, what, S_LAYER), static(s, what, S_EXPERT)
        record_transfer(s, D2H, link[L_STARTED], layer, expert, nbytes, WRITTEN_BACK)
    else:
        _host_ended(s, what)
    if link[L_COUNT] and not link[L_BUSY]:
        _start_work(s, which)


@inner
def _host_ended(s, copy):
    g, c = s.g, s.copy[copy]
    g[HOSTING] -= 1
    record_transfer(s, HOST, s.link[HOST, L_STARTED], c[C_LAYER], c[C_EXPERT], c[C_SIZE], COMPUTE)
    free_copy(s, copy)
    if g[HOSTING] <= g[DEFERRED] and not g[OUTSTANDING]:
        waken(s)


@folded
def compute_on_host(s, copy):
    c = s.copy[copy]
    submit_work(s, HOST, c[C_SIZE], find_cost(s, COST_HOST, 0, c[C_TOKENS]), copy)


@inner
def record_transfer(s, which, started, layer, expert, nbytes, kind):
    if not s.choice[DETAIL]:
        return
    place = s.g[TRANSFER_ROWS]
    if place == s.transfer_row.shape[0]:
        s.g[ERROR] = 3
        return
    row = s.transfer_row[place]
    row[0], row[1], row[2], row[3], row[4], row[5], row[6] = which, started, s.g[NOW], layer, expert, nbytes, kind
    s.g[TRANSFER_ROWS] = place + 1


# -- the table of costs -------------------------------------------------------------------------------------------


@inner
def cost_key(kind, active, tokens):
    return (((kind << 14) | active) << 40 | tokens) + 1


@inner
def cost_place(keys, key):
    """Where `key` is, or may be put."""
    place = (key * 0x9E3779B97F4A7C1 >> 20) & (keys.shape[0] - 1)
    while keys[place] != key and keys[place] != 0:
        place = (place + 1) & (keys.shape[0] - 1)
    return place


@inner
def find_cost(s, kind, active, tokens):
    """ns, or NONE where the table lacks it."""
    if active <= 1 and tokens < s.single.shape[1]:
        return s.single[kind, tokens]
    key = cost_key(kind, active, tokens)
    place = cost_place(s.cost_key, key)
    return s.cost_ns[place] if s.cost_key[place] == key else NONE


# -- copies and their queues --------------------------------------------------------------------------------------


@inner
def new_copy(s, key, demand, expires, keep):
    copy = s.g[FREE_COPY]
    if copy == NONE:
        s.g[ERROR] = 4
        return 0
    c = s.copy[copy]
    s.g[FREE_COPY] = c[C_CHAIN]
    c[C_LAYER], c[C_EXPERT], c[C_KEY] = static(s, key, S_LAYER), static(s, key, S_EXPERT), key
    c[C_SIZE] = c[C_LEFT] = bytes_of(s, key)
    c[C_PARTS], c[C_DEMAND], c[C_EXPIRES], c[C_KEEP] = s.choice[PARTS], demand, expires, keep
    c[C_PROMOTED] = c[C_FLYING] = c[C_RESERVED] = c[C_ON_READ] = c[C_WANTED] = 0
    c[C_LINK] = c[C_QUEUE] = c[C_CHAIN] = c[C_READ_END] = NONE
    c[C_USED] += 1
    s.copy_plan[copy] = NO_PLAN
    return copy


@inner
def free_copy(s, copy):
    c = s.copy[copy]
    c[C_USED] += 1
    c[C_CHAIN] = s.g[FREE_COPY]
    s.g[FREE_COPY] = copy


@inner
def _append(s, queue, copy):
    c, q = s.copy[copy], s.queue[queue]
    c[C_QUEUE], c[C_BEFORE], c[C_AFTER] = queue, q[1], NONE
    if q[1] == NONE:
        q[0] = copy
    else:
        s.copy[q[1], C_AFTER] = copy
    q[1] = copy


@inner
def _prepend(s, queue, copy):
    c, q = s.copy[copy], s.queue[queue]
    c[C_QUEUE], c[C_BEFORE], c[C_AFTER] = queue, NONE, q[0]
    if q[0] == NONE:
        q[1] = copy
    else:
        s.copy[q[0], C_BEFORE] = copy
    q[0] = copy


@inner
def _unlink(s, copy):
    c = s.copy[copy]
    q = s.queue[c[C_QUEUE]]
    if c[C_BEFORE] == NONE:
        q[0] = c[C_AFTER]
    else:
        s.copy[c[C_BEFORE], C_AFTER] = c[C_AFTER]
    if c[C_AFTER] == NONE:
        q[1] = c[C_BEFORE]
    else:
        s.copy[c[C_AFTER], C_BEFORE] = c[C_BEFORE]
    c[C_QUEUE] = NONE


@inner
def last_link(s):
    return NVME if s.choice[UNIFIED] else H2D


@folded
def submit_to(s, which, copy):
    c = s.copy[copy]
    c[C_LINK] = which
    _append(s, 2 * which + (0 if c[C_DEMAND] else 1), copy)
    if not s.link[which, L_BUSY]:
        kick(s, which)


@folded
def submit(s, copy):
    """An expert sets out for the device, from host memory or first from the drive."""
    s.coming[s.copy[copy, C_KEY]] = copy
    submit_to(s, last_link(s) if in_host(s, s.copy[copy, C_KEY]) else NVME, copy)


@folded
def promote(s, copy):
    """The router wants a queued prefetch: it joins the demands."""
    c = s.copy[copy]
    c[C_DEMAND] = c[C_PROMOTED] = 1
    if c[C_FLYING]:
        return
    _unlink(s, copy)
    which = c[C_LINK]
    _append(s, 2 * which, copy)
    if not s.link[which, L_BUSY]:
        kick(s, which)


@inner
def kick(s, which):
    """Start the next copy if the engine is idle and a slot can be had."""
    if s.link[which, L_BUSY]:
        return
    first = s.queue[2 * which, 0]
    if first != NONE:
        if s.copy[first, C_RESERVED] or reserve(s, which, first):
            _start(s, which, first)
            return
        begun = first  # the first demand waits for a slot: one of which some matrices have come goes on
        while begun != NONE and not s.copy[begun, C_RESERVED]:
            begun = s.copy[begun, C_AFTER]
        if begun == NONE:
            begun = s.queue[2 * which + 1, 0]
        if begun != NONE and s.copy[begun, C_RESERVED]:
            _start(s, which, begun)
        return
    while s.queue[2 * which + 1, 0] != NONE:
        copy = s.queue[2 * which + 1, 0]
        c = s.copy[copy]
        if not c[C_RESERVED] and c[C_EXPIRES] <= s.g[POSITION]:
            _unlink(s, copy)
            s.g[DROPPED] += 1
            s.coming[c[C_KEY]] = NONE
            free_copy(s, copy)
        else:
            if c[C_RESERVED] or reserve(s, which, copy):
                _start(s, which, copy)
            return


@inner
def _start(s, which, copy):
    _unlink(s, copy)
    c, link = s.copy[copy], s.link[which]
    link[L_BUSY], link[L_COPY], link[L_STARTED] = 1, copy, s.g[NOW]
    c[C_FLYING] = 1
    part = s.choice[PARTS] - c[C_PARTS]
    costs = s.part_ns[static(s, c[C_KEY], S_SIZE), part]
    link[L_PART] = costs[0]
    link[L_FLIGHT] = run_flow(s, which, costs[0], costs[2] if which == NVME else costs[1])


@inner
def copy_ended(s, which):
    link = s.link[which]
    copy, part = link[L_COPY], link[L_PART]
    c = s.copy[copy]
    link[L_BUSY_NS] += s.g[NOW] - link[L_STARTED]
    link[L_BYTES] += part
    kind = PREFETCH
    if c[C_PROMOTED]:
        kind = LATE
    elif c[C_DEMAND]:
        kind = DEMAND
    elif s.copy_plan[copy] != NO_PLAN:
        kind = PLANNED
    record_transfer(s, which, link[L_STARTED], c[C_LAYER], c[C_EXPERT], part, kind)
    link[L_BUSY] = c[C_FLYING] = 0
    link[L_FLIGHT] = NONE
    c[C_LEFT] -= part
    c[C_PARTS] -= 1
    if c[C_PARTS]:
        _prepend(s, 2 * which + (0 if c[C_DEMAND] else 1), copy)
    elif which == last_link(s):
        _landed(s, copy)
    else:
        _was_read(s, copy)
    if not link[L_BUSY]:
        kick(s, which)


# -- slots --------------------------------------------------------------------------------------------------------


@folded
def evict(s, key):
    nbytes = s.entry[key, BYTES]
    victims.leave(s, key)
    if s.choice[WRITE_BACK]:
        submit_work(s, D2H, nbytes, s.part_ns[static(s, key, S_SIZE), 0, 3], key)


@inner
def reserve(s, which, copy):
    """Take a slot for a copy that is about to start; False where every slot is in use. A read needs none."""
    if which != last_link(s):
        return True
    g, c = s.g, s.copy[copy]
    key = c[C_KEY]
    p = static(s, key, S_POOL)
    if not c[C_KEEP]:
        if g[SCRATCH] <= (0 if c[C_DEMAND] else 1):  # a prefetch leaves one for demands
            g[BLOCKED] = 1
            return False
        g[SCRATCH] -= 1
    else:
        while s.pool[p, USED] + c[C_LEFT] > s.pool[p, CAPACITY]:
            who = victims.victim(s, p, False)
            if who == NONE and c[C_DEMAND]:
                who = _computed_own(s, p)
                if who == NONE:
                    who = victims.victim(s, p, True)
            elif (
                who != NONE and not c[C_DEMAND] and s.choice[LOOKS_AHEAD] and s.entry[who, NEXT_USE] <= c[C_EXPIRES]
            ):  # who knows the future does not trade an expert for one needed no sooner
                who = NONE
            if who == NONE:
                g[BLOCKED] = 1
                return False
            evict(s, who)
    _occupy(s, copy, key, p)
    return True


@inner
def _occupy(s, copy, key, p):
    g, c, e = s.g, s.copy[copy], s.entry[key]
    high = c[C_EXPERT] < s.choice[EXPERTS]
    s.held[key] = RESERVED
    e[BUSY], e[BYTES], e[BROUGHT] = 0, c[C_LEFT], victims.take_order(s)
    e[KEPT], e[PREFETCHED], e[READ_END] = c[C_KEEP], not c[C_DEMAND], -1
    e[LAST_USE], e[NEXT_USE] = g[TICK], min(c[C_EXPIRES], NEVER)
    e[HIGH_USES] = e[USES] = e[TOKENS] = e[LAST_STEP] = 0
    e[GUARD] = c[C_EXPIRES] if s.choice[PIN] and not c[C_DEMAND] else -1
    s.plan[key] = s.copy_plan[copy]
    if c[C_WANTED]:
        e[LAST_USE], e[NEXT_USE], e[TOKENS] = c[C_TICK], c[C_NEXT], c[C_TOKENS]
        e[BUSY], e[USES], e[LAST_STEP], e[HIGH_USES] = 1, 1, g[SEQUENCE_STEPS], high
    if c[C_KEEP]:
        victims.add(s, p, key)
    s.here[c[C_LAYER]] += 1
    c[C_RESERVED] = 1


@inner
def _computed_own(s, p):
    """More experts than slots: the one of this layer that was computed first makes room for the next."""
    for i in range(s.g[DONE]):
        key = s.done[i]
        if static(s, key, S_POOL) == p and s.entry[key, KEPT] != PINNED:
            s.g[DONE] -= 1
            for j in range(i, s.g[DONE]):
                s.done[j] = s.done[j + 1]
            return key
    return NONE


@folded
def unblock(s):
    if s.g[BLOCKED]:
        s.g[BLOCKED] = 0
        kick(s, last_link(s))


@folded
def discard(s, key):
    victims.forget(s, key)
    s.g[SCRATCH] += 1
    unblock(s)


@folded
def release(s, key):
    """Its tokens are computed. A cached expert stays protected until the layer ends, a scratch slot is free."""
    if s.entry[key, KEPT]:
        s.done[s.g[DONE]] = key
        s.g[DONE] += 1
        unblock(s)
    else:
        discard(s, key)


@folded
def end_layer(s, layer):
    for i in range(s.g[DONE]):
        key = s.done[i]
        s.entry[key, BUSY] = 0
        victims.offer(s, key)
    s.g[DONE] = 0
    if not (s.choice[CACHE] and s.choice[KEEP]) and s.here[layer]:
        width = 2 * s.choice[EXPERTS]
        for key in range(layer * width, (layer + 1) * width):
            if s.held[key] == LANDED and not s.entry[key, KEPT]:
                discard(s, key)
    unblock(s)


@inner
def used(s, key):
    """A prefetched expert is wanted."""
    s.entry[key, PREFETCHED] = 0
    s.g[PREFETCH_USED_BYTES] += s.entry[key, BYTES]


@folded
def _landed(s, copy):
    g, c = s.g, s.copy[copy]
    key, expires, read_end = c[C_KEY], c[C_EXPIRES], c[C_READ_END]
    s.coming[key] = NONE
    if g[LANDING_AWAITED]:
        g[LANDING_AWAITED] = 0
        schedule(s, 0, LANDING, 0, 0)
    e = s.entry[key]
    s.held[key] = LANDED
    s.landed[c[C_LAYER]] += 1
    free_copy(s, copy)
    if e[PREFETCHED]:
        g[PREFETCHED_N] += 1
        g[PREFETCHED_BYTES] += e[BYTES]
        if e[BUSY]:
            used(s, key)
    if e[BUSY]:
        e[READ_END] = read_end
        g[OUTSTANDING] -= 1
        place = g[ARRIVED_HEAD] + g[ARRIVED]
        s.arrived[place if place < s.arrived.shape[0] else place - s.arrived.shape[0]] = key
        g[ARRIVED] += 1
        waken(s)
    elif e[KEPT]:
        victims.offer(s, key)
        unblock(s)
    elif expires <= g[POSITION]:  # its layer is over, and there is no cache to keep it in
        discard(s, key)


@inner
def waken(s):
    if s.g[WAKING]:
        s.g[WAKING] = 0
        schedule(s, 0, WAKE, 0, 0)


# -- host memory in front of the drive ----------------------------------------------------------------------------


@inner
def _tier_unlink(s, key):
    t, g = s.tier[key], s.g
    if t[1] == NONE:
        g[TIER_HEAD] = t[2]
    else:
        s.tier[t[1], 2] = t[2]
    if t[2] == NONE:
        g[TIER_TAIL] = t[1]
    else:
        s.tier[t[2], 1] = t[1]
    t[0] = 0


@inner
def tier_append(s, key):
    """Held, and used last."""
    t, g = s.tier[key], s.g
    t[0], t[1], t[2] = 1, g[TIER_TAIL], NONE
    if g[TIER_TAIL] == NONE:
        g[TIER_HEAD] = key
    else:
        s.tier[g[TIER_TAIL], 2] = key
    g[TIER_TAIL] = key


@inner
def in_host(s, key):
    if not s.choice[TIERED]:
        return True
    if not s.tier[key, 0]:
        return False
    _tier_unlink(s, key)
    tier_append(s, key)
    return True


@inner
def _insert_in_host(s, key, nbytes):
    g = s.g
    if s.tier[key, 0]:
        return
    while g[TIER_HEAD] != NONE and g[TIER_USED] + nbytes > s.choice[TIER_CAPACITY]:
        oldest = g[TIER_HEAD]
        g[TIER_USED] -= s.tier_bytes[oldest]
        _tier_unlink(s, oldest)
    if nbytes <= s.choice[TIER_CAPACITY]:
        tier_append(s, key)
        s.tier_bytes[key] = nbytes
        g[TIER_USED] += nbytes


@folded
def _was_read(s, copy):
    """An NVMe read has reached host memory: the copy goes on over PCIe, or the CPU computes it."""
    c = s.copy[copy]
    c[C_READ_END] = s.g[NOW]
    if s.choice[TIERED]:
        _insert_in_host(s, c[C_KEY], c[C_SIZE])
    if c[C_ON_READ]:
        compute_on_host(s, copy)
        return
    c[C_LEFT], c[C_PARTS] = c[C_SIZE], s.choice[PARTS]
    submit_to(s, H2D, copy)


@folded
def read_for_host(s, copy):
    s.copy[copy, C_ON_READ] = 1
    submit_to(s, NVME, copy)
