"""Trees on top of a curve: steps no smooth curve follows, kept only where they pay, the same after a round trip."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from moesim.costs.fit import Curve, fit_family
from moesim.costs.trees import Trees, grow
from moesim.errors import CalibrationError

FEATURES = np.random.default_rng(0).uniform(0, 8, (2000, 3))
NOISE = np.random.default_rng(1).normal(0, 0.02, 2000)
STEPS = np.where(FEATURES[:, 0] > 4, 1.0, 0.0) - np.where(FEATURES[:, 1] <= 2, 0.5, 0.0)


def stepped(cut: int) -> list[dict]:
    """Products whose time falls to a third from `cut` rows on, where another kernel takes over."""
    return [
        {"family": "gemm", "m": m, "n": n, "k": k, "dtype": "bf16",
         "seconds": (1e-5 + n * k / 1e12 + m * n * k / 1e14) / (3 if m >= cut else 1)}
        for m in (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256)
        for n in (256, 512, 1024, 1536, 2048, 4096, 8192) for k in (256, 512, 1024, 2048, 3072, 4096, 8192)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trees() -> Trees:
    return grow(FEATURES, STEPS + NOISE)


def test_steps_are_followed(trees: Trees) -> None:
    assert np.quantile(np.abs(trees(FEATURES) - STEPS), 0.9) < 0.04


def test_one_row_at_a_time_is_the_same(trees: Trees) -> None:
    assert [trees.one(row) for row in FEATURES[:50].tolist()] == trees(FEATURES[:50]).tolist()


def test_round_trip(trees: Trees) -> None:
    again = Trees.from_dict(json.loads(json.dumps(trees.to_dict())))
    assert (again(FEATURES) == trees(FEATURES)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": [10, 3]},
        {"sizes": [10**9, 10**9]},
        {"sizes": [0, 0]},
        {"nodes": "zzzz"},
        {"thresholds": [[1.0]]},
        {"thresholds": [[math.inf] * 300] * 3},
    ],
)
def test_damaged_trees_are_refused(trees: Trees, change: dict) -> None:
    with pytest.raises((CalibrationError, ValueError)):
        Trees.from_dict(trees.to_dict() | change)


def test_a_tree_that_breaks_off_is_refused() -> None:
    with pytest.raises(CalibrationError, match="not whole"):
        Trees([[1.0]], np.array([0, 255], np.uint8), np.array([0], np.uint8), np.array([5], np.int16))


def test_curves_get_trees_only_where_they_pay() -> None:
    jagged = fit_family(stepped(48), trees=True)
    smooth = fit_family(stepped(10**6), trees=True)
    plain = fit_family(stepped(48))
    assert jagged and smooth and plain
    assert jagged.trees is not None and smooth.trees is None and plain.trees is None
    assert jagged.p90 < 0.6 * plain.p90
    shape = {"n": 1024, "k": 1024}
    assert jagged.seconds(m=64, **shape) < 0.6 * jagged.seconds(m=32, **shape), "the fall is real and followed"
    again = Curve.from_dict(json.loads(json.dumps(jagged.to_dict())))
    assert again.seconds(m=50, **shape) == pytest.approx(jagged.seconds(m=50, **shape), rel=0.01)


def test_trees_of_another_family_are_refused() -> None:
    jagged = fit_family(stepped(48), trees=True)
    assert jagged
    data = jagged.to_dict()
    data["trees"]["thresholds"].append([1.0])
    with pytest.raises(CalibrationError, match="features"):
        Curve.from_dict(data)
