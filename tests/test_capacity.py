"""Capacity: kept at the rate it names, broken just above, and named by what breaks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from moesim.capacity import PRECISION, capacity
from moesim.cli import app
from moesim.errors import WorkloadError
from moesim.question import Question, run
from moesim.systems import load_system
from moesim.trace.assumed import distinct_routing
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def trace():
    from moesim.model import load_model

    return distinct_routing(load_model("tiny-moe-8x16"), 60, 8, 12)


def asked(trace, **slos):
    return Question(model="tiny-moe-8x16", machine="l4", goodput=tuple(slos.items()), max_num_seqs=4)


def test_the_rate_is_kept_and_a_little_more_is_not(trace):
    system, question = load_system("all-resident"), asked(trace, ttft=5.0, e2el=60.0)
    found = capacity(trace, system, question)
    assert 0 < found["low"] <= found["rate"] <= found["high"] and found["breaks_first"] in ("ttft", "e2el", "queue")

    def share(rate, seed):
        again = replace(question, request_rate=rate, seed=seed)
        summary = run(trace, system, again, anchors=False).summary
        return summary["metrics"]["slo_attainment"] if summary["status"] != "OVERLOADED" else 0.0

    rates = sorted((found["low"], found["rate"], found["high"]))
    assert any(
        share(rate, seed) >= 0.9 > share(rate / (1 - PRECISION) ** 2, seed) for rate in rates for seed in range(3)
    )


def test_a_promise_nobody_can_keep_is_no_rate(trace):
    found = capacity(trace, load_system("all-resident"), asked(trace, tpot=1e-6, ttft=1000.0))
    assert found["rate"] == 0 and found["breaks_first"] == "tpot"


def test_where_promises_are_far_the_queue_breaks_first(trace):
    found = capacity(trace, load_system("all-resident"), asked(trace, e2el=1e9))
    assert found["rate"] > 0 and found["breaks_first"] == "queue"


def test_what_makes_no_sense_is_refused(trace):
    system = load_system("LRU")
    with pytest.raises(WorkloadError, match="no SLO"):
        capacity(trace, system, Question())
    with pytest.raises(WorkloadError, match="attainment"):
        capacity(trace, system, asked(trace, ttft=1.0), attainment=1.5)
    with pytest.raises(WorkloadError, match="chooses the arrivals"):
        capacity(trace, system, replace(asked(trace, ttft=1.0), request_rate=3.0))


def test_the_command():
    words = ["capacity", str(ROOT / "traces" / "tiny-moe-8x16.parquet"), "--policy", "all-resident", "--machine", "l4"]
    run = CliRunner().invoke(app, [*words, "--goodput", "tpot:0.000001", "--json"])
    assert run.exit_code == 3 and json.loads(run.stdout)["rate"] == 0
