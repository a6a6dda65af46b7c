"""Beliefs into prefetches, and plans, compiled (moesim.engine.events and residency, same names)."""

from __future__ import annotations

import numpy as np

from moesim.engine.compiled import victims
from moesim.engine.compiled.jit import folded, inner
from moesim.engine.compiled.state import (
    ARENA_TOP,
    BY_LAYER,
    C_DEMAND,
    C_EXPIRES,
    C_KEY,
    C_LENGTH,
    C_OFFSET,
    C_POSITION,
    C_RESERVED,
    C_TARGET,
    C_USED,
    CALLS_TOP,
    ERROR,
    EXPERTS,
    FIRST_MISSING,
    FORESEEN,
    GLOBAL,
    GUARD,
    INVERSE,
    KEEPS_PREFETCHED,
    LATENCY,
    LAYERS,
    LOW_POOLS,
    NEXT_END,
    NONE,
    ORDER,
    PER_LAYER,
    PIN,
    PLANNED_N,
    POSITION,
    ROW_AT,
    ROW_END,
    S_EXPERT,
    S_LAYER,
    STAMP,
    STEPS,
    TIMERS,
    W_DISTANCE,
    W_FIRST,
    W_MAP,
    W_WIDTH,
    W_WRAPS,
    WAVES,
)  # fmt: skip
from moesim.engine.compiled.transfers import new_copy, schedule, submit
from moesim.engine.compiled.victims import CAPACITY, MEMBERS, bytes_of, static

FOREVER = 1 << 60


@inner
def collect(s, layer):
    """The calls that become due when `layer` has been routed (-1: when the step starts); returns (first, count)."""
    g = s.g
    if not g[TIMERS]:
        g[ARENA_TOP] = g[CALLS_TOP] = 0
    first = g[CALLS_TOP]
    base = g[STEPS] * s.choice[LAYERS]
    seen_maps = 0
    for w in range(s.choice[WAVES]):
        wave = s.wave[w]
        mine = seen_maps
        seen_maps += wave[W_MAP]
        if (wave[W_DISTANCE] == 0) != (layer < 0):
            continue
        if layer < 0:
            for target in range(s.choice[LAYERS]) if wave[W_MAP] else range(0):
                _believe(s, mine, target)
            for target in range(s.choice[LAYERS]):
                _add_call(s, wave, g[ROW_AT], g[ROW_END], target, base + target)
            continue
        target = layer + wave[W_DISTANCE]
        wrapped = target >= s.choice[LAYERS]
        if wrapped:
            target -= s.choice[LAYERS]
            if not wave[W_WRAPS] or g[ROW_END] == g[NEXT_END] or target >= s.choice[LAYERS]:
                continue
            _add_call(s, wave, g[ROW_END], g[NEXT_END], target, base + s.choice[LAYERS] + target)
        else:
            if wave[W_MAP]:
                _believe(s, mine, target)
            _add_call(s, wave, g[ROW_AT], g[ROW_END], target, base + target)
    return first, g[CALLS_TOP] - first


@inner
def _believe(s, which, target):
    """Mean probability over the rows, summed in their order."""
    belief = s.belief[target]
    belief[:] = 0.0
    for i in range(s.g[ROW_AT], s.g[ROW_END]):
        for e in range(belief.shape[0]):
            belief[e] += s.maps[which, s.row[i], target, e]
    for e in range(belief.shape[0]):
        belief[e] /= s.g[ROW_END] - s.g[ROW_AT]
    s.has_belief[target] = 1


@inner
def _add_call(s, wave, first, stop, target, position):
    g, arena, call = s.g, s.arena, s.call
    top, place = g[ARENA_TOP], g[CALLS_TOP]
    if place == call.shape[0] or top + (stop - first) * wave[W_WIDTH] >= arena.shape[0]:
        g[ERROR] = 5
        return
    start, wrap = top, s.choice[EXPERTS]
    if s.choice[LOW_POOLS]:
        wrap *= 2  # else a predictor of low-precision copies stands beside a miss rule that keeps none
    g[STAMP] += 1
    stamp, mark, believed = g[STAMP], s.mark, s.believed
    for at in range(first, stop):
        row = s.row[at]
        for i in range(wave[W_FIRST], wave[W_FIRST] + wave[W_WIDTH]):
            expert = np.int64(believed[row, target, i])
            if expert < 0:
                continue
            if expert >= wrap:
                expert -= wrap
            arena[top] = expert
            top += mark[expert] != stamp  # each once: another's name is written over
            mark[expert] = stamp
    call[place, C_TARGET], call[place, C_OFFSET] = target, start
    call[place, C_LENGTH], call[place, C_POSITION] = top - start, position
    g[ARENA_TOP], g[CALLS_TOP] = top, place + 1


@folded
def prefetch_later(s, first, count):
    s.g[TIMERS] += 1
    schedule(s, s.choice[LATENCY], FORESEEN, first, count)


@inner
def prefetch_calls(s, first, count):
    if s.choice[ORDER] != BY_LAYER:
        _prefetch_ranked(s, first, count)
        return
    for i in range(first, first + count):
        call = s.call[i]
        if call[C_POSITION] > s.g[POSITION]:
            believed = s.arena[call[C_OFFSET] : call[C_OFFSET] + call[C_LENGTH]]
            queued = _prefetch(s, call[C_TARGET], believed, call[C_POSITION])
            if queued and s.choice[FIRST_MISSING]:
                return


