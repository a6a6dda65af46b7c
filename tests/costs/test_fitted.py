"""Costs from a profile: curves where there are some, the specification sheet where not, and both say so."""

from __future__ import annotations

import timeit
from dataclasses import replace

import pytest

from moesim.costs.fit import fit_rows
from moesim.costs.fitted import Fitted, costs_of, dtypes
from moesim.costs.roofline import Attended, Roofline
from moesim.costs.table import CostTable
from moesim.errors import PolicyError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.profile import Profile

META = {"provenance": "measured"}
MIXTRAL = load_model("mixtral-8x7b")


def machine():
    return replace(load_machine("rtx-4090"), profile="")


def fitted(*rows: list[dict], scale: str = "default") -> Fitted:
    return Fitted(machine(), Profile("box", META, (), fit_rows([r for part in rows for r in part])), scale)


def gemms(factor: float = 1.0, kernel: str = "k", dtype: str = "bf16") -> list[dict]:
    return [
        {"family": "gemm", "m": m, "n": n, "k": k, "dtype": dtype, "kernel": kernel,
         "seconds": factor * (1e-5 + 2 * n * k / 1e12 + 2 * m * n * k / 1e14)}
        for m in (1, 4, 16, 64, 256, 1024, 4096) for n in (1024, 4096, 16384) for k in (1024, 4096, 16384)
    ]  # fmt: skip


def experts(dtype: str = "bf16", matrices: int = 3) -> list[dict]:
    return [
        {"family": "grouped", "pairs": a * r, "active": a, "hidden": 4096, "ffn": f, "dtype": dtype, "kernel": "k",
         "matrices": matrices, "seconds": 2e-5 + a * f * 2e-8 + a * r * 1e-7}
        for a in (1, 2, 4, 8) for r in (1, 4, 16, 64, 256) for f in (1792, 14336)
    ]  # fmt: skip


def decodes() -> list[dict]:
    return [
        {"family": "attention_decode", "batch": b, "context": c, "heads": 32, "kv_heads": 8, "head_dim": 128,
         "dtype": "bf16", "kernel": "k", "seconds": 1e-5 + b * c * 5e-9}
        for b in (1, 4, 16, 64) for c in (128, 512, 2048, 8192)
    ]  # fmt: skip


def copies() -> list[dict]:
    sizes = [1 << i for i in range(12, 31, 2)]
    one = [{"family": "copy", "direction": "h2d", "pinned": 1, "nbytes": n, "seconds": 1e-5 + n / 2e10} for n in sizes]
    both = [
        {"family": "copy", "direction": d, "pinned": 1, "both": 1, "nbytes": n, "seconds": 1e-5 + n / 1.5e10}
        for d in ("h2d", "d2h")
        for n in sizes
    ]
    return one + both


def test_dense_kernels_come_from_the_curve_and_are_split_evenly() -> None:
    costs = fitted(gemms()).serving(MIXTRAL)
    expected = 1e-5 + 2 * 4096 * 4096 / 1e12 + 2 * 64 * 4096 * 4096 / 1e14
    assert costs.gemm(64, 2 * 4096 * 4096, 0.0, kernels=2) == pytest.approx(2 * expected, rel=0.02)
    assert costs.gemm(0, 10, 10) == costs.gemm(10, 0, 0) == 0
    assert not costs.extrapolated


def test_formats_nobody_measured_stay_with_the_roofline_and_are_noted() -> None:
    costs = fitted(gemms()).serving(MIXTRAL)
    assert costs.gemm(64, 10**7, 5e6, bits=4.5) == Roofline(machine()).gemm(64, 10**7, 5e6, bits=4.5)
    assert "gemm at 4.5 bits" in costs.assumed


