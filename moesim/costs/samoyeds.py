"""Expert kernels on doubly sparse weights: Samoyeds (EuroSys 2025, arXiv 2503.10725)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moesim.costs.roofline import Roofline
from moesim.errors import MachineError

if TYPE_CHECKING:
    from moesim.model import Model

# A block of the released kernel covers 256 rows of the dense weight and 64 tokens. The fit to the 21 points of its
# benchmark on an RTX 4070 Super (56 SMs): blocks run in waves of one per SM, a wave takes 5 us + 12 ns per column.
ROWS, TOKENS, SMS = 256, 64, 56
BLOCK_US, COLUMN_US, LEAST_WAVES = 5.0, 0.012, 1.1
REFERENCE_TFLOPS = 83  # of that card, as in data/machines.csv
FIRST_SPARSE = 8.0  # compute capability of the first GPUs with sparse tensor cores


def stored_bits(kept: int = 1, of: int = 2, columns: int = 128) -> float:
    """Bits per weight of the dense matrix, in the (N, M, V) format: N of every M rows of V columns, 2:4 inside them.

    16 bits per value kept, 2 bits of metadata each, and one 32-bit index per row of V columns that is kept.
    """
    density = kept / of
    return density / 2 * (16 + 2) + density * 32 / columns


def gemm_seconds(rows: int, columns: int, tokens: float, tflops: float) -> float:
    """A `rows` x `columns` weight on `tokens` tokens, in one kernel: whole blocks, at least 1.1 waves of them.

    Other GPUs scale with their tensor rate: neither the blocks they run at once nor their clock were measured.
    """
    block = (BLOCK_US + COLUMN_US * columns) * 1e-6 * REFERENCE_TFLOPS / tflops
    blocks = math.ceil(rows / ROWS) * math.ceil(tokens / TOKENS)
    return block * max(LEAST_WAVES, blocks / SMS)


def grouped_seconds(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """`pairs` (token, expert) pairs spread evenly over `active` experts of `nbytes` each, one after the other.

    Tokens are read in place, so activations are read once and written once; nothing is permuted.
    """
    if not active or not pairs:
        return 0.0
    gpu = costs.machine.gpu
    if gpu.sm and float(gpu.sm) < FIRST_SPARSE:
        raise MachineError(
            f"{gpu.name} has no sparse tensor cores, which the kernel samoyeds needs; use kernel=grouped"
        )
    tokens, ffn, hidden = pairs / active, model.expert_ffn, model.hidden
    widening = (model.ffn_matrices - 1) * gemm_seconds(ffn, hidden, tokens, gpu.tflops)
    compute = widening + gemm_seconds(hidden, ffn, tokens, gpu.tflops)
    activations = 2 * tokens * (model.ffn_matrices * hidden + model.ffn_matrices * ffn)
    memory = (nbytes + activations) / (gpu.hbm_gbps * 1e9 * costs.terms.hbm)
    return active * (model.ffn_matrices * costs.terms.kernel_us * 1e-6 + max(compute, memory))
