"""Curves: synthetic truth recovered, monotone, flagged beyond what was measured, the same after a round trip."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.families import FAMILIES, attention_pairs, family, sparse_weight_bytes
from moesim.costs.fit import Curve, fit_family, fit_rows, rescale
from moesim.costs.lattice import Lattice, choose_axes, fit_lattice, make_rising, near_points
from moesim.errors import CalibrationError

OVERHEAD, BANDWIDTH, RATE = 5e-6, 3e12, 5e14
SHAPES = [(512, 512), (1024, 4096), (4096, 1024), (2048, 2048), (8192, 4096)]


def truth(m: float, n: float, k: float) -> float:
    nbytes, flops = 2 * (n * k + m * k + m * n), 2 * m * n * k
    return OVERHEAD + ((nbytes / BANDWIDTH) ** 4 + (flops / RATE) ** 4) ** 0.25


def gemm_rows(noise: float = 0.0) -> list[dict]:
    rng = np.random.default_rng(1)
    return [
        {"family": "gemm", "m": m, "n": n, "k": k, "dtype": "bf16", "seconds": truth(m, n, k) * math.exp(e)}
        for m in (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
        for n, k in SHAPES
        for e in [rng.normal(0, noise) if noise else 0.0]
    ]


@pytest.fixture(scope="module")
def curve() -> Curve:
    found = fit_family(gemm_rows(0.02))
    assert found is not None
    return found


def test_physics_is_recovered(curve: Curve) -> None:
    assert curve.physics.overhead == pytest.approx(OVERHEAD, rel=0.1)
    assert curve.physics.bandwidth == pytest.approx(BANDWIDTH, rel=0.1)
    assert curve.physics.rate == pytest.approx(RATE, rel=0.1)


@pytest.mark.parametrize("m", [1, 3, 12, 100, 777, 3000])
@pytest.mark.parametrize("n,k", [(1024, 1024), (3000, 3000), (8192, 2048)])
def test_shapes_not_measured_are_predicted(curve: Curve, m: int, n: int, k: int) -> None:
    assert curve.seconds(m=m, n=n, k=k) == pytest.approx(truth(m, n, k), rel=0.08)
    assert not curve.extrapolates(m=m, n=n, k=k)


def test_errors_say_what_the_noise_was(curve: Curve) -> None:
    assert 0.005 < curve.holdout_median_error < 0.04
    assert curve.holdout_median_error < curve.p90 < 0.1
    low, high = curve.band
    assert -0.1 < low < 0 < high < 0.1


def test_beyond_what_was_measured_the_physics_predicts_and_says_so(curve: Curve) -> None:
    assert curve.extrapolates(m=100_000, n=4096, k=1024)
    assert curve.seconds(m=100_000, n=4096, k=1024) == pytest.approx(truth(100_000, 4096, 1024), rel=0.1)
    edge = curve.seconds(m=4096, n=4096, k=1024)
    assert curve.seconds(m=4097, n=4096, k=1024) == pytest.approx(edge, rel=1e-2)  # no jump at the edge


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9000), st.integers(256, 12000), st.integers(256, 8000)),
    st.sampled_from("mnk"),
    st.floats(1.0, 8.0),
)
def test_more_work_never_takes_less_time(curve: Curve, shape: tuple[int, int, int], axis: str, factor: float) -> None:
    small = dict(zip("mnk", shape, strict=True))
    large = {**small, axis: small[axis] * factor}
    if curve.extrapolates(**large):
        return
    assert curve.seconds(**large) >= curve.seconds(**small) * (1 - 1e-9)


def test_round_trip_through_json(curve: Curve) -> None:
    again = Curve.from_dict(json.loads(json.dumps(curve.to_dict())))
    assert again.to_dict() == curve.to_dict()
    assert again.seconds(m=100, n=3000, k=1500) == pytest.approx(curve.seconds(m=100, n=3000, k=1500), rel=2e-3)
    assert again.range["m"] == (1, 4096)


@pytest.mark.parametrize(
    "change",
    [
        {"physics": [1e-6, float("nan"), 1.0, 1.0, 1]},
        {"physics": [1e-6, -1.0, 1.0, 1.0, 1]},
        {"residual": [0]},
        {"covered": "zz"},
        {"covered": ""},
        {"axes": [[0, 1], [1, 0], [0, 1]]},
        {"axes": [[0, 1]]},
        {"variant": []},
        {"family": "gemmm"},
        {"band": [0.0, float("inf")]},
    ],
)
def test_corrupted_curves_are_refused(curve: Curve, change: dict) -> None:
    with pytest.raises((CalibrationError, ValueError)):
        Curve.from_dict(curve.to_dict() | change)


def test_band_ends_bracket_the_curve(curve: Curve) -> None:
    slow, fast = rescale(curve, "low"), rescale(curve, "high")
    shape = {"m": 50, "n": 2000, "k": 2000}
    assert fast.seconds(**shape) < curve.seconds(**shape) < slow.seconds(**shape)
    assert slow.seconds(**shape) == pytest.approx(curve.seconds(**shape) * math.exp(curve.band[1]), rel=1e-3)


def test_repeated_shapes_count_once_by_their_median() -> None:
    rows = gemm_rows()
    rows += [{**row, "seconds": row["seconds"] * 50} for row in rows[:3]] + rows[:3]
    found = fit_family(rows)
    assert found is not None and found.points == len(gemm_rows())


def test_variants_have_curves_of_their_own_and_tiny_ones_none() -> None:
    rows = gemm_rows() + [{**row, "dtype": "fp16", "seconds": 2 * row["seconds"]} for row in gemm_rows()]
    rows += [{**gemm_rows()[0], "dtype": "fp8"}]
    found = {c.variant[0]: c for c in fit_rows(rows)}
    assert set(found) == {"bf16", "fp16"}
    shape = {"m": 64, "n": 2048, "k": 2048}
    assert found["fp16"].seconds(**shape) == pytest.approx(2 * found["bf16"].seconds(**shape), rel=0.03)


def test_gaps_inside_the_range_count_as_extrapolated() -> None:
    """Many experts with one row each and few with many: the corner between was never measured."""
    base = {"family": "grouped", "hidden": 2048, "ffn": 1024, "dtype": "bf16", "matrices": 3, "kernel": "k"}
    shapes = [(a, a) for a in (1, 2, 4, 8, 16, 32, 64, 128)] + [(r, 1) for r in (2, 8, 32, 128, 512, 2048)]
    rows = [{**base, "pairs": p, "active": a, "seconds": 1e-5 + a * 4e-6 + p * 1e-8} for p, a in shapes]
    found = fit_family(rows)
    assert found is not None
    assert not found.extrapolates(pairs=64, active=64, hidden=2048, ffn=1024)
    assert found.extrapolates(pairs=64 * 2048, active=64, hidden=2048, ffn=1024)


@pytest.mark.parametrize("change", [{"m": 0}, {"m": None}, {"m": float("inf")}, {"seconds": 0.0}, {"seconds": "fast"}])
def test_rows_that_cannot_be_are_refused(change: dict) -> None:
    rows = gemm_rows()
    with pytest.raises(CalibrationError):
        fit_family([*rows, {**rows[0], **change}])


def test_missing_features_are_named(curve: Curve) -> None:
    with pytest.raises(CalibrationError, match="gemm: k None"):
        curve.seconds(m=1, n=2)


# Families


@pytest.mark.parametrize("name", FAMILIES)
def test_a_place_in_axes_keeps_the_work(name: str) -> None:
    fam = family(name)
    text = {"dtype": "fp16", "format": "2:4", "kernel": "k", "what": "w", "direction": "h2d"}
    row = {c: text.get(c, 1) for c in fam.variant} | {c: 64 * (i + 2) for i, c in enumerate(reversed(fam.shape))}
    row |= {"window": 0} if "window" in fam.variant else {}
    values = fam.place(row) if fam.place else [row[c] for c in fam.shape]
    assert len(values) == len(fam.axis_names)
    at = fam.row_at(values) if fam.row_at else dict(zip(fam.shape, values, strict=True))
    assert fam.work({**row, **at}) == pytest.approx(fam.work(row))


def test_causal_pairs() -> None:
    assert attention_pairs(3, 0) == 6
    assert attention_pairs(2, 10) == 23
    assert attention_pairs(4, 0, window=2) == 1 + 2 + 2 + 2


def test_sparse_weights_count_their_metadata() -> None:
    assert sparse_weight_bytes(64, 64, "fp16", "2:4") == 64 * 64 * (1 + 0.125)  # half the values, 2 bits for each
    assert sparse_weight_bytes(4096, 4096, "fp16", "samoyeds-1,2,128") / (2 * 4096**2) == pytest.approx(
        0.289, abs=0.001
    )
    for bad in ("1:2", "samoyeds-3,2,128", "samoyeds-1,2", "samoyeds-0,2,8"):
        with pytest.raises(CalibrationError):
            sparse_weight_bytes(64, 64, "fp16", bad)


# The lattice


def test_lattice_interpolates_and_clamps() -> None:
    lattice = Lattice([[0.0, 1.0], [0.0, 2.0]], [0.0, 2.0, 10.0, 12.0], [True, True, True, False])
    assert lattice.at([0.5, 1.0]) == pytest.approx((6.0, 0.75))
    assert lattice.at([5.0, -1.0]) == pytest.approx((10.0, 1.0))
    assert lattice.at([1.0, 2.0]) == pytest.approx((12.0, 0.0))


def test_lattice_regression_recovers_a_plane() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 8, (400, 2))
    targets = 1 + 0.5 * points[:, 0] + 0.25 * points[:, 1]
    axes = [[0.0, 2.0, 4.0, 6.0, 8.0]] * 2
    values = fit_lattice(axes, points, targets, np.zeros(25), [0, 1], 1e-4)
    lattice = Lattice(axes, values.tolist(), near_points(axes, points).tolist())
    assert lattice.at([3.0, 5.0])[0] == pytest.approx(1 + 1.5 + 1.25, abs=0.02)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=24, max_size=24))
def test_made_rising_values_rise_and_risen_ones_stay(numbers: list[float]) -> None:
    values = np.array(numbers).reshape(4, 6)
    risen = make_rising(values, np.ones_like(values), [0, 1])
    assert (np.diff(risen, axis=0) >= 0).all() and (np.diff(risen, axis=1) >= 0).all()
    assert np.allclose(make_rising(risen, np.ones_like(values), [0, 1]), risen)


def test_axes_stay_within_their_room() -> None:
    points = np.random.default_rng(0).uniform(0, 12, (500, 3))
    axes = choose_axes(points, 600)
    assert math.prod(map(len, axes)) <= 600
    for axis, column in zip(axes, points.T, strict=True):
        assert axis[0] == column.min() and axis[-1] == column.max()
