"""One layer's routed experts, compiled: who is wanted, what becomes of the absent (moesim.engine.events)."""

from __future__ import annotations

from moesim.engine.compiled.beliefs import FOREVER
from moesim.engine.compiled.jit import inner
from moesim.engine.compiled.state import (
    AT_LAYER,
    BUSY,
    C_CHAIN,
    C_DEMAND,
    C_EXPERT,
    C_FLYING,
    C_KEY,
    C_LATE,
    C_LINK,
    C_NEXT,
    C_PARTS,
    C_RESERVED,
    C_TICK,
    C_TOKENS,
    C_WANTED,
    CHEAPER,
    COST_HIGH,
    COST_HOST,
    COST_LOW,
    COUNTS_TOTALS,
    EXPERTS,
    FETCH,
    HANDOFF,
    HANDOFF_NS,
    HIGH_USES,
    HITS,
    HOST_BELOW,
    HOSTED,
    HOSTING,
    KEEP,
    L_STARTED,
    LANDED,
    LAST_STEP,
    LAST_USE,
    LATE_HOST,
    LATES,
    LISTED,
    LOOKUPS,
    MISSES,
    NEEDS,
    NEXT_USE,
    NONE,
    NOW,
    ON_HOST,
    OUTSTANDING,
    PARTS,
    PRECISION,
    PREFETCHED,
    REROUTE,
    RESIDENT,
    ROW_AT,
    ROW_END,
    RULE,
    S_SIZE,
    SEQUENCE_STEPS,
    SKIP_RULE,
    STAMP,
    TICK,
    TOKENS,
    TOP_K,
    UNIFIED,
    UNIT_LAYER,
    USES,
    WANTED,
)  # fmt: skip
from moesim.engine.compiled.transfers import (
    compute_on_host,
    find_cost,
    free_copy,
    in_host,
    last_link,
    new_copy,
    promote,
    read_for_host,
    schedule,
    submit,
    used,
)  # fmt: skip
from moesim.engine.compiled.victims import static, unlist
from moesim.engine.residency import LOWERED, NEVER, REROUTED, SKIPPED
from moesim.policies import HIGH, LOW, SKIP


@inner
def find_wanted(s, layer):
    """Unique experts in order of first appearance, with how many tokens chose each, into `wanted`."""
    chosen, tally, wanted, n, k = s.chosen, s.tally, s.wanted, 0, s.choice[TOP_K]
    for at in range(s.g[ROW_AT], s.g[ROW_END]):
        row = s.row[at]
        for i in range(k):
            expert = chosen[row, layer, i]
            if expert < 0:
                continue
            tokens = tally[expert]
            wanted[n, 0] = expert  # written over where it has been seen before
            n += tokens == 0
            tally[expert] = tokens + 1
    for place in range(n):
        expert = s.wanted[place, 0]
        s.wanted[place, 1], s.count[expert] = tally[expert], place
        tally[expert] = 0
    s.g[WANTED] = n
    if s.choice[RULE] == PRECISION:
        _lower(s, layer)


@inner
def _level(s, row, layer, rank):
    """HIGH, LOW or SKIP of a token's expert by rank (moesim.policies.precision_levels)."""
    total = before = 0
    for i in range(s.choice[TOP_K]):
        if i == rank:
            before = total
        total += s.share[row, layer, i]
    unimportance = before / (total if total else 1.0)
    if unimportance <= s.thresholds[0]:
        return HIGH
    return LOW if unimportance <= s.thresholds[1] else SKIP


@inner
def _lower(s, layer):
    """The copies the step needs, by level, and account of the weight that is lowered or skipped."""
    g, experts, k = s.g, s.choice[EXPERTS], s.choice[TOP_K]
    base = layer * 2 * experts
    level = s.late  # borrowed: by place in `wanted`
    for n in range(g[WANTED]):
        level[n] = SKIP
    for at in range(s.g[ROW_AT], s.g[ROW_END]):
        row = s.row[at]
        for i in range(k):
            expert = s.chosen[row, layer, i]
            if expert >= 0:
                n = s.count[expert]
                level[n] = max(level[n], _level(s, row, layer, i))
    kept = 0
    fate = s.missed  # borrowed: by place in `wanted`
    for n in range(g[WANTED]):
        expert, tokens = s.wanted[n, 0], s.wanted[n, 1]
        fate[n] = NONE
        if s.held[base + expert] == LANDED or level[n] > LOW:
            s.wanted[kept, 0], s.wanted[kept, 1] = expert, tokens
            kept += 1
        elif level[n] == LOW or s.held[base + expert + experts] == LANDED:
            s.wanted[kept, 0], s.wanted[kept, 1] = expert + experts, tokens
            kept += 1
            fate[n] = LOWERED
        else:
            fate[n] = SKIPPED
    g[WANTED] = kept
    for at in range(s.g[ROW_AT], s.g[ROW_END]):
        row = s.row[at]
        for i in range(k):
            expert = s.chosen[row, layer, i]
            if expert >= 0 and fate[s.count[expert]] != NONE:
                s.altered[fate[s.count[expert]], layer, s.task[row]] += s.share[row, layer, i]


