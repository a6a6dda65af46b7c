"""Routing models made from a model's shape and a few statistics, without a trace.

Popularity, recency and links between layers are tuned in rounds until draws have the statistics asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moesim.errors import TraceError
from moesim.trace.locality import Floats, Ids, Ints, request_counts, token_gaps
from moesim.trace.routing_model import GAPS, Batch, RoutingModel, draw_ids
from moesim.trace.stats import recall
from moesim.trace.trace import DECODE, TraceInfo

# Log-weight by tokens since last use, in the bins of GAPS, between "longer ago or never" (0) and "one token ago" (1):
# mean over tasks and layers of a fit to recorded gpt-oss-20b routing (docs/trace-statistics.md).
_FADING = np.array([1, 0.70, 0.66, 0.65, 0.60, 0.53, 0.45, 0.35, 0.26, 0.12, 0])
_RARE = 10  # choices below which an expert's share is not corrected much
_TOLERANCE = 0.03  # of what was asked for


class _Tuning(NamedTuple):
    """What is drawn to tune a model made from parameters."""

    rounds: int = 20
    layers: int = 8  # the first so many at least, and ...
    lines: int = 2048  # ... as many as have this number of experts together: few experts make layers differ
    requests: int = 48
    tokens: int = 160
    levelling: int = 4  # further rounds over all layers


_TUNING = _Tuning()


def from_parameters(
    experts: int,
    top_k: int,
    layers: int,
    *,
    skew: float = 0.5,
    reuse: float = 0.4,
    layer_correlation: float = 0.5,
    task_shift: float = 0.5,
    request_spread: float = 0.7,
    tasks: Sequence[str] = ("",),
    model: str = "synthetic",
    moe_layers: Sequence[int] = (),
    seed: int = 0,
) -> RoutingModel:
    """A routing model with asked-for statistics and otherwise random structure.

    skew: Zipf exponent of the popularity of experts within a task and layer. reuse: share of a token's experts that
    the token before it used. layer_correlation: share of the next layer's experts that the best guess of top_k
    from this layer's finds. task_shift: share of experts whose popularity each task deals anew. request_spread:
    standard deviation of a request's taste, in log-weight.
    Raises TraceError where a value is out of range, or no draw comes near what was asked.
    """
    asked = {
        "skew": skew, "reuse": reuse, "layer_correlation": layer_correlation, "task_shift": task_shift,
        "request_spread": request_spread,
    }  # fmt: skip
    _check_parameters(experts, top_k, layers, **asked)
    rng = np.random.default_rng(seed)
    place = _deal_ranks(len(tasks), layers, experts, task_shift, rng)
    info = TraceInfo(
        model=model,
        experts=experts,
        top_k=top_k,
        moe_layers=tuple(moe_layers) or tuple(range(layers)),
        provenance="synthetic",
        source="drawn from parameters, not from recorded routing",
        extra=dict(asked),
    )
    share = np.arange(1, experts + 1.0) ** -skew
    share /= share.sum()
    links = rng.standard_normal((layers, experts + 1, experts))
    links -= share[place].mean(0)[:, None, :] @ links[:, :-1]  # experts of average popularity pull nobody up
    links[0] = links[:, -1] = 0
    plain = RoutingModel(
        info=info,
        tasks=tuple(tasks),
        task_share=np.full(len(tasks), 1 / len(tasks)),
        popularity=np.zeros((2, len(tasks), layers, experts), dtype=np.float32),
        recency=np.zeros((len(tasks), layers, GAPS.size + 1), dtype=np.float32),
        taste=np.full(layers, request_spread, dtype=np.float32),
        transition=links.astype(np.float32),
    )
    task = np.arange(_TUNING.requests) % len(tasks)
    batch = Batch.of(task, np.zeros(task.size, dtype=np.int64), np.full(task.size, _TUNING.tokens))
    dials = _tuned(plain, batch, place, share, np.array([reuse, layer_correlation]), rng=rng)
    level = _levelled(_dialled(plain, place, dials, layers), batch, share[place], rng)
    _refuse_unmet(_reuse_and_recall(level, batch, draw_ids(level, batch, rng)), asked)
    return level


def _check_parameters(experts: int, top_k: int, layers: int, skew: float, **shares: float) -> None:
    if not (1 <= top_k < experts and layers >= 1):
        raise TraceError(
            f"top-{top_k} of {experts} experts, {layers} layers; top_k must be 1 to experts - 1, layers 1 up"
        )
    for name, value in {"skew": skew, **shares}.items():
        high = {"skew": 5, "request_spread": 3}.get(name, 1)
        if not 0 <= value <= high:
            raise TraceError(f"{name.replace('_', ' ')} {value:g}; must be 0 to {high}")
    most = 1 / (np.arange(1, experts + 1.0) ** -skew).sum()
    if most * top_k > 0.95:
        raise TraceError(
            f"skew {skew:g} gives one of {experts} experts {most:.0%} of the choices, but top-{top_k} routing gives "
            f"one at most {1 / top_k:.0%}; lower the skew"
        )


def _deal_ranks(tasks: int, layers: int, experts: int, shift: float, rng: np.random.Generator) -> Ints:
    """Place of each expert in the order of popularity, [tasks, layers, experts]; tasks share those not dealt anew."""
    place = np.empty((tasks, layers, experts), dtype=np.int64)
    moved = round(shift * experts)
    for layer in range(layers):
        common = rng.permutation(experts)
        for task in range(tasks):
            place[task, layer] = common
            if tasks > 1:
                some = rng.permutation(experts)[:moved]
                place[task, layer, some] = rng.permutation(common[some])
    return place


class _Dials(NamedTuple):
    weight: Floats  # [places] log-weight by place in the order of popularity
    recency: Floats  # [layers tuned] log-weight of what the token before used
    links: Floats  # [layers tuned] of one expert on this layer's, standard deviation
    level: Floats  # [layers tuned, experts] log-weight that makes up for links that favour some experts


def _tuned(
    model: RoutingModel, batch: Batch, place: Ints, share: Floats, asked: Floats, *, rng: np.random.Generator
) -> _Dials:
    """Dials at which draws have `share` of the choices by place, and the reuse and recall asked for.

    Tuned on the first layers: by the last of them the layers below no longer make a difference.
    """
    layers = min(len(model.taste), max(_TUNING.layers, _TUNING.lines // share.size))
    index = (np.repeat(batch.task, batch.length)[:, None, None], np.arange(layers)[:, None])
    dials = _Dials(np.log(share), np.ones(layers), np.full(layers, 0.3), np.zeros((layers, share.size)))
    tried = []
    for _ in range(_TUNING.rounds):
        tried.append(dials)
        few = _dialled(model, place, dials, layers)
        ids = draw_ids(few, batch, rng, centred=True)
        dealt = np.bincount(place[*index, ids].ravel(), minlength=share.size) + 1.0
        off = np.nan_to_num(_logit(asked)[:, None] - _logit(_reuse_and_recall(few, batch, ids)))
        dials = _Dials(
            dials.weight + 0.5 * np.log(share / dealt * dealt.sum()),
            np.clip(dials.recency + off[0], -8, 8),
            np.clip(dials.links * np.exp(off[1] / 2), 1e-3, 8),
            dials.level + _unlevel(ids, batch, share[place[:, :layers]]),
        )
    return _Dials(*(np.mean(values, axis=0) for values in zip(*tried[_TUNING.rounds // 2 :], strict=True)))


def _dialled(model: RoutingModel, place: Ints, dials: _Dials, layers: int) -> RoutingModel:
    """The first layers of the model with its dials set, the last tuned one's for all above."""
    tuned = np.minimum(np.arange(layers), dials.recency.size - 1)
    level = np.zeros((layers, dials.weight.size))
    level[: len(dials.level)] = dials.level[:layers]
    popularity = np.stack([dials.weight[place[:, :layers]] + level] * 2)
    return replace(
        model,
        popularity=popularity.astype(np.float32),
        recency=np.tile(dials.recency[tuned, None] * _FADING, (len(place), 1, 1)).astype(np.float32),
        taste=model.taste[:layers],
        transition=model.transition[:layers] * dials.links[tuned, None, None].astype(np.float32),
    )