def test_experts_come_from_curves_of_their_matrices() -> None:
    costs = fitted(experts(matrices=2), experts()).serving(MIXTRAL)
    table = CostTable(MIXTRAL, machine(), costs, offloaded=False)
    assert table.grouped_ns(4, 64) == pytest.approx(1e9 * (2e-5 + 4 * 14336 * 2e-8 + 64 * 1e-7), rel=0.03)
    alone = fitted(experts(matrices=2)).serving(MIXTRAL)
    assert CostTable(MIXTRAL, machine(), alone).grouped_ns(4, 64) == CostTable(
        MIXTRAL, machine(), Roofline(machine())
    ).grouped_ns(4, 64)
    assert any("grouped experts" in what for what in alone.assumed)


def test_attention_excludes_projections_and_takes_the_mean_sequence() -> None:
    costs = fitted(decodes()).serving(MIXTRAL)
    assert costs.attention(0, 0, Attended(8, 0, 1000)) == pytest.approx(1e-5 + 8000 * 5e-9, rel=0.05)
    one = CostTable(MIXTRAL, machine(), costs, offloaded=False)
    assert one.layers_ns([], [500, 1500])[0] == pytest.approx(one.layers_ns([], [1000, 1000])[0], rel=0.01)
    assert "attention prefill at 16 bits" not in costs.assumed
    one.layers_ns([(16, 0)], [])
    assert "attention prefill at 16 bits" in costs.assumed


def test_beyond_the_range_is_noted_by_curve() -> None:
    costs = fitted(gemms()).serving(MIXTRAL)
    costs.gemm(10**6, 4096 * 4096, 0.0)
    assert costs.extrapolated == {"gemm bf16 k"}


def test_wider_matrices_are_several_side_by_side() -> None:
    costs = fitted(gemms())
    once = costs.gemm(16, 16384 * 4096, 0.0, depth=4096)
    assert costs.gemm(16, 3 * 16384 * 4096, 0.0, depth=4096) == pytest.approx(3 * once)
    assert not costs.extrapolated


def test_another_kernel_answers_where_the_first_was_not_measured() -> None:
    small = [row for row in gemms(3.0, "vllm small") if row["m"] <= 16]
    costs = fitted(gemms(), small)
    assert costs.gemm(4, 4096 * 4096, 0.0, depth=4096) == pytest.approx(
        3 * fitted(gemms()).gemm(4, 4096 * 4096, 0.0, depth=4096), rel=0.02
    )
    assert costs.gemm(1024, 4096 * 4096, 0.0, depth=4096) == fitted(gemms()).gemm(1024, 4096 * 4096, 0.0, depth=4096)


def test_a_part_made_faster_speeds_up_what_it_limits_and_no_fixed_cost() -> None:
    box = machine()
    faster = replace(box, measured_on=box, gpu=replace(box.gpu, hbm_gbps=2 * box.gpu.hbm_gbps), pcie=replace(
        box.pcie, gbps=2 * box.pcie.gbps
    ))  # fmt: skip
    curves = fit_rows([*gemms(), *copies()])
    costs = Fitted(faster, Profile("box", META, (), curves))
    assert costs.gemm(1, 4096 * 16384, 0.0, depth=4096) == pytest.approx(1e-5 + 4096 * 16384 / 1e12, rel=0.03)
    assert costs.copy(1 << 28) == pytest.approx(1e-5 + (1 << 28) / 4e10, rel=0.02)
    assert costs.copy_gbps == pytest.approx(40, rel=0.02)
    as_measured = Fitted(replace(box, measured_on=box), Profile("box", META, (), curves))
    assert as_measured.gemm(1, 4096 * 16384, 0.0, depth=4096) == fitted(gemms()).gemm(1, 4096 * 16384, 0.0, depth=4096)


def test_copies_and_the_rates_they_share() -> None:
    costs = fitted(copies())
    assert costs.copy(1 << 24) == pytest.approx(1e-5 + (1 << 24) / 2e10, rel=0.02)
    assert costs.copy(3 << 20, 3) == pytest.approx(3 * (1e-5 + (1 << 20) / 2e10), rel=0.02)
    assert costs.copy_gbps == pytest.approx(20, rel=0.02) and costs.duplex_gbps == pytest.approx(30, rel=0.02)
    assert "copies" not in costs.assumed and "drive reads" in costs.assumed


