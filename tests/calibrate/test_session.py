"""One run: budget shared, rows kept as they come, reasons written down."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("torch")

from moesim.calibrate.device import Device
from moesim.calibrate.families import select
from moesim.calibrate.family import Family
from moesim.calibrate.session import run
from moesim.calibrate.store import NAME, Store, read_lines
from moesim.calibrate.timing import Disturbed, Timing
from tests.calibrate.fakes import FakeTimer

DEVICE = Device("cpu", "cpu", "cpu", 1 << 20, 1 << 34, 4e10, 5, 2)


def small(measure, name="small", share=1.0):
    points = [{"nbytes": 1024 << i, "what": "norm"} for i in range(8)]
    return Family(name, name, lambda device, budget: list(points), measure, share=share)


def good(point, device, timer):
    return Timing(1e-9 * int(point["nbytes"]), 0.0, (1e-9,))


def go(directory, families, seconds=30.0):
    store = Store(directory, {"schema": 1})
    try:
        return run(families, DEVICE, FakeTimer(), store, time.monotonic() + seconds)
    finally:
        store.close({"cost_s": 0.0})


def rows(directory):
    return [line["row"] for line in read_lines(directory / NAME) if "row" in line]


def test_everything_is_measured_once_where_time_allows(tmp_path):
    outcome = go(tmp_path, [small(good)])
    assert sorted(row["nbytes"] for row in rows(tmp_path)) == [1024 << i for i in range(8)]
    assert not outcome.interrupted and not outcome.tracks[0].candidates


def test_a_second_run_repeats_nothing(tmp_path):
    go(tmp_path, [small(good)])
    outcome = go(tmp_path, [small(good)])
    assert (outcome.tracks[0].measured, outcome.tracks[0].before) == (0, 8)
    assert len(rows(tmp_path)) == 8


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    def third_time_unlucky(point, device, timer):
        if len(rows(tmp_path)) == 3:
            raise KeyboardInterrupt
        return good(point, device, timer)

    outcome = go(tmp_path, [small(third_time_unlucky)])
    assert outcome.interrupted and len(rows(tmp_path)) == 3
    assert go(tmp_path, [small(good)]).tracks[0].measured == 5


def test_time_is_shared_and_the_deadline_kept(tmp_path):
    def slow(point, device, timer):
        time.sleep(0.02)
        return good(point, device, timer)

    one, three = small(slow), small(slow, "read", share=3.0)
    three = Family("read", "link", lambda d, b: [{"nbytes": 1 << i, "direct": 1, "depth": 1} for i in range(40)],
                   slow, share=3.0)  # fmt: skip
    started = time.monotonic()
    outcome = go(tmp_path, [one, three], seconds=0.5)
    assert time.monotonic() - started < 0.8
    assert outcome.tracks[1].measured > 1.5 * outcome.tracks[0].measured > 0


def test_what_torch_refuses_is_written_down(tmp_path):
    def refuse(point, device, timer):
        raise RuntimeError("CUDA out of memory.\nTried to allocate 80 GiB")

    outcome = go(tmp_path, [small(refuse)])
    assert outcome.tracks[0].skipped == {"CUDA out of memory.": 8} and not rows(tmp_path)


def test_disturbed_points_come_again_and_are_then_given_up(tmp_path):
    calls = []

    def busy(point, device, timer):
        calls.append(point["nbytes"])
        if point["nbytes"] == 1024:
            raise Disturbed("6 of 6")
        return good(point, device, timer)

    outcome = go(tmp_path, [small(busy)])
    assert calls.count(1024) == 2 and calls[-1] == 1024 and len(rows(tmp_path)) == 7
    assert list(outcome.tracks[0].skipped.values()) == [1]


def test_a_contaminated_row_says_so(tmp_path):
    go(tmp_path, [small(lambda p, d, t: Timing(1.0, 0.0, (1.0,), contaminated=True))])
    assert {row["contaminated"] for row in rows(tmp_path)} == {1}


def test_dense_is_measured_beside_sparse(tmp_path):
    go(tmp_path, select("sparse"), seconds=4.0)
    found = rows(tmp_path)
    shape = lambda row: (row["m"], row["n"], row["k"], row["dtype"])  # noqa: E731
    sparse = {shape(row) for row in found if row["family"] == "sparse_gemm"}
    dense = {shape(row) for row in found if row["family"] == "gemm"}
    assert sparse and len(sparse & dense) >= len(sparse) - 1 and dense <= sparse
