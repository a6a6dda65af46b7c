"""Samoyeds' format and kernel model against what its authors published."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs.roofline import Roofline
from moesim.costs.samoyeds import gemm_seconds, stored_bits
from moesim.costs.table import CostTable
from moesim.errors import MachineError, PolicyError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.systems import load_system, with_setting

# (m, k, n): TFLOPS as plotted, which count all n tokens while n / 4 are selected; SYSTEMS card 2, released notebook.
SWEEP = {
    (256, 4096, 4096): 147, (512, 4096, 4096): 282, (1024, 4096, 4096): 441, (2048, 4096, 4096): 629,
    (4096, 4096, 4096): 545, (8192, 4096, 4096): 625, (16384, 4096, 4096): 614, (4096, 256, 4096): 226,
    (4096, 512, 4096): 347, (4096, 1024, 4096): 436, (4096, 2048, 4096): 509,
}  # fmt: skip


def plotted(m, k, n):
    return m * n * (2 * k - 1) / gemm_seconds(m, k, n / 4, 83, 504 * 0.82) / 1e12


def test_bits_per_weight_of_the_default_format():
    """A quarter of the values at 16 bits, 2 bits of metadata each, a 32-bit index per row of 128 columns kept."""
    assert stored_bits(1, 2, 128) == 0.25 * 16 + 0.25 * 2 + 0.5 * 32 / 128
    assert stored_bits(1, 2, 128) / 16 == pytest.approx(0.289, abs=1e-3)
    assert stored_bits(4, 8, 128) == stored_bits(1, 2, 128)


def test_the_wave_model_follows_the_published_sweep():
    errors = [abs(plotted(*shape) / reported - 1) for shape, reported in SWEEP.items()]
    assert np.mean(errors) < 0.10 and max(errors) < 0.27


def test_throughput_saturates_with_rows():
    speeds = [plotted(m, 4096, 4096) for m in (256, 512, 1024, 2048)]
    assert speeds == sorted(speeds) and plotted(16384, 4096, 4096) < 1.1 * plotted(8192, 4096, 4096)


def test_weights_beyond_l2_are_read_again():
    """Figure 12: 596 at 14336 x 4096, 284 at 16384 x 6144, whose 58 MB no L2 of 48 MiB holds; 16 times 64 tokens."""
    assert plotted(14336, 4096, 4096) == pytest.approx(596, rel=0.15)
    assert plotted(16384, 6144, 4096) == pytest.approx(284, rel=0.3)
    stored = 16384 * 6144 * stored_bits() / 8
    assert gemm_seconds(16384, 6144, 1024, 83, 400) == pytest.approx(16 * stored / 400e9)
    assert gemm_seconds(16384, 6144, 1024, 83, 4000) == gemm_seconds(16384, 6144, 1024, 83, 1e6), "blocks decide"


def test_many_small_experts_gain_less_than_few_large_ones():
    """Card 2: fine-grained experts hurt, blocks are padded and too few. 4096 tokens, all experts used."""
    machine = load_machine("rtx-4070-super")
    gain = {}
    for name in ("mixtral-8x7b", "qwen1.5-moe-a2.7b"):
        model = load_model(name)
        sparse = model.with_precision(expert_bits=stored_bits())
        pairs = 4096 * model.top_k
        dense = CostTable(model, machine, Roofline(machine), False).grouped_ns(model.experts, pairs)
        gain[name] = dense / CostTable(sparse, machine, Roofline(machine), False, "samoyeds").grouped_ns(
            model.experts, pairs
        )
    assert gain["mixtral-8x7b"] > gain["qwen1.5-moe-a2.7b"]
    assert gain["mixtral-8x7b"] > 1


def test_the_kernel_is_a_choice_of_its_own():
    system = load_system("Samoyeds")
    assert system.kernel == "samoyeds" and system.expert_bits == stored_bits()
    assert with_setting(load_system("LRU"), "kernel=samoyeds").kernel == "samoyeds"
    with pytest.raises(PolicyError, match="unknown kernel"):
        replace(system, kernel="samoyed")
    with pytest.raises(PolicyError, match="format"):
        load_system("Samoyeds(n=3)")


def test_gpus_without_sparse_tensor_cores_are_refused():
    machine = load_machine("v100-32gb")
    table = CostTable(load_model("mixtral-8x7b"), machine, Roofline(machine), False, "samoyeds")
    with pytest.raises(MachineError, match="sparse tensor cores"):
        table.grouped_ns(2, 2)
