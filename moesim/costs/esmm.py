"""HEXA-MoE's in-place expert kernel, ESMM (arXiv 2411.01288, section 3.1): nothing is dispatched or combined."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.costs.layers import ACTIVATION_BYTES

if TYPE_CHECKING:
    from moesim.costs.roofline import Roofline
    from moesim.model import Model

# Tokens of one expert that a thread block takes (BLK, CUDA and Triton code); the last block of an expert is padded.
ROWS = 16
# Every block reads its expert's weights again: from L2, where HBM has been read once. L2 and tensor cores run on one
# clock, so its rate is that of A100 per operation: 5120 bytes a clock at 1.41 GHz beside 312 TFLOPS (NVIDIA's
# whitepaper), taken for all GPUs. Blocks of 16 rows then reach 37 % of the tensor rate at most.
L2_BYTES_PER_FLOP = 5120 * 1.41e9 / 312e12


def padded_rows(active: int, pairs: int) -> float:
    """Rows that are computed: half a block beyond its tokens for each of `active` experts, but at least a block."""
    return max(ROWS * active, pairs + (ROWS - 1) / 2 * active)


def grouped_seconds(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """`pairs` (token, expert) pairs over `active` experts of `nbytes` each.

    Tokens are read where they lie and added up where they belong, so that beside the weights only inputs, intermediates
    and outputs move.
    """
    if not active or not pairs:
        return 0.0
    rows = padded_rows(active, pairs)
    pair_bytes = ACTIVATION_BYTES * (2 * model.hidden + model.ffn_matrices * model.expert_ffn)
    moved = pair_bytes * pairs / rows  # padding computes, but is neither read nor written
    kernel = costs.grouped(active, round(rows), params=model.expert_params, nbytes=nbytes, pair_bytes=moved, bits=bits)
    return max(kernel, rows / ROWS * nbytes / (L2_BYTES_PER_FLOP * costs.machine.gpu.tflops * 1e12))