@inner
def _prefetch_ranked(s, first, count):
    """Expert by expert, most probable and nearest first over all layers together."""
    g, experts, layers = s.g, s.choice[EXPERTS], s.choice[LAYERS]
    n = 0
    for i in range(first, first + count):
        call = s.call[i]
        target, position = call[C_TARGET], call[C_POSITION]
        away = position - g[POSITION]
        weight = 1 / max(away, 1) if s.choice[ORDER] == INVERSE else 1 - away / (layers + 1)
        for j in range(call[C_OFFSET], call[C_OFFSET] + call[C_LENGTH]):
            expert = s.arena[j]
            trust = s.belief[target, expert % experts] if s.has_belief[target] else 0.0
            if n == s.rank.shape[0]:
                g[ERROR] = 5
                return
            s.rank[n] = -weight * trust
            s.ranked[n, 0], s.ranked[n, 1], s.ranked[n, 2] = target, expert, position
            n += 1
    for i in np.argsort(s.rank[:n], kind="mergesort"):
        if s.ranked[i, 2] > g[POSITION]:
            queued = _prefetch(s, s.ranked[i, 0], s.ranked[i, 1:2], s.ranked[i, 2])
            if queued and s.choice[FIRST_MISSING]:
                return


@inner
def _prefetch(s, target, believed, expires):
    """Queue the believed experts of layer `target`; returns how many are on their way now that were missing."""
    experts = s.choice[EXPERTS]
    base = target * 2 * experts
    queued = 0
    for i in range(len(believed)):
        expert = believed[i]
        held = base + expert
        if not s.held[held] and expert >= experts:
            held -= experts
        if s.held[held]:
            if s.choice[PIN]:
                s.entry[held, GUARD] = max(s.entry[held, GUARD], expires)
            continue
        coming = s.coming[base + expert]
        if coming != NONE:
            s.copy[coming, C_EXPIRES] = max(s.copy[coming, C_EXPIRES], expires)  # believed in again before it started
            continue
        if queued == s.choice[PER_LAYER]:
            break
        queued += 1
        submit(s, new_copy(s, base + expert, 0, expires, s.choice[KEEPS_PREFETCHED]))
    return queued


@inner
def make_plan(s, values):
    """Keep the experts of highest value [layers, experts]; bring in, layer after layer, those that are absent."""
    layers = values.shape[0]
    older = s.older
    older[:] = NONE
    for i in range(s.g[PLANNED_N]):
        copy = s.planned[i, 0]
        c = s.copy[copy]
        if c[C_USED] == s.planned[i, 1] and not c[C_RESERVED] and not c[C_DEMAND]:
            c[C_EXPIRES] = -1  # it lapses, unless named again below
            older[c[C_KEY]] = copy
    s.g[PLANNED_N] = 0
    for p in range(1 if s.choice[GLOBAL] else layers):
        for i in range(s.pool[p, MEMBERS]):
            key = s.member[p, i]
            s.plan[key] = values[static(s, key, S_LAYER), static(s, key, S_EXPERT)]
        victims.rebuild(s, p)
        if s.choice[GLOBAL]:
            _bring_planned(s, p, 0, layers, values)
        else:
            _bring_planned(s, p, p, p + 1, values)


@inner
def _bring_planned(s, p, first, stop, values):
    """Copies for the absent among as many of the most valuable as the pool holds; the resident win ties."""
    experts = values.shape[1]
    layer_of = np.empty((stop - first) * experts, dtype=np.int64)
    expert_of, absent, worth = np.empty_like(layer_of), np.empty_like(layer_of), np.empty(len(layer_of))
    n = largest = 0
    for layer in range(first, stop):
        for expert in range(experts):
            key = layer * 2 * experts + expert
            largest = max(largest, bytes_of(s, key))
            if values[layer, expert] > 0:
                layer_of[n], expert_of[n], worth[n] = layer, expert, -values[layer, expert]
                absent[n] = s.held[key] == 0
                n += 1
    order = np.argsort(absent[:n], kind="mergesort")
    order = order[np.argsort(worth[order], kind="mergesort")]
    chosen = np.sort(order[: s.pool[p, CAPACITY] // largest])  # by layer, then by expert
    chosen = chosen[np.argsort(worth[chosen], kind="mergesort")]
    chosen = chosen[np.argsort(layer_of[chosen], kind="mergesort")]
    for i in chosen:
        key = layer_of[i] * 2 * experts + expert_of[i]
        renewed = s.older[key] if s.coming[key] == s.older[key] else NONE
        if not absent[i] or (renewed == NONE and s.coming[key] != NONE):
            continue
        copy = renewed
        if renewed == NONE:
            copy = new_copy(s, key, 0, FOREVER, 1)
        s.copy_plan[copy], s.copy[copy, C_EXPIRES] = -worth[i], FOREVER
        s.planned[s.g[PLANNED_N], 0], s.planned[s.g[PLANNED_N], 1] = copy, s.copy[copy, C_USED]
        s.g[PLANNED_N] += 1
        if renewed == NONE:
            submit(s, copy)
