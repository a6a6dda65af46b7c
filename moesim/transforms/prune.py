"""Fewer experts per layer, fewer per token: EEP's first phase, SEER-MoE's first stage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.errors import PolicyError
from moesim.trace import Trace
from moesim.transforms.transform import Transformed, calibration_rows, compare, gate_order, gate_weights, mean_weight

SCORES = {
    "count": "how often it was chosen (SEER-MoE's actual count, EEP's frequency)",
    "soft": "the gate weight it gathered (SEER-MoE's soft count)",
}


@dataclass(frozen=True)
class Prune:
    """Keep `experts` of every layer, and `top_k` per token (None: as many as before, or all that are left).

    by: what decides who stays, on the calibration requests: `count` or `soft`. keep: instead, the lists themselves, one
    per MoE layer. The routing follows: experts of a token that stay keep their rank, and its next best survivors by
    gate probability (by popularity where the trace has none) fill the ranks of those that left.
    """

    needs: ClassVar[tuple[str, ...]] = ("gate probabilities (else popularity)",)

    experts: int
    top_k: int | None = None
    by: str = "count"
    keep: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.by not in SCORES:
            raise PolicyError(f"prune by '{self.by}' must be one of {', '.join(SCORES)}, or give the lists to keep")
        if self.experts < 1:
            raise PolicyError(f"prune to {self.experts} experts: at least 1 must be left")

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        top_k = min(trace.top_k, self.experts) if self.top_k is None else self.top_k
        if self.experts > model.experts or not 1 <= top_k <= min(trace.top_k, self.experts):
            raise PolicyError(
                f"prune to {self.experts} experts, {top_k} per token: {model.name} has {model.experts} and uses "
                f"{trace.top_k}; ask for no more than that"
            )
        survivors = self.survivors(trace)
        chosen = _choose(trace, survivors, top_k)
        pruned = _renumber(trace, chosen, survivors)
        return Transformed(_shrink(model, survivors, top_k), pruned, compare(trace, chosen), self._notes(trace))

    def survivors(self, trace: Trace) -> NDArray[np.int64]:
        """Experts that stay, ascending: [layers, experts left]."""
        if self.keep:
            sorted_lists = [sorted(set(row)) for row in self.keep]
            inside = all(0 <= e < trace.info.experts for row in sorted_lists for e in row)
            if [len(row) for row in sorted_lists] != [self.experts] * trace.layers or not inside:
                raise PolicyError(
                    f"prune keep: give {trace.layers} lists of {self.experts} different experts from 0 to "
                    f"{trace.info.experts - 1}, one per MoE layer"
                )
            return np.array(sorted_lists)
        rows = calibration_rows(trace)
        if self.by == "count":
            scores = trace.popularity(rows).astype(np.float64)
        else:
            scores = np.stack([mean_weight(trace, layer, rows) for layer in range(trace.layers)])
        return np.sort(np.argsort(-scores, axis=1, kind="stable")[:, : self.experts], axis=1)

    def _notes(self, trace: Trace) -> tuple[str, ...]:
        notes: tuple[str, ...] = () if self.keep else ("survivors are chosen by the first tenth of the requests",)
        if trace.probabilities is None:
            notes += ("tokens of pruned experts go to popular survivors: the trace has no gate probabilities",)
        return notes


def _choose(trace: Trace, survivors: NDArray[np.int64], top_k: int) -> NDArray[np.int16]:
    """The survivors each token uses, by rank, numbered as in the trace; no more than it used: [tokens, layers, k]."""
    out = np.full((trace.tokens, trace.layers, top_k), -1, dtype=np.int16)
    for layer in range(trace.layers):
        scores = gate_order(trace, layer)[:, survivors[layer]]
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        used = np.arange(top_k) < (trace.experts[:, layer] >= 0).sum(axis=1, keepdims=True)
        out[:, layer] = np.where(used, survivors[layer][best], -1)
    return out


def _renumber(trace: Trace, chosen: NDArray[np.int16], survivors: NDArray[np.int64]) -> Trace:
    """The trace of the pruned model: experts counted from 0, weights and probabilities with the sums they had."""
    left = survivors.shape[1]
    experts = np.empty_like(chosen)
    weights = None if trace.weights is None else np.empty(chosen.shape, dtype=np.float16)
    probabilities = None
    if trace.probabilities is not None:
        probabilities = np.empty((trace.tokens, trace.layers, left), dtype=np.float16)
    for layer in range(trace.layers):
        number = np.full(trace.info.experts + 1, -1, dtype=np.int16)
        number[survivors[layer]] = np.arange(left)
        experts[:, layer] = number[chosen[:, layer]]
        if weights is not None:
            weights[:, layer] = _weights(trace, layer, chosen[:, layer].astype(np.int64))
        if probabilities is not None and trace.probabilities is not None:
            rest = trace.probabilities[:, layer, survivors[layer]].astype(np.float64)
            probabilities[:, layer] = rest / np.maximum(rest.sum(axis=1, keepdims=True), 1e-12)
    info = replace(trace.info, experts=left, top_k=chosen.shape[2])
    return replace(trace, info=info, experts=experts, weights=weights, probabilities=probabilities)


def _weights(trace: Trace, layer: int, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
    """Weights of `chosen` [tokens, k]: what each had, a substitute's by its probability, scaled to the token's sum."""
    ids, own = trace.experts[:, layer].astype(np.int64), gate_weights(trace, layer)
    total = own.sum(axis=1, keepdims=True)
    used = np.maximum((ids >= 0).sum(axis=1, keepdims=True), 1)
    if trace.probabilities is None:
        of_expert = np.tile(total / used, (1, trace.info.experts + 1))
    else:
        odds = np.hstack([trace.probabilities[:, layer].astype(np.float64), np.zeros((trace.tokens, 1))])
        of_expert = odds * total / np.maximum(np.take_along_axis(odds, ids, axis=1).sum(axis=1, keepdims=True), 1e-12)
    np.put_along_axis(of_expert, ids, own, axis=1)
    new = np.where(chosen >= 0, np.take_along_axis(of_expert, chosen, axis=1), 0.0)
    share = new.sum(axis=1, keepdims=True)
    even = (chosen >= 0) / np.maximum((chosen >= 0).sum(axis=1, keepdims=True), 1)
    return np.where(share > 0, new * total / np.maximum(share, 1e-12), even * total)


def _shrink(model: Model, survivors: NDArray[np.int64], top_k: int) -> Model:
    sizes = model.expert_sizes
    if sizes is not None:
        sizes = tuple(tuple(row[e] for e in kept) for row, kept in zip(sizes, survivors.tolist(), strict=True))
    return replace(model, experts=survivors.shape[1], top_k=top_k, expert_sizes=sizes, pruned=True)