def test_more_threads_take_less_time() -> None:
    rows = [
        {"family": "host_expert", "tokens": t, "hidden": h, "ffn": f, "threads": c, "dtype": "bf16",
         "seconds": 1e-5 + 6 * h * f / 2e10 / min(c, 4) + 6 * t * h * f / 4e10 / c}
        for t in (1, 4, 16, 64) for h, f in ((1024, 512), (4096, 1536), (4096, 14336)) for c in (1, 2, 4, 8)
    ]  # fmt: skip
    (curve,) = fit_rows(rows)
    assert curve.holdout_median_error < 0.1
    assert curve.seconds(tokens=16, hidden=4096, ffn=1536, threads=8) < 0.6 * curve.seconds(
        tokens=16, hidden=4096, ffn=1536, threads=2
    )
    asked = fitted(rows).serving(MIXTRAL).host_expert(4, MIXTRAL.expert_params, 2.0 * MIXTRAL.expert_params)
    assert asked == pytest.approx(curve.seconds(tokens=4, hidden=4096, ffn=14336, threads=8))


def together(slowdown: float) -> list[dict]:
    """Copies at 20 GB/s, CPU experts at 40, reads at 5; each `slowdown` times slower per other activity."""
    rates = {"h2d": 20e9, "host": 40e9, "disk": 5e9}
    return [
        {"family": "together", "what": what, "nbytes": n, "gpu": 0, **dict(zip(rates, mix, strict=True)),
         "seconds": n / rates[what] * slowdown ** (sum(mix) - 1)}
        for n in (1 << 22, 1 << 24, 1 << 26)
        for mix in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
        for what, on in zip(rates, mix, strict=True) if on
    ]  # fmt: skip


def test_host_memory_holds_what_was_measured_together() -> None:
    assert fitted(copies(), together(1.4)).dram_gbps == pytest.approx(65 / 1.96, rel=0.1), "they slow one another"
    sheet = Roofline(machine()).dram_gbps
    assert fitted(copies(), together(1.0)).dram_gbps == pytest.approx(max(sheet, 65), rel=0.1), "they do not"


def test_exchanges_between_devices() -> None:
    rows = [
        {"family": "collective", "what": "all_reduce", "devices": d, "kernel": k, "nbytes": 1 << i,
         "seconds": slow * (1e-5 + (1 << i) / 1e11)}
        for i in range(10, 30, 2) for d, k, slow in ((2, "NCCL", 1), (8, "NCCL", 2), (8, "custom", 1.5))
    ]  # fmt: skip
    costs = fitted(rows)
    assert costs.exchange("all_reduce", 1 << 20, 4) == pytest.approx(2 * (1e-5 + (1 << 20) / 1e11), rel=0.02)
    sheet = Roofline(costs.machine)
    assert costs.exchange("all_reduce", 1 << 20, 16) == sheet.exchange("all_reduce", 1 << 20, 16)
    assert costs.exchange("dispatch", 1 << 20, 2) == sheet.exchange("all_to_all", 1 << 20, 2)
    assert {"all-reduce between 16 GPUs", "all-to-all between 2 GPUs"} <= costs.assumed
    assert costs.exchange("all_reduce", 1 << 20, 1) == 0


def test_sparse_experts_follow_the_sparse_curve() -> None:
    box = load_machine("h100")
    costs = costs_of(box)
    dense = CostTable(MIXTRAL, box, costs, offloaded=False)
    sparse = CostTable(replace(MIXTRAL, expert_bits=9), box, costs, offloaded=False, kernel="sparse24")
    assert sparse.expert_bytes() == pytest.approx(dense.expert_bytes() * 9 / 16, rel=1e-3)
    assert sparse.grouped_ns(8, 8 * 4) > dense.grouped_ns(8, 8 * 4), "few rows: positions cost more than they save"
    assert sparse.grouped_ns(8, 8 * 4096) < dense.grouped_ns(8, 8 * 4096)
    with pytest.raises(PolicyError, match="expert_bits=9"):
        CostTable(MIXTRAL, box, costs, offloaded=False, kernel="sparse24").grouped_ns(8, 8)


