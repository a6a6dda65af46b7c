"""Leave out experts that add little to a token: ODP of Mixture Compressor (arXiv 2410.06270, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.errors import PolicyError
from moesim.trace import PREFILL, Trace
from moesim.transforms.transform import Transformed, calibration_rows, without


@dataclass(frozen=True)
class DynamicPruning:
    """Drop the second expert where its gate weight is below mu of the first's; mu is the layer's median ratio over the
    calibration requests. With more than two experts per token, the same rule holds for every rank after the first.

    protected: share of prompt tokens that keep all. The paper ranks tokens by attention, which a trace does not have;
        a random draw of that size stands in.
    layers: share of the layers the rule applies to, those first where it drops the least weight; 20 of 32 in the
        released code, which ranks them by a profiled loss.
    """

    needs: ClassVar[tuple[str, ...]] = ("gate weights",)

    protected: float = 0.02
    layers: float = 20 / 32

    def __post_init__(self) -> None:
        if not 0 <= self.protected <= 1 or not 0 <= self.layers <= 1:
            raise PolicyError(f"ODP protected {self.protected} and layers {self.layers} must be shares from 0 to 1")

    def apply(self, model: Model, trace: Trace, seed: int) -> Transformed:
        if trace.weights is None or trace.top_k < 2:
            raise PolicyError("ODP goes by the gate weights of a token's experts; the trace has none, leave odp out")
        weights = trace.weights.astype(np.float32)
        ratios = weights[:, :, 1:] / np.maximum(weights[:, :, :1], np.float32(1e-12))
        low = self._below(trace, ratios)
        first = np.zeros_like(low[:, :, :1])
        dropped = np.concatenate([first, low], axis=2) & (trace.experts >= 0)
        rng = np.random.default_rng([seed, 0x0D9])
        dropped[(trace.phase == PREFILL) & (rng.random(trace.tokens) < self.protected)] = False
        dropped[:, self._spared(trace, weights, dropped)] = False
        served, altered = without(trace, dropped)
        return Transformed(model, served, altered, self._notes())

    @staticmethod
    def _below(trace: Trace, ratios: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Whether a rank after the first falls below its layer's median ratio: [tokens, layers, k - 1]."""
        rows = calibration_rows(trace)
        used = np.where(trace.experts[rows, :, 1:] >= 0, ratios[rows], np.nan)
        with np.errstate(all="ignore"):
            mu = np.nanmedian(used.transpose(1, 0, 2).reshape(trace.layers, -1), axis=1)
        return np.asarray(ratios < mu[None, :, None])

    def _spared(self, trace: Trace, weights: NDArray[np.float32], dropped: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Layers the rule leaves alone: those where the calibration requests would lose the most weight."""
        rows = calibration_rows(trace)
        loss = (weights[rows] * dropped[rows]).sum(axis=(0, 2)) / np.maximum(weights[rows].sum(axis=(0, 2)), 1e-12)
        return np.argsort(loss, kind="stable")[round(self.layers * trace.layers) :]

    def _notes(self) -> tuple[str, ...]:
        return (
            "ODP thresholds and layers are taken from the first tenth of the requests",
            f"ODP protects a random {self.protected:.0%} of prompt tokens: the trace has no attention to rank them by",
        )
