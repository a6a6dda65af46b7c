"""Bits per expert by integer program: PMQ of Mixture Compressor (arXiv 2410.06270, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model, stored_bytes
from moesim.errors import PolicyError
from moesim.trace import Trace
from moesim.transforms.transform import Transformed, calibration_rows, mean_weight, nothing

# Root of the mean squared error of the best quantiser of a normal variable with 2, 4 and 8 levels, relative to its
# deviation: Max, "Quantizing for minimum distortion", IRE Trans. Inf. Theory 6 (1960), table 1.
GAUSSIAN_ERRORS = ((1, 0.603), (2, 0.343), (3, 0.186))

UNSEEN = 1e-3  # of the mean importance: experts that calibration never chose share what the others leave


@dataclass(frozen=True)
class MixedBits:
    """Every layer's experts share `mean_bits` x experts bits so that sum phi^a w^b eps^g is least.

    phi: how often an expert is chosen, w: its mean gate weight, both over the calibration requests' tokens; eps: error
    of its output at that width, which only its weights tell. errors: (bits, eps) of each width, the same for all
    experts unless measured; the defaults are those of a normal variable. exponents: (a, b, g), of the released code.
    Where 2 and 3 bits are on offer, at least one expert gets each. group: weights that share a 16-bit scale and a zero
    point of their own width (GPTQ). other_bits: width of all other weights but embeddings; None leaves them.
    """

    mean_bits: float = 2.5
    errors: tuple[tuple[int, float], ...] = GAUSSIAN_ERRORS
    exponents: tuple[float, float, float] = (1.0, 1.5, 2.0)
    group: int = 128
    other_bits: float | None = 4

    def __post_init__(self) -> None:
        widths = [bits for bits, _ in self.errors]
        if not widths or min(widths) < 1 or not min(widths) <= self.mean_bits <= max(widths):
            raise PolicyError(f"mean_bits {self.mean_bits} must lie within the widths on offer, {widths} bits")
        if self.group < 1 or not (self.other_bits is None or 0 < self.other_bits <= 64):
            raise PolicyError(f"bits group {self.group} must be at least 1, other_bits {self.other_bits} above 0")

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        rows = calibration_rows(trace)
        widths = [bits for bits, _ in self.errors]
        budget = int(self.mean_bits * model.experts + 1e-9)
        chosen = [allocate(self._costs(trace, layer, rows), widths, budget) for layer in range(trace.layers)]
        size = {bits: stored_bytes(model.expert_params, self._stored(bits)) for bits in widths}
        if self.other_bits is not None:
            kept = model.weight_bits if model.embedding_bits is None else model.embedding_bits
            model = replace(model.with_precision(weight_bits=self._stored(self.other_bits)), embedding_bits=kept)
        mean = float(np.mean(chosen))
        sizes = tuple(tuple(size[int(bits)] for bits in row) for row in chosen)
        served = replace(model, expert_bits=self._stored(mean), expert_sizes=sizes)
        none = nothing(trace)
        altered = none | {"lower_precision": none["skipped"] + 1}
        return Transformed(served, trace, altered, self._notes(trace, mean))

    def _stored(self, bits: float) -> float:
        return bits + (16 + bits) / self.group

    def _costs(self, trace: Trace, layer: int, rows: slice) -> NDArray[np.float64]:
        """phi^a w^b eps^g: [experts, widths]."""
        a, b, g = self.exponents
        ids = trace.experts[rows, layer]
        phi = np.bincount(ids[ids >= 0], minlength=trace.info.experts) / max(len(ids), 1)
        importance = phi**a * mean_weight(trace, layer, rows) ** b
        importance = np.maximum(importance, UNSEEN * importance.mean())
        return importance[:, None] * np.array([error for _, error in self.errors]) ** g

    def _notes(self, trace: Trace, mean: float) -> tuple[str, ...]:
        notes: tuple[str, ...] = (
            f"experts at {mean:.3g} bits on average before scales, dealt out by the first tenth of the requests",
            "kernels take an expert's mean size in its model; what is copied and cached has its own",
        )
        if self.errors == GAUSSIAN_ERRORS:
            notes += (
                "quantisation errors are assumed: those of normally distributed weights, the same for all experts",
            )
        return notes


def allocate(costs: NDArray[np.float64], widths: Sequence[int], budget: int) -> NDArray[np.int64]:
    """The width of each expert, with the least sum of costs [experts, widths] and at most `budget` bits in all.

    At least one expert gets 3 bits and one 2, where those are among `widths`. Raises PolicyError where it cannot be.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    experts, choices = costs.shape
    each = np.kron(np.eye(experts), np.ones(choices))  # one width per expert
    total = np.tile(np.asarray(widths, dtype=float), experts)
    rules = [LinearConstraint(each, 1, 1), LinearConstraint(total[None], 0, budget)]
    for bits in {2, 3} & set(widths) if experts > 1 else ():
        rules.append(LinearConstraint(np.tile(np.asarray(widths) == bits, experts).astype(float)[None], 1, experts))
    scaled = costs.ravel() / max(float(costs.max()), 1e-300)  # the solver's tolerances are absolute
    found = milp(
        scaled, constraints=rules, integrality=np.ones(costs.size), bounds=Bounds(0, 1), options={"mip_rel_gap": 0}
    )
    if found.x is None:
        raise PolicyError(f"{budget} bits for {experts} experts of {list(widths)} bits each cannot be; raise mean_bits")
    return np.asarray(widths, dtype=np.int64)[np.argmax(found.x.reshape(experts, choices), axis=1)]
