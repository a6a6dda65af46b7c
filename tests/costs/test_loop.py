"""Experts in a Python loop: launches or weights, whichever takes longer, expert by expert."""

from __future__ import annotations

import pytest

from moesim.costs.fitted import costs_of
from moesim.costs.table import CostTable
from moesim.efficiencies import efficiencies
from moesim.machine_file import changed
from moesim.model import load_model
from moesim.question import Question, run
from moesim.trace.assumed import distinct_routing

A100 = changed("a100-80gb-sxm", {})
LAUNCH_US = efficiencies().launch_us


def table(model: str, kernel: str) -> CostTable:
    return CostTable(load_model(model), A100, costs_of(A100), False, kernel)


def test_small_experts_cost_their_launches():
    """An expert of Switch-base is 19 MB, read in 11 us: ten launches of 6.7 us take longer."""
    loop, everything = table("switch-base-128", "loop"), table("switch-base-128", "loop-all")
    assert loop.grouped_ns(3, 3) == pytest.approx(3 * 10 * LAUNCH_US * 1e3, abs=1)
    assert everything.grouped_ns(3, 3) == pytest.approx(128 * 10 * LAUNCH_US * 1e3, abs=1)
    assert loop.grouped_ns(0, 0) == everything.grouped_ns(0, 0) == 0


def test_large_experts_cost_their_weights():
    """352 MB of Mixtral at 0.82 of 2,039 GB/s: 211 us, three kernels and eight small ones, above eleven launches."""
    loop = table("mixtral-8x7b", "loop")
    small = 8 / 5 * efficiencies().layer_us * 1e3
    assert loop.grouped_ns(2, 2) == pytest.approx(2 * (352.3e6 / (0.82 * 2039) + 9e3 + small), rel=0.01)
    assert loop.grouped_ns(2, 2) == pytest.approx(2 * loop.grouped_ns(1, 1), abs=1)


def test_tokens_are_multiplied_in_whole_tiles_and_carried_around():
    """4032 and 4033 tokens of one expert are 63 and 64 tiles of 64; beside its products an expert moves each token 7
    times as wide as the model and 5 times as wide as itself."""
    model, loop = load_model("mixtral-8x7b"), table("mixtral-8x7b", "loop")
    e = efficiencies()
    tile = 2 * 64 * model.expert_params / (312e3 * e.mfu)
    moved = 2 * (7 * 4096 + 5 * 14336) / (2039 * e.hbm)
    assert loop.grouped_ns(1, 4033) - loop.grouped_ns(1, 4032) == pytest.approx(tile + moved, rel=0.01)
    assert loop.grouped_ns(1, 4032) - loop.grouped_ns(1, 4031) == pytest.approx(moved, rel=0.1)


def test_without_cuda_graphs_every_layer_pays_for_its_launch():
    model = load_model("switch-base-8")
    trace = distinct_routing(model, 1, 4, 8)
    asked = Question(model=model, machine=A100, engine="events")
    plain, eager = (
        run(trace, "all-resident", asked, settings, anchors=False).summary["metrics"]["mean_tpot_ms"]
        for settings in ((), ("graph=false",))
    )
    assert eager - plain == pytest.approx((model.layers + 1) * efficiencies().eager_us / 1e3, rel=1e-3), (
        "its ends count as one"
    )
