"""Every family's points run here or say why not, and describe themselves as the cost model expects."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from moesim.calibrate import host  # noqa: E402
from moesim.calibrate.device import Device, open_device  # noqa: E402
from moesim.calibrate.families import FAMILIES, select  # noqa: E402
from moesim.calibrate.families.experts import expert_ffn, token_counts  # noqa: E402
from moesim.calibrate.families.gemm import GROUP, unpack_int4, unpack_int8  # noqa: E402
from moesim.calibrate.timers import CpuTimer  # noqa: E402
from moesim.costs.families import family as columns  # noqa: E402
from moesim.errors import CalibrationError  # noqa: E402
from moesim.units import MIB  # noqa: E402
from tests.calibrate.fakes import FakeTimer, fake_cuda  # noqa: E402

BUDGET = 60.0
everywhere = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.fixture(scope="module")
def cpu() -> Device:
    device = open_device("cpu")
    device.cache_bytes = 2 * MIB  # small pools: these tests look at shapes, not at times
    return device


def smallest_of_each_variant(family, points):
    chosen = {}
    for point in points:
        key = tuple(point.get(name) for name in columns(family.name).variant)
        size = math.prod(int(v) for v in point.values() if isinstance(v, int) and v > 0)
        if key not in chosen or size < chosen[key][0]:
            chosen[key] = (size, point)
    return [point for _, point in chosen.values()]


@everywhere
def test_the_smallest_points_run_on_a_cpu_or_say_why_not(family, cpu):
    points = family.points(cpu, BUDGET)
    assert points
    reasons = {family.runnable(cpu, point) for point in points}
    assert all(reason is None or len(reason) > 10 for reason in reasons)
    timer = FakeTimer()
    for point in smallest_of_each_variant(family, [p for p in points if family.runnable(cpu, p) is None]):
        assert family.measure(point, cpu, timer).seconds > 0
    if family.name not in ("collective",):
        assert None in reasons


@everywhere
def test_rows_are_what_the_cost_model_reads(family, cpu):
    for device in (cpu, fake_cuda(count=8)):
        for point in family.points(device, BUDGET):
            row = {**point, "family": family.name, "seconds": 1.0}
            described = columns(family.name)
            described.key(row)
            nbytes, flops = described.work(row)
            assert nbytes >= 0 and flops >= 0
            assert all(described.value(row, name) is not None for name in described.shape)


@everywhere
def test_points_are_distinct_and_shrink_with_the_budget(family, cpu):
    for device in (cpu, fake_cuda(count=8)):
        points = family.points(device, BUDGET)
        assert len({tuple(sorted(point.items())) for point in points}) == len(points)
        assert 0 < len(family.points(device, 5.0)) <= len(points)


@everywhere
def test_shapes_hold_on_a_gpu(family, monkeypatch, cpu):
    """On a GPU that has shapes only; what such a GPU cannot do is refused by torch, never silently skipped."""
    device, timer = fake_cuda(count=2), FakeTimer()
    monkeypatch.setattr(host, "_host", lambda seed: (cpu, FakeTimer()))
    points = family.points(device, 300.0)
    usable = [point for point in points if family.runnable(device, point) is None]
    assert usable
    for point in smallest_of_each_variant(family, usable) + usable[-1:]:
        if point.get("format") == "2:4":
            with pytest.raises(RuntimeError):
                family.measure(point, device, timer)
        else:
            assert family.measure(point, device, timer).seconds > 0


@pytest.mark.parametrize(
    ("capability", "dtype", "why"), [((8, 0), "fp8", "sm_89"), ((7, 5), "bf16", "sm_80"), ((7, 5), "tf32", "sm_80")]
)
def test_older_gpus_say_what_they_lack(capability, dtype, why):
    (gemm,) = select("gemm")
    reasons = {gemm.runnable(fake_cuda(capability), p) for p in gemm.points(fake_cuda(), 60) if p["dtype"] == dtype}
    assert len(reasons) == 1 and why in reasons.pop()


def test_alone_a_gpu_exchanges_nothing():
    (collective,) = select("collective")
    point = collective.points(fake_cuda(), 60)[0]
    assert "this machine has 1" in collective.runnable(fake_cuda(), point)


def test_groups_and_names_select():
    assert {family.name for family in select("link")} == {"copy", "read", "handoff", "collective"}
    assert [(f.name, f.share > 0) for f in select("sparse")] == [("sparse_gemm", True), ("gemm", False)]
    with pytest.raises(CalibrationError, match="did you mean 'gemm'"):
        select("gem")
    with pytest.raises(CalibrationError, match="names no family"):
        select(" , ")


def test_a_real_timer_on_a_real_product(cpu):
    (gemm,) = select("gemm")
    timing = gemm.measure({"m": 64, "n": 512, "k": 512, "dtype": "fp32"}, cpu, CpuTimer())
    assert 1e-6 < timing.seconds < 1.0 and timing.n >= 3


def test_bytes_of_a_read_arrive(cpu):
    from moesim.calibrate.families.reads import open_reader, scratch_file

    path, size = scratch_file(MIB)
    with open_reader(MIB, direct=False, depth=2, seed=0) as read:
        read()
    assert size >= 2 * MIB and path.resolve().name.endswith("(deleted)")  # nothing to clean up, even after kill -9


def test_unpacking_is_exact():
    torch.manual_seed(0)
    values = torch.randint(-8, 8, (6, 2 * GROUP))
    packed = ((values[:, ::2] + 8) | ((values[:, 1::2] + 8) << 4)).to(torch.uint8)
    scale = torch.rand(6, 2)
    assert torch.equal(unpack_int4(packed, scale), values * scale.repeat_interleave(GROUP, 1))
    wide = torch.randint(-127, 128, (6, 5), dtype=torch.int8)
    assert torch.equal(unpack_int8(wide, scale[:, :1]), wide * scale[:, :1])


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("pairs", "active"), [(1, 1), (7, 7), (64, 8), (1000, 37)])
def test_every_active_expert_has_tokens(pairs, active, skewed):
    counts = token_counts(pairs, active, skewed)
    assert sum(counts) == pairs and len(counts) == active and min(counts) >= 1
    assert not skewed or counts == sorted(counts, reverse=True)


def test_grouped_product_equals_the_loop():
    """torch's grouped product over a layer of which some experts are idle, against one expert at a time."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    from moesim.calibrate.families.experts import _grouped_mm, _loop

    device = Device("cpu", "cpu", "cpu", MIB, 1 << 34, 4e10, 5, 2)
    point = {"pairs": 12, "active": 3, "experts": 3, "hidden": 64, "ffn": 32, "dtype": "bf16", "kernel": "loop"}
    x, counts = device.take("bf16", 12, 64), token_counts(12, 3, False)
    weights = _loop(point, device, x, counts).fresh()
    one, other = _loop(point, device, x, counts).run(*weights), _grouped_mm(point, device, x, counts).run(*weights)
    assert torch.allclose(one.float(), other.float(), atol=1e-2, rtol=5e-2)
    exact = torch.cat([expert_ffn(x[4 * e : 4 * e + 4].double(), *(w[e].double() for w in weights)) for e in range(3)])
    assert torch.allclose(one.double(), exact, atol=1e-2, rtol=5e-2)


def test_pools_hand_out_other_memory_each_time(cpu):
    first, second = cpu.take("fp32", 100), cpu.take("fp32", 100)
    assert first.data_ptr() != second.data_ptr() and first.data_ptr() % 64 == 0
    assert not torch.equal(first, second) and torch.isfinite(first).all()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", ""])
def test_a_device_that_is_none(name):
    with pytest.raises(CalibrationError, match="not a device"):
        open_device(name)


def test_a_gpu_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(CalibrationError, match="sees no CUDA GPU here; use --device cpu"):
        open_device("cuda:0")
