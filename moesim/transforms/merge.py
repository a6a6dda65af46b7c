"""Experts averaged into fewer: EEP's second phase, at serving time a smaller model like a pruned one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from moesim.architecture import Model
from moesim.trace import Trace
from moesim.transforms.prune import Prune
from moesim.transforms.transform import Transformed


@dataclass(frozen=True)
class Merge:
    """Every survivor of `pruned` becomes a weighted sum of all experts of its layer (W_EM of EEP, arXiv 2407.00945).

    The coefficients are searched for, starting from pruning; so bytes and routing are those of the pruned model, and
    all weight that is not skipped passes through an expert that the model did not have.
    """

    needs: ClassVar[tuple[str, ...]] = Prune.needs

    pruned: Prune

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        done = self.pruned.apply(model, trace, seed)
        none, skipped = done.altered["lower_precision"], done.altered["skipped"]
        altered = done.altered | {"rerouted": none, "merged": 1 - skipped}
        note = "merging coefficients are searched for in the paper: routing is taken to be that of the pruned model"
        return replace(done, altered=altered, notes=(*done.notes, note))
