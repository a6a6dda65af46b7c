"""Leave the second expert out where the layer hardly feels it: AdapMoE's adaptive gating (arXiv 2408.10284)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from moesim.architecture import Model
from moesim.errors import PolicyError
from moesim.policies.capacity import at_depth
from moesim.trace import DECODE, Trace
from moesim.transforms.transform import Transformed, without

# S_l of Mixtral-8x7B, layers 0 to 31: PKU-SEC-Lab/AdapMoE run.py, to four digits.
MIXTRAL_SENSITIVITY = (
    46.69, 17.3, 13.02, 7.641, 4.169, 2.23, 1.256, 0.8445, 0.6838, 0.5603, 0.5126, 0.478, 0.4454, 0.4356, 0.3836,
    0.3099, 0.2331, 0.1761, 0.1384, 0.1138, 0.1047, 0.09543, 0.08625, 0.07713, 0.06938, 0.06109, 0.05025, 0.04256,
    0.0335, 0.02527, 0.02068, 0.02295,
)  # fmt: skip


@dataclass(frozen=True)
class SensitivityGating:
    """In decoding, drop every expert after the first whose normalised gate weight is below sqrt(T / S_l).

    threshold: T of the paper. sensitivity: S_l by layer; a table of another depth is read at the same relative depth.
    """

    needs: ClassVar[tuple[str, ...]] = ("gate weights",)

    threshold: float = 0.005
    sensitivity: tuple[float, ...] = MIXTRAL_SENSITIVITY

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or not self.sensitivity or min(self.sensitivity) <= 0:
            raise PolicyError(f"gating threshold {self.threshold} must be at least 0, and every sensitivity above 0")

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        if trace.weights is None:
            raise PolicyError("AdapMoE's gating goes by gate weights; the trace has none: set transforms=none")
        limits = np.sqrt(self.threshold / at_depth(self.sensitivity, trace.layers))
        weights = trace.weights.astype(np.float32)
        weights /= np.maximum(weights.sum(axis=2, keepdims=True), 1e-12)
        dropped = (weights < limits[None, :, None]) & (trace.experts >= 0)
        dropped[:, :, 0] = False
        dropped[trace.phase != DECODE] = False
        served, altered = without(trace, dropped)
        notes: tuple[str, ...] = ()
        if len(self.sensitivity) != trace.layers:
            notes = (f"gating sensitivities of {len(self.sensitivity)} layers, read at the same relative depth",)
        return Transformed(model, served, altered, notes)