@inner
def lacking_costs(s):
    """Ask for every cost that this layer may need of single experts; returns how many the table lacks."""
    rule, experts = s.choice[RULE], s.choice[EXPERTS]
    base = s.g[AT_LAYER] * 2 * experts
    s.g[NEEDS] = 0
    for n in range(s.g[WANTED]):
        tokens = s.wanted[n, 1]
        if s.held[base + s.wanted[n, 0]] == LANDED:
            continue
        kind = COST_LOW if s.wanted[n, 0] >= experts else COST_HIGH
        if rule != ON_HOST:
            _ask(s, kind, 1, tokens)
        if rule in (ON_HOST, CHEAPER):
            _ask(s, COST_HOST, 0, tokens)
            _ask(s, COST_HIGH, 1, tokens)
    return s.g[NEEDS]


@inner
def _ask(s, kind, active, tokens):
    if find_cost(s, kind, active, tokens) == NONE and s.g[NEEDS] < s.need.shape[0]:
        need = s.need[s.g[NEEDS]]
        need[0], need[1], need[2] = kind, active, tokens
        s.g[NEEDS] += 1


@inner
def touch(s, key, tick, next_use, tokens, high):
    e = s.entry[key]
    if s.choice[LISTED]:
        unlist(s, key)
    e[BUSY], e[TOKENS] = 1, tokens
    e[LAST_USE], e[NEXT_USE], e[LAST_STEP] = tick, next_use, s.g[SEQUENCE_STEPS]
    e[USES] += 1
    e[HIGH_USES] += high


@inner
def note_next_use(s, layer):
    """The next use of every expert chosen, into `next_of`."""
    for at in range(s.g[ROW_AT], s.g[ROW_END]):
        row = s.row[at]
        for i in range(s.choice[TOP_K]):
            expert = s.chosen[row, layer, i]
            if expert >= 0:
                s.next_of[expert] = s.next_use[row, layer, i]


@inner
def classify(s, layer):
    """Hits, lates and misses, each touched in rank order; returns how many lates and misses. Nothing comes yet."""
    g, experts, rule = s.g, s.choice[EXPERTS], s.choice[RULE]
    base, substituting = layer * 2 * experts, rule in (REROUTE, SKIP_RULE)
    looks = s.next_use.shape[0] > 0
    if looks:
        note_next_use(s, layer)
    n_resident = n_late = n_missed = n_hosted = 0
    for n in range(g[WANTED]):
        expert, tokens = s.wanted[n, 0], s.wanted[n, 1]
        key, high = base + expert, expert < experts
        g[TICK] += 1
        ahead = s.next_of[expert % experts] if looks else NEVER
        if s.choice[COUNTS_TOTALS]:
            s.totals[layer, expert % experts] += 1
        held = s.held[key]
        if held == LANDED:
            if s.entry[key, PREFETCHED]:
                used(s, key)
            touch(s, key, g[TICK], ahead, tokens, high)
            s.resident[n_resident] = key
            n_resident += 1
            continue
        copy = s.coming[key]
        if copy == NONE:
            copy = new_copy(s, key, 1, FOREVER, s.choice[KEEP])
            s.copy[copy, C_LATE] = 0
            s.missed[n_missed] = copy
            n_missed += 1
        elif s.choice[LATE_HOST] and _hosts_late(s, copy, tokens):
            copy = new_copy(s, key, 1, FOREVER, s.choice[KEEP])
            s.copy[copy, C_LATE] = 1  # among the missed: for the CPU, while the copy that was under way goes on
            s.missed[n_missed] = copy
            n_missed, n_hosted, held = n_missed + 1, n_hosted + 1, 0
        else:
            s.copy[copy, C_LATE] = 1
            s.late[n_late] = copy
            n_late += 1
            if substituting and s.landed[layer]:
                continue  # the token goes elsewhere and the copy lands in its own time
        _want(s, copy, g[TICK], ahead, tokens)
        if held:
            touch(s, key, g[TICK], ahead, tokens, high)
    g[RESIDENT] = n_resident
    g[LOOKUPS] += g[WANTED]
    g[HITS] += n_resident
    g[LATES] += n_late + n_hosted
    g[MISSES] += n_missed - n_hosted
    return n_late, n_missed


