"""The measuring method with a scripted timer."""

from __future__ import annotations

import random

import pytest

from moesim.calibrate.timing import Disturbed, Rule, Sample, Work, half_width, measure, summarize
from moesim.errors import CalibrationError
from tests.calibrate.fakes import FakeTimer

NOTHING = Work(lambda: None)


def test_steady_samples_stop_at_the_fewest():
    timer = FakeTimer(lambda i: Sample(2e-3))
    timing = measure(NOTHING, timer, Rule(min_samples=6))
    assert (timing.n, timing.seconds, timing.mad_s) == (6, 2e-3, 0.0)


def test_noisy_samples_go_on_until_the_median_is_known():
    noise = random.Random(0)
    timer = FakeTimer(lambda i: Sample(1e-3 * noise.gauss(1, 0.05)))
    timing = measure(NOTHING, timer, Rule(half_width=0.02, max_samples=1000, max_seconds=60))
    assert 6 < timing.n < 1000
    assert half_width(list(timing.samples)) <= 0.02
    assert timing.seconds == pytest.approx(1e-3, rel=0.02)


def test_hopeless_noise_stops_at_the_most():
    timer = FakeTimer(lambda i: Sample(1e-3 if i % 2 else 5e-3))
    assert measure(NOTHING, timer, Rule(max_samples=60, max_seconds=60)).n <= 96  # the last batch is finished


def test_time_runs_out():
    timer = FakeTimer(lambda i: Sample(1e-3 if i % 2 else 5e-3))
    assert measure(NOTHING, timer, Rule(max_samples=10**9, max_seconds=0.05)).n >= 6


def test_disturbed_samples_are_discarded():
    timer = FakeTimer(lambda i: Sample(9e-3, disturbed=True) if i % 3 == 0 else Sample(1e-3))
    timing = measure(NOTHING, timer)
    assert timing.seconds == 1e-3 and timing.discarded > 0
    assert 9e-3 not in timing.samples


def test_a_throttled_gpu_yields_nothing_and_soon():
    timer = FakeTimer(lambda i: Sample(9e-3, disturbed=True))
    with pytest.raises(Disturbed, match="12 of 12"):
        measure(NOTHING, timer)


def test_thread_time_is_kept_under_load_but_marked():
    timer = FakeTimer(lambda i: Sample(1e-3, disturbed=True), robust=True)
    timing = measure(NOTHING, timer)
    assert timing.contaminated and timing.seconds == 1e-3
    with pytest.raises(Disturbed):
        measure(Work(lambda: None, wall=True), FakeTimer(timer.script, robust=True))


def test_a_wrong_result_is_no_measurement():
    timer = FakeTimer()
    timer.check = lambda work: False  # type: ignore[method-assign]
    with pytest.raises(CalibrationError, match="not finite"):
        measure(NOTHING, timer)


def test_median_and_mad_resist_an_outlier():
    timing = summarize([1.0, 1.1, 0.9, 1.0, 50.0])
    assert timing.seconds == 1.0 and timing.mad_s == pytest.approx(0.1)
    assert timing.samples == (1.0, 1.1, 0.9, 1.0, 50.0)  # raw, in the order taken


def test_half_width_covers_the_median():
    """About 95 % of intervals of normal samples hold the true median."""
    draw = random.Random(1)
    hits = 0
    for _ in range(400):
        samples = [draw.gauss(10, 1) for _ in range(25)]
        ordered = sorted(samples)
        width = half_width(samples) * ordered[12]
        hits += any(abs(10 - (low + width)) <= width + 1e-12 for low in ordered)
    assert hits >= 360


def test_a_slow_run_is_not_batched():
    assert Rule(max_seconds=0.25).batch([], once=0.2) == 1
    assert Rule(min_samples=6).batch([], once=1e-4) == 6
    assert Rule(min_samples=6).batch([1.0] * 12, once=1e-4) == 12
