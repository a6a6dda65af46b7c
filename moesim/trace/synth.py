"""Routing models: fitted to a trace, or made so that drawn traces have asked-for statistics.

Both adjust in rounds: draw, measure, correct what is off by the logarithm of its ratio (iterative proportional
fitting, on draws), and average the later rounds, whose sampling noise cancels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from moesim.trace.locality import Floats, Ints, place_in_request, ratio, request_counts, same_request_reuse, token_gaps
from moesim.trace.routing_model import GAPS, RoutingModel, draw, draw_requests, redraw
from moesim.trace.stats import lift, pair_counts
from moesim.trace.trace import DECODE, PREFILL, Trace, TraceInfo

__all__ = ["RoutingModel", "draw", "fit", "redraw"]

_ROUNDS = 12
_CELLS = 100_000_000  # tokens x layers x experts of one round, at most ...
_TOKENS = (4_000, 20_000)  # ... within these bounds
_TRUST = 500  # tokens of a task and phase that weigh as much as those of all others together
_GATES = 2048  # gate weight samples kept
_TASTE = 0.5  # where a fit starts


@dataclass(frozen=True, eq=False)
class _Moments:
    """What a fit matches; all but popularity over decode tokens, where there are any."""

    popularity: Floats  # [2 phases, tasks, layers, experts] choices
    gaps: Floats  # [layers, bins] shares of choices by tokens since last use in the request
    same_request: Floats  # [layers]
    pairs: Floats  # [layers, experts, experts]: choices at the layer before and this one; layer 0: none


def fit(trace: Trace, seed: int = 0) -> RoutingModel:
    """The generator whose draws have the trace's popularity by task, reuse, request differences and layer lift.

    A phase the trace has no tokens of is drawn like the other, and `info.extra["unfitted_phase"]` names it.
    """
    names, task = np.unique(trace.requests.task, return_inverse=True)
    target = _moments(trace, task, names.size)
    model = _first_guess(trace, tuple(map(str, names)), task, target)
    rng = np.random.default_rng(seed)
    size = np.diff(trace.first_row)
    prompt = trace.decode_start - trace.first_row[:-1]
    tokens = np.clip(_CELLS / (trace.layers * trace.info.experts), *_TOKENS)
    kept = []
    for number in range(_ROUNDS):
        pick = rng.permutation(size.size)[: max(8, round(tokens / size.mean()))]
        real = _take(trace, pick)
        drawn = draw_requests(model, task[pick], prompt[pick], (size - prompt)[pick], rng, None, real.experts)
        model = _corrected(model, _moments(real, task[pick], names.size), _moments(drawn, task[pick], names.size))
        if number >= _ROUNDS // 2:
            kept.append(model)
    mean = {f: np.mean([getattr(m, f) for m in kept], axis=0) for f in ("popularity", "taste", "recency", "transition")}
    return replace(model, **mean)


def _take(trace, pick):
    rows = np.concatenate([np.arange(trace.first_row[i], trace.first_row[i + 1]) for i in pick])
    request = np.repeat(np.arange(pick.size, dtype=np.int32), np.diff(trace.first_row)[pick])
    return Trace(trace.info, trace.requests, trace.experts[rows], request, trace.phase[rows], trace.position[rows])


def _moments(trace: Trace, task: Ints, tasks: int) -> _Moments:
    phase = DECODE if (trace.phase == DECODE).any() else PREFILL
    rows = np.flatnonzero(trace.phase == phase)
    request = np.unique(trace.request[rows], return_inverse=True)[1]
    group = trace.phase.astype(np.int64) * tasks + task[trace.request]
    place = place_in_request(trace.request.astype(np.int64))[:, None]
    layers, experts = trace.layers, trace.info.experts
    popularity = np.zeros((2 * tasks, layers, experts))
    gaps = np.empty((layers, GAPS.size + 1))
    pairs = np.zeros((layers, experts, experts))
    for layer in range(layers):
        ids = trace.experts[:, layer]
        counts = request_counts(ids, group, experts)
        popularity[: len(counts), layer] = counts
        gap = token_gaps(ids)
        bins = np.searchsorted(GAPS, np.where(gap > place, GAPS[-1] + 1, gap))
        looked = (ids >= 0) & (place > 0) & (trace.phase == phase)[:, None]
        gaps[layer] = np.bincount(bins[looked], minlength=GAPS.size + 1)
        if layer:
            pairs[layer] = pair_counts(trace.experts[rows, layer - 1], ids[rows], experts)
    return _Moments(
        popularity=popularity.reshape(2, tasks, layers, experts),
        gaps=(gaps + 0.5) / (gaps + 0.5).sum(1, keepdims=True),
        same_request=same_request_reuse(trace.experts[rows], request, experts),
        pairs=pairs,
    )


def _first_guess(trace: Trace, names: tuple[str, ...], task: Ints, target: _Moments) -> RoutingModel:
    seen = target.popularity.sum((1, 2, 3)) > 0
    layers, experts = trace.layers, trace.info.experts
    smoothed = _smoothed(target.popularity, target.popularity.sum((0, 1)), trace.top_k)
    extra = {} if seen.all() else {"unfitted_phase": ("prefill", "decode")[int(seen[PREFILL])]}
    gates = None
    if trace.weights is not None:
        full = np.flatnonzero((trace.experts >= 0).all((1, 2)))
        gates = trace.weights[full[:: -(-full.size // _GATES)]] if full.size else None
    return RoutingModel(
        info=TraceInfo(
            trace.info.model, experts, trace.top_k, trace.info.moe_layers, "synthetic",
            source=f"drawn from a model fitted to {trace.info.provenance} routing of {trace.info.model}"
            + (f" ({trace.info.source})" if trace.info.source else ""),
            extra={"fitted_to": trace.content_hash, **extra},
        ),
        tasks=names,
        task_share=np.bincount(task) / task.size,
        popularity=np.log(smoothed / smoothed.sum(-1, keepdims=True)).astype(np.float32),
        taste=np.full(layers, _TASTE, dtype=np.float32),
        recency=np.zeros((layers, GAPS.size + 1), dtype=np.float32),
        transition=(0.5 * lift(target.pairs)).astype(np.float32),
        gates=gates,
    )  # fmt: skip


def _smoothed(counts: Floats, overall: Floats, top_k: int) -> Floats:
    """Choices [phases, tasks, layers, experts] with those of all, [layers, experts], added at the weight _TRUST."""
    return counts + _TRUST * top_k * ratio(overall, overall.sum(1, keepdims=True))


def _corrected(model: RoutingModel, target: _Moments, now: _Moments) -> RoutingModel:
    """The model moved towards the target by what a draw of it was off; steps below 1 keep the parts from fighting."""
    k = model.info.top_k
    drawn = now.popularity.sum(-1, keepdims=True)
    share = np.nan_to_num(ratio(target.popularity, target.popularity.sum(-1, keepdims=True)))
    expected = share * drawn
    want, have = expected.sum((0, 1)) + 0.5, now.popularity.sum((0, 1)) + 0.5
    popularity = np.log(_smoothed(expected, want, k) / _smoothed(now.popularity, have, k))
    recency = np.clip(np.log(target.gaps / now.gaps), -1, 1)
    chance = k * (ratio(want, want.sum(1, keepdims=True)) ** 2).sum(1)
    excess = [np.maximum(m.same_request - chance, 1e-3) for m in (target, now)]
    taste = np.clip(excess[0] / excess[1], 0.25, 4) ** 0.5
    scale = now.pairs.sum((1, 2), keepdims=True) / np.maximum(target.pairs.sum((1, 2), keepdims=True), 1)
    transition = lift(target.pairs * scale) - lift(now.pairs)
    changed = {
        "popularity": model.popularity + popularity,
        "recency": model.recency + 0.7 * (recency - recency[:, -1:]),
        "taste": np.clip(model.taste * taste, 0.02, 4),
        "transition": model.transition + 0.5 * transition,
    }
    return replace(model, **{name: value.astype(np.float32) for name, value in changed.items()})