@inner
def _hosts_late(s, copy, tokens):
    """Whether the CPU is quicker than waiting for what is on its way; both alone."""
    c, link = s.copy[copy], last_link(s)
    if s.choice[RULE] == FETCH or s.choice[UNIFIED] or c[C_LINK] != link:
        return False
    left = c[C_PARTS] * s.part_ns[static(s, c[C_KEY], S_SIZE), 0, 1]
    if c[C_FLYING]:
        left -= s.g[NOW] - s.link[link, L_STARTED]
    return find_cost(s, COST_HOST, 0, tokens) <= left + find_cost(s, COST_HIGH, 1, tokens)


@inner
def _want(s, copy, tick, next_use, tokens):
    c = s.copy[copy]
    c[C_WANTED], c[C_TICK], c[C_NEXT], c[C_TOKENS] = 1, tick, next_use, tokens


@inner
def substitute(s, layer, n_missed):
    """Reroute or skip absent experts, token by token, and keep account of the routed weight that moved."""
    g, experts, k = s.g, s.choice[EXPERTS], s.choice[TOP_K]
    base = layer * 2 * experts
    for i in range(n_missed):
        free_copy(s, s.missed[i])
    order = s.resident
    g[STAMP] += 1
    stamp, n = g[STAMP], 0
    for at in range(s.g[ROW_AT], s.g[ROW_END]):
        row = s.row[at]
        for i in range(k):
            _choose(s, row, layer, i)
        for i in range(k):
            old, new = s.chosen[row, layer, i], s.taken[i]
            if new != old:
                s.altered[SKIPPED if new < 0 else REROUTED, layer, s.task[row]] += s.share[row, layer, i]
            if new >= 0:
                if s.mark[new] != stamp:
                    s.mark[new] = stamp
                    s.count[new] = 0
                    order[n] = base + new
                    n += 1
                s.count[new] += 1
    for i in range(n):
        key = order[i]
        tokens = s.count[key - base]
        if s.entry[key, BUSY]:
            s.entry[key, TOKENS] = tokens
        else:
            g[TICK] += 1
            touch(s, key, g[TICK], s.entry[key, NEXT_USE], tokens, 1)
    g[RESIDENT] = n


@inner
def _choose(s, row, layer, rank):
    """The expert that serves a token's choice of this rank, into `taken` (moesim.policies.reroute)."""
    experts, k = s.choice[EXPERTS], s.choice[TOP_K]
    base = layer * 2 * experts
    expert = s.chosen[row, layer, rank]
    s.taken[rank] = expert
    if s.choice[RULE] == SKIP_RULE:
        if expert < 0 or s.held[base + expert] != LANDED:
            s.taken[rank] = NONE
        return
    if expert < 0 or s.held[base + expert] == LANDED:
        return
    best, best_score = NONE, 0.0
    for e in range(experts):
        if s.held[base + e] != LANDED or _in_use(s, row, layer, rank, e, k):
            continue
        liked = s.preference[row, layer, e] if s.preference.shape[0] else s.popularity[layer, e]
        if best == NONE or liked > best_score:
            best, best_score = e, liked
    s.taken[rank] = best


@inner
def _in_use(s, row, layer, rank, expert, k):
    for i in range(k):
        if s.chosen[row, layer, i] == expert or (i < rank and s.taken[i] == expert):
            return True
    return False


