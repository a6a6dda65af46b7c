"""The next point is the least sure one."""

from __future__ import annotations

import math

import numpy as np

from moesim.calibrate.choose import Candidates, disagreement


def line(count: int = 65) -> list[dict[str, int | str]]:
    return [{"m": 2**i, "dtype": "bf16"} for i in range(count)]


def candidates(points):
    return Candidates(points, ["m"], ["dtype"])


def drive(chosen: Candidates, seconds, steps: int) -> list[int]:
    order = []
    for _ in range(steps):
        point = chosen.next()
        if point is None:
            break
        chosen.measured(point, seconds(point["m"]))
        order.append(point["m"])
    return order


def test_the_first_points_span_the_axis():
    order = drive(candidates(line()), lambda m: 1.0, 3)
    assert order[0] == 1 and order[1] == 2**64 and order[2] == 2**32


def test_a_step_attracts_the_points():
    """Flat but for a cliff between 2^40 and 2^44: most points end up around it."""
    chosen = candidates(line())
    order = drive(chosen, lambda m: 1.0 if m < 2**42 else 8.0, 16)
    near = sum(2**34 <= m <= 2**50 for m in order)
    assert near >= 8  # an even spread would put 4 there


def test_every_variant_gets_its_turn():
    points = [{"m": 2**i, "dtype": dtype} for dtype in ("bf16", "fp8", "int4") for i in range(20)]
    chosen = candidates(points)
    seen = []
    for _ in range(12):
        point = chosen.next()
        chosen.measured(point, float(point["m"]))
        seen.append(point["dtype"])
    assert {dtype: seen.count(dtype) for dtype in seen} == {"bf16": 4, "fp8": 4, "int4": 4}


def test_all_points_come_once():
    chosen = candidates(line(20))
    assert sorted(drive(chosen, math.sqrt, 99)) == [2**i for i in range(20)]
    assert chosen.next() is None and len(chosen) == 0


def test_a_postponed_point_comes_last():
    chosen = candidates(line(5))
    first = chosen.next()
    chosen.postpone(first)
    assert len(chosen) == 5
    assert drive(chosen, float, 5)[-1] == first["m"]


def test_measured_before_are_left_out():
    chosen = candidates(line(8))
    chosen.measured({"m": 4, "dtype": "bf16"}, 1.0)
    chosen.measured({"m": 3, "dtype": "bf16"}, 1.0)  # of another budget's grid: no use, no harm
    assert 4 not in drive(chosen, float, 99) and len(chosen) == 0


def test_disagreement_is_small_where_the_points_are_straight():
    x = np.linspace(0, 1, 12)[:, None]
    y = np.where(x[:, 0] < 0.5, 0.0, 4 * (x[:, 0] - 0.5))
    spread, error = disagreement(x, y, np.array([[0.1], [0.5]]), np.random.default_rng(0))
    assert spread[1] > spread[0] and error >= 0


def test_a_family_of_one_point():
    chosen = Candidates([{"nbytes": 4096, "what": "h2d"}], ["nbytes"], ["what"])
    assert chosen.next() == {"nbytes": 4096, "what": "h2d"}