def _levelled(model: RoutingModel, batch: Batch, share: Floats, rng: np.random.Generator) -> RoutingModel:
    """The model with every layer's experts, not only those of the layers tuned, at their share of choices."""
    for _ in range(_TUNING.levelling):
        change = _unlevel(draw_ids(model, batch, rng, centred=True), batch, share)
        model = replace(model, popularity=(model.popularity + change).astype(np.float32))
    return model


def _unlevel(ids: Ids, batch: Batch, share: Floats) -> Floats:
    """Half the logarithm of what experts of share [tasks, layers, experts] lack in the choices drawn."""
    one = np.zeros(len(ids), dtype=np.int64)
    counts = np.stack([request_counts(ids[:, layer], one, share.shape[2])[0] for layer in range(ids.shape[1])])
    expected = np.tensordot(np.bincount(batch.task, batch.length), share, axes=1) * ids.shape[2]
    return 0.5 * np.log((expected + _RARE) / (counts + _RARE))


def _refuse_unmet(got: Floats, asked: dict[str, float]) -> None:
    """Raise TraceError unless reuse and recall, [2, layers], are near what was asked."""
    for name, values in (("reuse", got[0]), ("layer_correlation", got[1, 1:])):
        if values.size and abs(values.mean() - asked[name]) > _TOLERANCE:
            given = ", ".join(f"{other.replace('_', ' ')} {value:g}" for other, value in asked.items())
            raise TraceError(
                f"{name.replace('_', ' ')} {asked[name]:g} cannot be had together with the rest of {given}: "
                f"draws come to {values.mean():.2f}; change one of them"
            )


def _reuse_and_recall(model: RoutingModel, batch: Batch, ids: Ids) -> Floats:
    """Next-token reuse and recall of the best guess from the layer below, [2, layers]; layer 0 has no such guess."""
    later = np.arange(len(ids)) - np.repeat(batch.start, batch.length) > 0
    task = np.repeat(batch.task, batch.length)
    k, out = ids.shape[2], np.full((2, ids.shape[1]), np.nan)
    for layer in range(ids.shape[1]):
        out[0, layer] = (token_gaps(ids[:, layer])[later] == 1).mean()
        if layer:
            links = model.transition[layer]
            pull = sum((links[ids[:, layer - 1, rank]] for rank in range(1, k)), links[ids[:, layer - 1, 0]])
            score = model.popularity[DECODE, task, layer] + pull
            out[1, layer] = recall(np.argpartition(-score, k - 1, axis=1)[:, :k], ids[:, layer])
    return out


def _logit(share: Floats) -> Floats:
    share = np.clip(share, 0.005, 0.995)
    return np.log(share / (1 - share))
