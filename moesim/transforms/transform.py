"""What every transform returns, and how the routed weight it altered is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.policies.own import ask, refused
from moesim.trace import Trace

KINDS = ("lower_precision", "rerouted", "merged", "skipped")

Shares = dict[str, NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class Transformed:
    """A model, its routing, and what became of the routed weight of the model and trace they were made from.

    altered: by kind, the share of the routed weight of each MoE layer and task of the trace, [layers, tasks]; the rest
        is served as it was chosen.
        lower_precision: by the expert chosen, stored in fewer bits; rerouted: by another expert; merged: by a mixture
        that contains the expert chosen; skipped: by none. A weight counts once, under what was done to it last.
    notes: what a reader of results must know. sequences: at most so many can be served at a time, None for any.
    """

    model: Model
    trace: Trace
    altered: Shares
    notes: tuple[str, ...] = ()
    sequences: int | None = None


class Transform(Protocol):
    """Pure: the same model, trace and seed give the same result. Rows of the trace stay what they are."""

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed: ...


def apply_all(transforms: Sequence[Transform], model: Model, trace: Trace, seed: int) -> Transformed:
    """One after the other, with the shares of the first model's routed weight that all of them altered."""
    done = Transformed(model, trace, nothing(trace))
    for transform in transforms:
        new = ask(transform, "apply", done.model, done.trace, seed)
        if not isinstance(new, Transformed):
            raise refused(transform, "apply", new)
        limits = [n for n in (done.sequences, new.sequences) if n is not None]
        altered, notes = chain(done.altered, new.altered), (*done.notes, *new.notes)
        done = replace(new, altered=altered, notes=notes, sequences=min(limits, default=None))
    return done


def nothing(trace: Trace) -> Shares:
    return {kind: np.zeros((trace.layers, len(trace.tasks))) for kind in KINDS}


def chain(first: Shares, then: Shares) -> Shares:
    """Shares after both: what `first` left counts as one, and is altered as `then` says."""
    left = 1 - first["skipped"]
    untouched = 1 - sum(then[kind] for kind in KINDS)
    out = {kind: first[kind] * untouched + left * then[kind] for kind in KINDS}
    return out | {"skipped": first["skipped"] + left * then["skipped"]}


def calibration_rows(trace: Trace) -> slice:
    """The rows of the first tenth of the requests (at least one): what may be known of popularity before serving."""
    return slice(0, int(trace.first_row[max(1, len(trace.requests) // 10)]))


def gate_order(trace: Trace, layer: int) -> NDArray[np.float64]:
    """Scores that rank a layer's experts for each token: the chosen ones by rank, then the others by gate probability,
    or by popularity where the trace has none: [tokens, experts]."""
    if trace.probabilities is None:
        ids = trace.experts[calibration_rows(trace), layer]
        popularity = np.bincount(ids[ids >= 0], minlength=trace.info.experts)
        others = np.tile(popularity / max(popularity.sum(), 1), (trace.tokens, 1))
    else:
        others = trace.probabilities[:, layer].astype(np.float64)
    scores = np.hstack([others, np.zeros((trace.tokens, 1))])  # last column: unused ranks
    chosen = trace.experts[:, layer].astype(np.int64)
    first = np.broadcast_to(1.0 + trace.top_k - np.arange(trace.top_k), chosen.shape)
    np.put_along_axis(scores, chosen, first, axis=1)
    return scores[:, :-1]


def gate_weights(trace: Trace, layer: int, rows: slice = slice(None)) -> NDArray[np.float64]:
    """Gate weight of each chosen expert, equal where the trace has none; 0 at unused ranks: [rows, k]."""
    used = trace.experts[rows, layer] >= 0
    if trace.weights is None:
        return used / np.maximum(used.sum(axis=1, keepdims=True), 1)
    return np.where(used, trace.weights[rows, layer].astype(np.float64), 0.0)


def mean_weight(trace: Trace, layer: int, rows: slice) -> NDArray[np.float64]:
    """Gate weight each expert gathers per token of `rows`, 0 where it is not chosen: [experts]."""
    ids, weights = trace.experts[rows, layer].ravel(), gate_weights(trace, layer, rows).ravel()
    used = ids >= 0
    total = np.bincount(ids[used], weights[used], minlength=trace.info.experts)
    return total / max(len(ids) // trace.top_k, 1)


def share_by_task(trace: Trace, weights: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of `weights` [tokens, k] where `chosen`, 0 for a task that has none: [tasks]."""
    count, tasks = len(trace.tasks), trace.task_of_row
    total = np.bincount(tasks, weights.sum(axis=1), minlength=count)
    part = np.bincount(tasks, np.where(chosen, weights, 0.0).sum(axis=1), minlength=count)
    return part / np.where(total > 0, total, 1.0)


def compare(trace: Trace, experts: NDArray[np.int16]) -> Shares:
    """What becomes of the routed weight when `experts` [tokens, layers, any] serve instead of the trace's own.

    Experts no longer chosen are replaced, by rank, as far as there are new ones (rerouted); the others are skipped.
    """
    out = nothing(trace)
    for layer in range(trace.layers):
        old, new, weights = trace.experts[:, layer], experts[:, layer], gate_weights(trace, layer)
        same = (old[:, :, None] == new[:, None, :]) & (old >= 0)[:, :, None]
        lost = (old >= 0) & ~same.any(axis=2)
        fresh = ((new >= 0) & ~same.any(axis=1)).sum(axis=1, keepdims=True)
        replaced = lost & (np.cumsum(lost, axis=1) <= fresh)
        out["rerouted"][layer] = share_by_task(trace, weights, replaced)
        out["skipped"][layer] = share_by_task(trace, weights, lost & ~replaced)
    return out


def without(trace: Trace, dropped: NDArray[np.bool_]) -> tuple[Trace, Shares]:
    """The trace with the (token, layer, rank) pairs `dropped` left out; the others take over their weight."""
    experts = np.where(dropped, -1, trace.experts).astype(np.int16)
    altered = compare(trace, experts)
    order = np.argsort(experts < 0, axis=2, kind="stable")  # used ranks stay in front
    experts = np.take_along_axis(experts, order, axis=2)
    if trace.weights is None:
        return replace(trace, experts=experts), altered
    kept = np.where(dropped, 0, trace.weights.astype(np.float32))
    before = trace.weights.sum(axis=2, keepdims=True, dtype=np.float32)
    kept *= before / np.maximum(kept.sum(axis=2, keepdims=True), 1e-12)
    weights = np.take_along_axis(kept, order, axis=2).astype(np.float16)
    return replace(trace, experts=experts, weights=weights), altered
