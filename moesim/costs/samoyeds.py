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
L2_BYTES = 48 << 20  # of that card: RTX 4070 Super
FIRST_SPARSE = 8.0  # compute capability of the first GPUs with sparse tensor cores


def stored_bits(kept: int = 1, of: int = 2, columns: int = 128) -> float:
    """Bits per weight of the dense matrix, in the (N, M, V) format: N of every M rows of V columns, 2:4 inside them.

    16 bits per value kept, 2 bits of metadata each, and one 32-bit index per row of V columns that is kept.
    """
    density = kept / of
    return density / 2 * (16 + 2) + density * 32 / columns


def gemm_seconds(rows: int, columns: int, tokens: float, tflops: float, gbps: float) -> float:
    """A `rows` x `columns` weight on `tokens` tokens, in one kernel: whole blocks, at least 1.1 waves of them.

    Blocks go through the rows of the weight, then through the tokens. A weight that L2 does not hold is read again, at
    `gbps`, by every set of blocks that run at once: at 16384 x 6144 (58 MB) the published rate is half of that at
    14336 x 4096 (34 MB), of this kernel and of VENOM's. Other GPUs scale with their tensor rate: neither the blocks
    they run at once nor their clock were measured, and L2 is taken to be as large.
    """
    block = (BLOCK_US + COLUMN_US * columns) * 1e-6 * REFERENCE_TFLOPS / tflops
    high, wide = math.ceil(rows / ROWS), math.ceil(tokens / TOKENS)
    computing = block * max(LEAST_WAVES, high * wide / SMS)
    stored = rows * columns * stored_bits() / 8
    if stored <= L2_BYTES:
        return computing
    return max(computing, high * wide / max(high, SMS) * stored / (gbps * 1e9))


def grouped_seconds(costs: Roofline, model: Model, active: int, pairs: int, nbytes: float, bits: float) -> float:
    """`pairs` (token, expert) pairs spread evenly over `active` experts of `nbytes` each, one after the other.

    Tokens are read in place, so activations are read once and written once; nothing is permuted. Beside its three
    products, which hold activation and weighting, an expert of the released layer launches four small kernels: its
    tokens are found (two), gate and up multiplied, and outputs added up.
    """
    if not active or not pairs:
        return 0.0
    gpu = costs.machine.gpu
    if gpu.sm and float(gpu.sm) < FIRST_SPARSE:
        raise MachineError(
            f"{gpu.name} has no sparse tensor cores, which the kernel samoyeds needs; use kernel=grouped"
        )
    tokens, ffn, hidden = pairs / active, model.expert_ffn, model.hidden
    gbps = gpu.hbm_gbps * costs.terms.hbm
    widening = (model.ffn_matrices - 1) * gemm_seconds(ffn, hidden, tokens, gpu.tflops, gbps)
    compute = widening + gemm_seconds(hidden, ffn, tokens, gpu.tflops, gbps)
    activations = 2 * tokens * (model.ffn_matrices * hidden + model.ffn_matrices * ffn)
    memory = (nbytes + activations) / (gbps * 1e9)
    around = costs.small(4, 2 * tokens * (3 * hidden + 3 * ffn))
    return active * (model.ffn_matrices * costs.terms.kernel_us * 1e-6 + max(compute, memory) + around)
