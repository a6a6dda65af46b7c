"""Experts as a Python loop over the layer runs them, kernel by kernel: Hugging Face transformers' MoE blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesim.costs.roofline import Roofline
    from moesim.model import Model

# Beside its matrices an expert of transformers' Mixtral and Switch blocks launches about eight kernels: its tokens are
# found (two), gathered, activated, multiplied, weighted, cast and scattered back. Those read and write rows as wide as
# the model 7 times (gathering and weighting 2 each, adding to the output 3) and as wide as an expert 5 (activation 2,
# product 3).
AROUND, HIDDEN_MOVES, FFN_MOVES = 8, 7, 5
TILE = 64  # tokens: tensor cores multiply whole tiles, of up to so many


def active_seconds(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """One expert after the other, those with tokens only."""
    return _loop(costs, model, active, pairs, nbytes, bits, 0)


def all_seconds(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """The same, but every expert of the layer is launched, with tokens or without (SiDA, remark 1).

    Meant for a layer computed in one go: arrivals that compute one by one would pay for the layer each time.
    """
    return _loop(costs, model, active, pairs, nbytes, bits, model.experts - active)


def _loop(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float, idle: int) -> float:
    """Finding an expert's tokens waits for the GPU, so nothing of one expert overlaps with the next."""
    if not active or not pairs:
        return 0.0
    launching = costs.launches(AROUND + model.ffn_matrices)
    rows = math.ceil(pairs / active)
    moved = nbytes + 2 * rows * (2 * model.hidden + model.ffn_matrices * model.expert_ffn)
    around = costs.small(AROUND, 2 * rows * (HIDDEN_MOVES * model.hidden + FFN_MOVES * model.expert_ffn))
    computing = costs.gemm(_whole_tiles(rows), model.expert_params, moved, bits, kernels=model.ffn_matrices) + around
    return active * max(launching, computing) + idle * launching


def _whole_tiles(rows: int) -> int:
    """`rows` as tensor cores multiply them: in one tile of a power of two, or in tiles of 64."""
    return 1 << (rows - 1).bit_length() if rows < TILE else TILE * math.ceil(rows / TILE)
