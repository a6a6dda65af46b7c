"""One gate decision per sequence or task, its experts merged into one: MEO (arXiv 2310.09832)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.errors import PolicyError
from moesim.trace import PREFILL, Trace
from moesim.transforms.transform import Transformed, calibration_rows, gate_weights, mean_weight, nothing, share_by_task

LEVELS = ("sequence", "task")


@dataclass(frozen=True)
class SequenceGate:
    """`k` experts per layer, chosen by the mean gate probability of the prompt, summed into one for the whole request.

    level: `sequence` merges for every request, `task` once per task, chosen on the calibration requests. Merging reads
    k experts and costs 2 k |theta| operations, as computing one token with each of them does, so the first row of a
    request (of a task) names them beside the merged expert. Merged experts are further experts of the model, numbered
    from `experts` on: one per task, or one for each of `sequences` that may be served at a time;
    requests take them in turn, so two that overlap by more than `sequences` places in the trace would count as one.
    """

    merges = True  # experts of its own making, which no other can stand in for

    k: int = 4
    level: str = "sequence"
    sequences: int = 8

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise PolicyError(f"MEO level '{self.level}' must be one of {', '.join(LEVELS)}")
        if self.k < 1 or self.sequences < 1:
            raise PolicyError(f"MEO k {self.k} and sequences {self.sequences} must be at least 1")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("task labels",) if self.level == "task" else ("prompts (else a request's first token decides)",)

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        if self.k > trace.info.experts:
            raise PolicyError(f"MEO merges {self.k} experts, but {model.name} has {trace.info.experts} per layer")
        groups, chosen = self._gate(trace)
        of_task = self.level == "task"
        buffers = len(chosen) if of_task else min(self.sequences, len(chosen))
        first = np.array([int(np.argmax(groups == g)) for g in range(len(chosen))])  # first request of each group
        experts = np.full((trace.tokens, trace.layers, 1 + self.k), -1, dtype=np.int16)
        merged = trace.info.experts + groups % buffers
        experts[:, :, 0] = merged[trace.request][:, None]
        experts[trace.first_row[:-1][first], :, 1:] = chosen
        weights = np.zeros(experts.shape, dtype=np.float16)
        weights[:, :, 0] = 1.0 if trace.weights is None else trace.weights.sum(axis=2, dtype=np.float32)
        count = trace.info.experts + buffers
        info = replace(trace.info, experts=count, top_k=1 + self.k)
        served = replace(trace, info=info, experts=experts, weights=weights, probabilities=None)
        return Transformed(
            _with_buffers(model, buffers),
            served,
            self._altered(trace, chosen[groups]),
            self._notes(trace, model, buffers),
            None if of_task else self.sequences,
        )

    def _gate(self, trace: Trace) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The group of each request, and the experts of each group: [groups, layers, k]."""
        if self.level == "sequence":
            groups = np.arange(len(trace.requests))
            spans = [
                [slice(int(a), int(max(b, a + 1)))] for a, b in zip(trace.first_row, trace.decode_start, strict=False)
            ]
        else:
            names = trace.tasks
            if names == ("",):
                raise PolicyError("MEO per task needs task labels, which the trace lacks; use level='sequence'")
            groups = np.array([names.index(task) for task in trace.requests.task])
            calibrated = groups[: max(1, len(groups) // 10)]
            spans = []
            for group in range(len(names)):
                own = np.flatnonzero(calibrated == group)
                rows = trace.first_row
                spans.append([slice(int(rows[r]), int(rows[r + 1])) for r in own] or [calibration_rows(trace)])
        chosen = [np.argsort(-self._scores(trace, rows), axis=1, kind="stable")[:, : self.k] for rows in spans]
        return groups, np.stack(chosen)

    @staticmethod
    def _scores(trace: Trace, spans: list[slice]) -> NDArray[np.float64]:
        """Gate probability gathered over the rows, gate weight where the trace has none: [layers, experts]."""
        if trace.probabilities is not None:
            return np.sum([trace.probabilities[rows].sum(axis=0, dtype=np.float64) for rows in spans], axis=0)
        gathered = [[mean_weight(trace, layer, rows) for layer in range(trace.layers)] for rows in spans]
        return np.sum(gathered, axis=0)

    @staticmethod
    def _altered(trace: Trace, chosen: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Merged: weight of experts in their request's mixture, `chosen` [requests, layers, k]; rerouted: the rest."""
        out = nothing(trace)
        for layer in range(trace.layers):
            inside = (trace.experts[:, layer, :, None] == chosen[trace.request, layer][:, None, :]).any(axis=2)
            out["merged"][layer] = share_by_task(trace, gate_weights(trace, layer), inside)
        return out | {"rerouted": 1 - out["merged"]}

    def _notes(self, trace: Trace, model: Model, buffers: int) -> tuple[str, ...]:
        size = buffers * sum(model.expert_bytes(layer) for layer in range(trace.layers))
        notes: tuple[str, ...] = (
            f"merged experts of {buffers} {self.level}s take {size / 1e6:.0f} MB more; merging {self.k} of a layer "
            f"reads them once and costs {2 * self.k * model.expert_params / 1e6:.0f} MFLOP",
        )
        if not (trace.phase == PREFILL).any() and self.level == "sequence":
            notes += ("no prompts in the trace: a request's first token decides which experts it merges",)
        return notes


def _with_buffers(model: Model, buffers: int) -> Model:
    sizes = model.expert_sizes
    if sizes is not None:  # a merged expert is as large as the largest it is made of
        sizes = tuple(row + (max(row),) * buffers for row in sizes)
    return replace(model, experts=model.experts + buffers, top_k=1, expert_sizes=sizes)