@inner
def bring_in(s, layer, n_late, n_missed):
    """Queue demands in rank order and hand host experts over; returns how many run on the host."""
    if s.choice[UNIT_LAYER]:
        n_late, n_missed = _rest_of_layer(s, layer, n_late, n_missed)
    n_asked = n_hosted = 0
    first_hosted = last_hosted = NONE
    for i in range(n_late):
        s.asked[n_asked] = s.late[i]
        n_asked += 1
    for i in range(n_missed):
        copy = s.missed[i]
        if not _on_host(s, copy):
            s.asked[n_asked] = copy
            n_asked += 1
            continue
        if n_hosted:
            s.copy[last_hosted, C_CHAIN] = copy
        else:
            first_hosted = copy
        s.copy[copy, C_CHAIN] = NONE
        last_hosted = copy
        n_hosted += 1
    if n_late and n_missed:
        _sort_by_rank(s, n_asked)
    s.g[OUTSTANDING] = n_asked
    for i in range(n_asked):
        copy = s.asked[i]
        if not s.copy[copy, C_LATE]:
            submit(s, copy)
        elif not s.copy[copy, C_DEMAND]:
            promote(s, copy)
    if n_hosted:
        s.g[HOSTING] += n_hosted
        s.g[HOSTED] += n_hosted
        schedule(s, s.choice[HANDOFF_NS], HANDOFF, first_hosted, 0)
    return n_hosted


@inner
def _on_host(s, copy):
    rule, c = s.choice[RULE], s.copy[copy]
    if s.choice[UNIFIED] or rule not in (ON_HOST, CHEAPER):
        return False
    if rule == ON_HOST or c[C_LATE]:
        return True
    tokens = c[C_TOKENS]
    if s.choice[HOST_BELOW]:
        return tokens < s.choice[HOST_BELOW]
    fetch_ns = s.choice[PARTS] * s.part_ns[static(s, c[C_KEY], S_SIZE), 0, 1] + find_cost(s, COST_HIGH, 1, tokens)
    return find_cost(s, COST_HOST, 0, tokens) <= fetch_ns


@inner
def _sort_by_rank(s, n):
    """By (tick, next use, tokens), stable."""
    asked = s.asked
    for i in range(1, n):
        copy, j = asked[i], i - 1
        while j >= 0 and _ranks_before(s, copy, asked[j]):
            asked[j + 1] = asked[j]
            j -= 1
        asked[j + 1] = copy


@inner
def _ranks_before(s, a, b):
    x, y = s.copy[a], s.copy[b]
    if not x[C_WANTED] or not y[C_WANTED]:
        return not x[C_WANTED] and y[C_WANTED]
    if x[C_TICK] != y[C_TICK]:
        return x[C_TICK] < y[C_TICK]
    if x[C_NEXT] != y[C_NEXT]:
        return x[C_NEXT] < y[C_NEXT]
    return x[C_TOKENS] < y[C_TOKENS]


@inner
def _rest_of_layer(s, layer, n_late, n_missed):
    """Every other expert of the layer: an expert-agnostic engine moves whole layers."""
    g, experts, asked_for = s.g, s.choice[EXPERTS], n_missed
    base = layer * 2 * experts
    g[STAMP] += 1
    for i in range(n_late):
        s.mark[s.copy[s.late[i], C_EXPERT]] = g[STAMP]
    for i in range(n_missed):
        s.mark[s.copy[s.missed[i], C_EXPERT]] = g[STAMP]
    for expert in range(experts):
        key = base + expert
        copy = s.coming[key]
        if s.mark[expert] == g[STAMP] or (copy == NONE and s.held[key]):
            continue
        if copy == NONE:
            copy = new_copy(s, key, 1, FOREVER, s.choice[KEEP])
            s.copy[copy, C_LATE] = 0
            s.missed[n_missed] = copy
            n_missed += 1
        else:
            s.copy[copy, C_LATE] = 1
            s.late[n_late] = copy
            n_late += 1
        _want(s, copy, g[TICK], NEVER, 0)
        if s.copy[copy, C_RESERVED]:
            s.entry[key, BUSY] = 1
    if not n_late and not asked_for:
        for i in range(n_missed):
            free_copy(s, s.missed[i])
        n_missed = 0
    return n_late, n_missed


@inner
def begin_on_host(s, first):
    """Activations have come down: the layer's host experts start, those on the drive when they have been read."""
    copy = first
    while copy != NONE:
        following = s.copy[copy, C_CHAIN]
        s.copy[copy, C_CHAIN] = NONE
        if in_host(s, s.copy[copy, C_KEY]):
            compute_on_host(s, copy)
        else:
            read_for_host(s, copy)
        copy = following
