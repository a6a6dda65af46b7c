"""HEXA-MoE's in-place kernel: blocks of 16 tokens of one expert, weights read once from HBM and per block from L2."""

from __future__ import annotations

import pytest

from moesim.costs.esmm import padded_rows
from moesim.costs.fitted import costs_of
from moesim.costs.table import CostTable
from moesim.machine_file import changed
from moesim.model import load_model

A100 = changed("a100-80gb-sxm", {})
MODEL = load_model("mixtral-8x7b")


def table(kernel: str) -> CostTable:
    return CostTable(MODEL, A100, costs_of(A100), False, kernel)


def test_every_expert_fills_a_block_at_least():
    assert padded_rows(2, 2) == 32 and padded_rows(1, 16) == 23.5
    assert padded_rows(8, 1600) == 1600 + 8 * 7.5


def test_decoding_reads_the_weights_as_any_grouped_kernel():
    assert table("esmm").grouped_ns(2, 2) == pytest.approx(table("grouped").grouped_ns(2, 2), rel=0.01)
    assert table("esmm").grouped_ns(0, 0) == 0


def test_many_tokens_are_bound_by_reading_weights_from_l2_again():
    """16 rows do 16 operations a byte: 5,120 bytes a clock feed 115 of 312 TFLOPS."""
    pairs = 1 << 16
    flops = 2 * (pairs + 8 * 7.5) * MODEL.expert_params
    assert table("esmm").grouped_ns(8, pairs) == pytest.approx(1e9 * flops / (16 * 5120 * 1.41e9), rel=1e-6)
    assert table("esmm").grouped_ns(8, pairs) > table("grouped").grouped_ns(8, pairs)


def test_more_tokens_or_experts_are_never_quicker():
    esmm = table("esmm")
    assert [esmm.grouped_ns(4, n) for n in range(4, 400)] == sorted(esmm.grouped_ns(4, n) for n in range(4, 400))
    assert [esmm.grouped_ns(n, 64) for n in range(1, 9)] == sorted(esmm.grouped_ns(n, 64) for n in range(1, 9))