def test_scale_brackets_and_label() -> None:
    noisy = [row | {"seconds": row["seconds"] * (1.1 if i % 2 else 0.9)} for i, row in enumerate(gemms())]
    slow, usual, fast = (fitted(noisy, scale=s).gemm(64, 10**7, 0.0) for s in ("low", "default", "high"))
    assert slow > usual > fast
    assert fitted(gemms()).label == "measured profile box"


def test_measured_sparse_rows_are_used_and_published_ones_otherwise() -> None:
    sparse = [
        {**{k: v for k, v in row.items() if k != "kernel"}, "family": "sparse_gemm", "format": "2:4",
         "seconds": row["seconds"] / 1.5}
        for row in gemms()
    ]  # fmt: skip
    costs = fitted(gemms(), sparse)
    assert costs.sparse_measured and not fitted(gemms()).sparse_measured
    dense = costs.gemm(1024, 4096 * 4096, 0.0, depth=4096)
    assert dense / costs.sparse_gemm(1024, 4096, 4096) == pytest.approx(1.5, rel=0.03)
    published = fitted(gemms())
    assert 1.5 < published.gemm(8192, 4096 * 4096, 0.0, depth=4096) / published.sparse_gemm(8192, 4096, 4096) < 2


@pytest.mark.parametrize(
    "bits,names",
    [(16, ("bf16", "fp16")), (8, ("fp8_block", "fp8")), (8.5, ()), (4.25, ("mxfp4",)), (4.125, ("int4",)), (6.6, ())],
)
def test_which_formats_bits_stand_for(bits: float, names: tuple[str, ...]) -> None:
    assert dtypes(bits) == names


@pytest.mark.parametrize("name", ["h100", "h200", "a100"])
def test_shipped_profiles_answer_everything_a_model_asks(name: str) -> None:
    box = load_machine(name)
    costs = costs_of(box)
    assert isinstance(costs, Fitted) and costs.label.startswith("imported profile")
    table = CostTable(MIXTRAL, box, costs, offloaded=False)
    plain = CostTable(MIXTRAL, box, Roofline(box), offloaded=False)
    for ask in (
        lambda t: t.step_ns(8, 8),
        lambda t: sum(t.layers_ns([(512, 0)], [900] * 8)),
        lambda t: t.grouped_ns(8, 16),
    ):
        assert 0.4 < ask(table) / ask(plain) < 2.5
    assert costs.extrapolated <= {c for c in costs.extrapolated if "gemm" in c}


def test_never_faster_than_the_ceiling_on_the_h100() -> None:
    box = load_machine("h100")
    table = CostTable(MIXTRAL, box, costs_of(box), offloaded=False)
    for batch in (1, 8, 64):
        active = min(8, 2 * batch)
        step = (
            table.step_ns(batch, batch)
            + sum(table.layers_ns([], [500] * batch))
            + 32 * table.grouped_ns(active, 2 * batch)
        )
        assert step > table.ceiling_step_ns([], [500] * batch, [active] * 32)


def test_asking_is_cheap() -> None:
    box = load_machine("h100")
    table = CostTable(MIXTRAL, box, costs_of(box), offloaded=False)
    table.grouped_ns(8, 16)
    table.layers_ns([], [1000] * 8)
    assert min(timeit.repeat(lambda: table.grouped_ns(8, 16), number=1000, repeat=5)) / 1000 < 2e-6
    assert min(timeit.repeat(lambda: table.layers_ns([], [1000] * 8), number=100, repeat=5)) / 100 < 60e-6
