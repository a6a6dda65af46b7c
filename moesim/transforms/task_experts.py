"""One expert per layer and task, the rest pruned away: Task-Specific Expert Pruning (arXiv 2206.00277)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.errors import PolicyError
from moesim.trace import Trace
from moesim.transforms.transform import Transformed, calibration_rows, compare, gate_weights


@dataclass(frozen=True)
class TaskExperts:
    """Every task is fine-tuned to the one most proficient expert of each layer, which makes it a dense model.

    Proficiency = alpha x share of the gate weight + (1 - alpha) x share of the tokens, over the task's calibration
    requests. The dense models of the tasks differ, so the served model has one expert per layer and task: a cache of
    them switches between models. With one task, or no labels, a single expert is left.
    """

    needs: ClassVar[tuple[str, ...]] = ("task labels (else one task)",)

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PolicyError(f"TSEP alpha {self.alpha} must lie between 0 and 1")

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        tasks, task_of = trace.tasks, trace.task_of_row
        best = self._best(trace, task_of, len(tasks))
        altered = compare(trace, best[task_of][:, :, None])
        experts = np.broadcast_to(task_of[:, None, None], (trace.tokens, trace.layers, 1)).astype(np.int16)
        weights = None
        if trace.weights is not None:
            weights = trace.weights.sum(axis=2, keepdims=True, dtype=np.float32).astype(np.float16)
        info = replace(trace.info, experts=len(tasks), top_k=1)
        served = replace(trace, info=info, experts=experts, weights=weights, probabilities=None)
        notes = (
            "a task's expert is its most proficient one in the first tenth of the requests; fine-tuning follows",
            "only experts differ between tasks here: the fine-tuned attention of each task is not switched",
        )
        return Transformed(_shrink(model, len(tasks)), served, altered, notes)

    def _best(self, trace: Trace, task_of: NDArray[np.int32], tasks: int) -> NDArray[np.int16]:
        """The expert each task keeps: [tasks, layers]; a task without calibration requests goes by all of them."""
        rows = calibration_rows(trace)
        out = np.empty((tasks, trace.layers), dtype=np.int16)
        for layer in range(trace.layers):
            ids, weights = trace.experts[rows, layer], gate_weights(trace, layer, rows)
            for task in range(tasks):
                own = (task_of[rows] == task)[:, None] & (ids >= 0)
                own = own if own.any() else ids >= 0
                score = np.bincount(ids[own], weights[own], minlength=trace.info.experts)
                hits = np.bincount(ids[own], minlength=trace.info.experts)
                proficiency = self.alpha * score / max(score.sum(), 1e-12) + (1 - self.alpha) * hits / max(
                    hits.sum(), 1
                )
                out[task, layer] = int(np.argmax(proficiency))
        return out


def _shrink(model: Model, experts: int) -> Model:
    """As many experts as tasks, stored as the model's largest are."""
    sizes = model.expert_sizes
    if sizes is not None:
        sizes = tuple((max(row),) * experts for row in sizes)
    return replace(model, experts=experts, top_k=1, expert_sizes=sizes, pruned=True)
