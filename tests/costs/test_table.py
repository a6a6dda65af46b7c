"""CostTable: whole nanoseconds, composed over the layers of real models."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.layers import pairs
from moesim.costs.roofline import Roofline
from moesim.costs.table import CostTable
from moesim.machine import load_machine
from moesim.model import Model, TensorBytes, load_model
from tests.costs.test_roofline import ideal


def tiny(**changes: object) -> Model:
    """Four layers of which 1 and 2 have experts: one dense layer before, one after."""
    model = Model(
        name="tiny", layers=4, moe_layers=(1, 2), hidden=256, experts=8, top_k=2, expert_ffn=512, shared_ffn=0,
        dense_ffn=1024, heads=8, kv_heads=2, head_dim=32, vocab=1000,
    )  # fmt: skip
    return replace(model, **changes)  # type: ignore[arg-type]


def table(model: Model | None = None, machine: str = "rtx-4090", scale: str = "default", **options: bool) -> CostTable:
    box = load_machine(machine)
    return CostTable(model or tiny(), box, Roofline(box, scale), **options)


def ideal_table(model: Model, machine: str = "a100") -> CostTable:
    return CostTable(model, ideal(machine), Roofline(ideal(machine)), offloaded=False)


def test_layers_by_hand_without_overheads() -> None:
    """Bytes at 2039 GB/s: each MoE layer its attention, KV and router; the dense FFNs before and after charged too."""
    model = tiny()
    attention = 2 * 256 * 32 * (8 + 2) * 2  # q, o: 2 x 256 x 256; k, v: 2 x 256 x 64; 2 bytes
    kv = 101 * 2 * 2 * 32 * 2
    small = 8 * 2 * 256
    router, dense = 256 * 8 * 2, 3 * 256 * 1024 * 2
    first = 2 * (attention + kv + small) + router + dense  # layers 0 and 1; layers 2 and 3 are the same
    expected = [first / 2039, first / 2039]
    assert ideal_table(model).layers_ns([], [100]) == pytest.approx(expected, abs=1)


def test_decode_of_one_token_approaches_the_ceiling_without_overheads() -> None:
    for name in ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"):
        model = load_model(name)
        costs = ideal_table(model, "h200")
        active = [model.top_k] * len(model.moe_layers)
        moe = sum(costs.grouped_ns(model.top_k, model.top_k) for _ in active)
        step = costs.step_ns(1, 1) + sum(costs.layers_ns([], [1000])) + moe
        ceiling = costs.ceiling_step_ns([], [1000], active)
        assert 1.0 <= step / ceiling < 1.03, name


def test_nothing_beats_the_ceiling() -> None:
    model = load_model("mixtral-8x7b")
    for scale in ("low", "default", "high"):
        costs = table(model, "h200", scale)
        for prefill, decode, active in (([], [50] * 8, 8), ([(2048, 0)], [], 8), ([(512, 512)], [100] * 4, 8)):
            tokens = len(decode) + sum(new for new, _ in prefill)
            total = costs.step_ns(tokens, len(decode) + len(prefill)) + sum(costs.layers_ns(prefill, decode))
            total += 32 * costs.grouped_ns(active, 2 * tokens)
            assert total > costs.ceiling_step_ns(prefill, decode, [active] * 32)


def test_routing_is_read_by_the_host_only_when_offloaded() -> None:
    with_host, without = table(), table(offloaded=False)
    difference = [a - b for a, b in zip(with_host.layers_ns([], [9]), without.layers_ns([], [9]), strict=True)]
    assert difference == [125_000, 125_000]


def test_windowed_layers_stop_growing() -> None:
    """With every layer windowed, contexts beyond the window cost the same; with every second one, half the growth."""
    full = tiny()
    windowed = tiny(sliding_window=128, sliding_layers=(0, 1, 2, 3))
    half = tiny(sliding_window=128, sliding_layers=(0, 2))
    assert ideal_table(windowed).layers_ns([], [10**6]) == ideal_table(windowed).layers_ns([], [200])
    growth = [
        sum(ideal_table(m).layers_ns([], [10**6])) - sum(ideal_table(m).layers_ns([], [1000])) for m in (full, half)
    ]
    assert growth[1] == pytest.approx(growth[0] / 2, rel=0.01)


def test_latent_attention_reads_less_than_grouped_heads() -> None:
    """DeepSeek-V3 caches 576 values per token and layer; the same heads without MLA would cache 128 x 2 x 192."""
    model = load_model("deepseek-v3")
    costs = ideal_table(model, "h200")
    growth = sum(costs.layers_ns([], [200_000])) - sum(costs.layers_ns([], [100_000]))
    assert growth >= 61 * 100_000 * 576 * model.kv_bits / 8 / 4800
    assert growth < 2 * 61 * 100_000 * 576 * 2 / 4800


def test_hybrid_layers_cost_their_state_not_their_context() -> None:
    model = tiny(attention_layers=(1, 3), extra_params=2 * 10**6, state_bytes=2 * 10**6)
    costs = ideal_table(model)
    grown = sum(costs.layers_ns([], [10_000])) - sum(costs.layers_ns([], [0]))
    assert grown == pytest.approx(2 * 10_000 * 256 / 2039, abs=4)
    stateless = ideal_table(replace(model, state_bytes=0))
    assert sum(costs.layers_ns([], [0])) - sum(stateless.layers_ns([], [0])) == pytest.approx(2 * 2e6 / 2039, abs=4)


def test_real_tensor_bytes_set_the_costs() -> None:
    """A file's own sizes win: experts of 1 MB and 3 MB average 2 MB in kernels, and are copied at their own size."""
    model = tiny(tensor_bytes=TensorBytes(experts=(10**6, 3 * 10**6), other=10**7))
    costs = ideal_table(model)
    assert costs.grouped_ns(1000, 1000) == pytest.approx(1000 * (2e6 + 2 * (2 * 256 + 3 * 512)) / 2039, abs=2)
    assert (costs.expert_bytes(0), costs.expert_bytes(1)) == (10**6, 3 * 10**6)


