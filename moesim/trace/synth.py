"""Routing models fitted to a trace; with `draw`, `redraw` and `from_parameters`, all that makes synthetic routing.

A fit goes in rounds: draw, measure, correct what is off by the logarithm of its ratio (iterative proportional
fitting, on draws), and average the later rounds, whose sampling noise cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.trace.locality import (
    Floats,
    Ids,
    Ints,
    place_in_request,
    ratio,
    request_counts,
    same_request_reuse,
    token_gaps,
)
from moesim.trace.routing_model import GAPS, Batch, RoutingModel, draw, draw_ids, redraw
from moesim.trace.stats import lift, pair_counts
from moesim.trace.synth_parameters import from_parameters
from moesim.trace.trace import DECODE, PHASES, PREFILL, Trace, TraceInfo

__all__ = ["RoutingModel", "draw", "fit", "from_parameters", "redraw"]

# Rounds of a fit, and how far one corrects popularity, recency, taste and transition. First each layer is drawn below
# the trace's own experts, so that an error of one layer does not disturb the next; then on its own, as it will be used.
_STEPS = ((1.0, 0.7, 1.0, 0.5),) * 8 + ((0.3, 0.3, 0.3, 0.0),) * 10
_APART = 8  # rounds of the first kind
_AVERAGED = 8
_CELLS = 100_000_000  # tokens x layers x experts drawn in one round, at most ...
_TOKENS = (4_000, 20_000)  # ... within these bounds
_TRUST = 500  # tokens of a task and phase that weigh as much as those of all others together
_RARE = 10  # choices below which a bin of gaps, or a pair of experts, is not corrected much
_GATES = 2048  # gate weight samples kept


@dataclass(frozen=True, eq=False)
class _Sample:
    """Some requests of a trace, laid out as a drawn batch is."""

    batch: Batch
    ids: Ids
    phase: Ints  # [tokens]
    request: Ints  # [tokens]
    repeats: float  # how often each request was taken, on average, if more than once


@dataclass(frozen=True, eq=False)
class _Moments:
    """What a fit matches; all but popularity over decode tokens, where there are any."""

    popularity: Floats  # [2 phases, tasks, layers, experts] choices
    gaps: Floats  # [tasks, layers, bins] choices by tokens since last use in the request
    same_request: Floats  # [layers]
    pairs: Floats  # [layers, experts, experts]: choices at the layer before and this one; layer 0: none


def fit(trace: Trace, seed: int = 0) -> RoutingModel:
    """The generator whose draws have the trace's popularity by task, reuse, differences of requests and layer lift.

    A phase the trace has no tokens of is drawn like the other, and `info.extra["unfitted_phase"]` names it. Tokens
    that use fewer than top_k experts teach what they chose; drawn tokens use top_k.
    """
    names, task = np.unique(trace.requests.task, return_inverse=True)
    whole = _sample(trace, task, np.arange(task.size))
    target = _moments(whole, whole.ids, whole.ids, names.size, trace.info.experts)
    model = _first_guess(trace, tuple(map(str, names)), task, target)
    rng = np.random.default_rng(seed)
    tokens = np.clip(_CELLS / (trace.layers * trace.info.experts), *_TOKENS)
    count = max(8, round(tokens * task.size / trace.tokens))
    kept = []
    for number, steps in enumerate(_STEPS):
        real = _sample(trace, task, rng.choice(task.size, count, replace=count > task.size))
        below = real.ids if number < _APART else None
        ids = draw_ids(model, real.batch, rng, below=below, centred=True)
        now = _moments(real, ids, ids if below is None else below, names.size, trace.info.experts)
        want = _moments(real, real.ids, real.ids, names.size, trace.info.experts)
        model = _corrected(model, want, now, steps)
        if number >= len(_STEPS) - _AVERAGED:
            kept.append(model)
    parts = ("popularity", "recency", "taste", "transition")
    return replace(model, **{part: np.mean([getattr(m, part) for m in kept], axis=0) for part in parts})


def _sample(trace: Trace, task: Ints, pick: Ints) -> _Sample:
    first, last = trace.first_row[pick], trace.first_row[pick + 1]
    rows = np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])
    middle = trace.decode_start[pick]
    request = np.repeat(np.arange(pick.size), last - first)
    batch = Batch.of(task[pick], middle - first, last - middle)
    return _Sample(
        batch, trace.experts[rows], trace.phase[rows].astype(np.int64), request, max(1.0, pick.size / task.size)
    )


def _moments(sample: _Sample, ids: Ids, below: Ids, tasks: int, experts: int) -> _Moments:
    """Of the sample's rows if their experts were `ids`, with `below` at the layers before; both [tokens, layers, k].

    Requests taken several times count once, lest noise be taken for news.
    """
    phase = DECODE if (sample.phase == DECODE).any() else PREFILL
    rows = np.flatnonzero(sample.phase == phase)
    task = sample.batch.task[sample.request][:, None]
    group = sample.phase * tasks + task[:, 0]
    place = place_in_request(sample.request)[:, None]
    layers = ids.shape[1]
    popularity = np.zeros((2 * tasks, layers, experts))
    gaps = np.empty((tasks, layers, GAPS.size + 1))
    pairs = np.zeros((layers, experts, experts))
    for layer in range(layers):
        chosen = ids[:, layer]
        counts = request_counts(chosen, group, experts)
        popularity[: len(counts), layer] = counts
        gap = token_gaps(chosen)
        bins = task * (GAPS.size + 1) + np.searchsorted(GAPS, np.where(gap > place, GAPS[-1] + 1, gap))
        looked = bins[(chosen >= 0) & (place > 0) & (sample.phase == phase)[:, None]]
        gaps[:, layer] = np.bincount(looked, minlength=tasks * (GAPS.size + 1)).reshape(tasks, -1)
        if layer:
            pairs[layer] = pair_counts(below[rows, layer - 1], ids[rows, layer], experts)
    request = np.unique(sample.request[rows], return_inverse=True)[1]
    return _Moments(
        popularity=popularity.reshape(2, tasks, layers, experts) / sample.repeats,
        gaps=gaps / sample.repeats,
        same_request=same_request_reuse(ids[rows], request, experts),
        pairs=pairs / sample.repeats,
    )


def _first_guess(trace: Trace, names: tuple[str, ...], task: Ints, target: _Moments) -> RoutingModel:
    layers, experts = trace.layers, trace.info.experts
    seen = target.popularity.sum((1, 2, 3)) > 0
    popularity = _smoothed(target.popularity, target.popularity.sum((0, 1)), trace.top_k)
    gates = None
    if trace.weights is not None:
        full = np.flatnonzero((trace.experts >= 0).all((1, 2)))
        gates = trace.weights[full[:: max(1, full.size // _GATES)]] if full.size else None
    origin = f" ({trace.info.source})" if trace.info.source else ""
    info = TraceInfo(
        model=trace.info.model,
        experts=experts,
        top_k=trace.top_k,
        moe_layers=trace.info.moe_layers,
        provenance="synthetic",
        source=f"drawn from a routing model fitted to {trace.info.provenance} routing of {trace.info.model}{origin}",
        extra={"fitted_to": trace.content_hash} | ({} if seen.all() else {"unfitted_phase": PHASES[seen.argmin()]}),
    )
    return RoutingModel(
        info=info,
        tasks=names,
        task_share=np.bincount(task) / task.size,
        popularity=np.log(popularity / popularity.sum(-1, keepdims=True)).astype(np.float32),
        recency=np.zeros((len(names), layers, GAPS.size + 1), dtype=np.float32),
        taste=np.full(layers, 0.5, dtype=np.float32),
        transition=(0.5 * lift(target.pairs, _RARE)).astype(np.float32),
        gates=gates,
    )


def _smoothed(counts: Floats, overall: Floats, top_k: int) -> Floats:
    """Choices [.., layers, bins] of some tokens with those of all, [layers, bins], added at the weight _TRUST."""
    overall = overall + _RARE
    return counts + _TRUST * top_k * overall / overall.sum(1, keepdims=True)


def _corrected(model: RoutingModel, want: _Moments, now: _Moments, steps: tuple[float, ...]) -> RoutingModel:
    """The model moved towards what was wanted where a draw of it fell short, both measured on the same requests."""
    k = model.info.top_k
    all_want, all_now = want.popularity.sum((0, 1)), now.popularity.sum((0, 1))
    gaps = want.gaps.sum(0)  # [layers, bins]
    doubt = _RARE / (_RARE + gaps)  # pulls log-weights of rarely seen gaps back to 0
    recency = np.clip(np.log(_smoothed(want.gaps, gaps, k) / _smoothed(now.gaps, now.gaps.sum(0), k)), -1, 1)
    chance = k * (ratio(all_want, all_want.sum(1, keepdims=True)) ** 2).sum(1)  # reuse between independent tokens
    excess = [np.nan_to_num(np.maximum(m.same_request - chance, 1e-3), nan=1.0) for m in (want, now)]
    change = {
        "popularity": np.log(_smoothed(want.popularity, all_want, k) / _smoothed(now.popularity, all_now, k)),
        "recency": recency
        - (gaps * recency).sum(2, keepdims=True) / np.maximum(gaps.sum(1), 1)[:, None]
        - doubt * model.recency,
        "taste": model.taste * (np.clip(excess[0] / excess[1], 0.25, 4) ** 0.5 - 1),
        "transition": lift(want.pairs, _RARE) - lift(now.pairs, _RARE),
    }
    moved = {
        name: (getattr(model, name) + step * change[name]).astype(np.float32)
        for name, step in zip(change, steps, strict=True)
    }
    return replace(model, **moved)