def test_fewer_bits_are_fewer_bytes() -> None:
    costs = table(load_model("mixtral-8x7b"))
    assert costs.expert_bytes() == 352_321_536
    assert costs.expert_bytes(bits=4) == 88_080_384
    assert costs.grouped_ns(2, 2, 4) < costs.grouped_ns(2, 2) / 3
    assert costs.host_expert_ns(1, 4) < costs.host_expert_ns(1)


def test_attributes_the_engine_reads() -> None:
    costs = table(load_model("mixtral-8x7b"))
    assert costs.label == "specification-sheet" and not costs.unified and costs.matrices == 3
    assert costs.handoff_ns == 120_000
    assert costs.host_rate <= costs.dram_gbps and costs.copy_rate <= costs.duplex_gbps
    assert costs.copy_back_ns(10**6) == costs.copy_ns(10**6) < costs.copy_ns(10**6, 3)
    assert costs.read_ns(10**9) == pytest.approx(1e9 / 5.5 + 100_000, rel=1e-6)
    assert costs.step_ns(0, 0) > 0
    assert costs.grouped_ns(0, 0) == costs.expert_ns(0) == costs.host_expert_ns(0) == 0
    assert costs.layers_ns([], []) == [0] * 32


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), max_size=3),
    st.lists(st.integers(0, 5000), max_size=8),
    st.integers(0, 300),
)
@settings(deadline=None)
def test_more_tokens_and_longer_contexts_are_never_cheaper(prefill, decode, more) -> None:
    costs = table(tiny(sliding_window=100, sliding_layers=(0, 2)))
    base = costs.layers_ns(prefill, decode)
    longer = costs.layers_ns([(new + more, old) for new, old in prefill], [c + more for c in decode])
    wider = costs.layers_ns([*prefill, (1 + more, more)], [*decode, more])
    assert all(isinstance(x, int) for x in base)
    assert all(a <= b for a, b in zip(base, longer, strict=True))
    assert all(a <= b for a, b in zip(base, wider, strict=True))


@given(st.integers(1, 8), st.integers(0, 100), st.integers(1, 4), st.integers(0, 50))
@settings(deadline=None)
def test_more_experts_pairs_or_bytes_are_never_cheaper(active, extra, d_active, d_pairs) -> None:
    costs = table()
    pairs_ = active + extra
    assert costs.grouped_ns(active, pairs_) <= costs.grouped_ns(active + d_active, pairs_ + d_active + d_pairs)
    assert costs.expert_ns(active) <= costs.expert_ns(active + d_pairs)
    assert costs.host_expert_ns(active) <= costs.host_expert_ns(active + d_pairs)
    assert costs.copy_ns(active * 1000) <= costs.copy_ns(active * 1000 + d_pairs)


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
def test_pairs_match_counting(new, cached, window) -> None:
    counted = sum(min(cached + i, window) if window else cached + i for i in range(1, new + 1))
    assert pairs(new, cached, window) == counted


def test_asked_again_it_answers_from_memory() -> None:
    """The engine asks about 10^5 times per second; generous bounds, since other work may run beside the test."""
    costs = table(load_model("deepseek-v3"))
    contexts = list(range(64))
    best = {"grouped": 1.0, "layers": 1.0}
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(100):
            costs.grouped_ns(8, 8)
        best["grouped"] = min(best["grouped"], (time.perf_counter() - start) / 100)
        start = time.perf_counter()
        for _ in range(10):
            costs.layers_ns([], contexts)
        best["layers"] = min(best["layers"], (time.perf_counter() - start) / 10)
    assert best["grouped"] < 2e-6 and best["layers"] < 50e-6
