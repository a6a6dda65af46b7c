"""Workloads: arrivals as vLLM draws them, request files, and routing for requests the trace does not know."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moesim.errors import WorkloadError
from moesim.trace.check import check
from moesim.workload import first, from_trace, read_workload, unroll, with_arrivals, with_slo
from tests.scenes import random_trace


@pytest.fixture
def trace():
    return random_trace(40, 1, 4, 1, seed=0, requests=4, prompt=4)


def test_poisson_arrivals_have_the_rate_and_are_seeded(trace):
    big = random_trace(8000, 1, 4, 1, seed=0, requests=4000)
    one = with_arrivals(from_trace(big), 10.0, 1.0, seed=1)
    gaps = np.diff([r.arrival_ns for r in one.requests]) / 1e9
    assert gaps.mean() == pytest.approx(0.1, rel=0.05) and gaps.std() == pytest.approx(0.1, rel=0.1)
    assert [r.arrival_ns for r in with_arrivals(from_trace(big), 10.0, 1.0, seed=1).requests] == [
        r.arrival_ns for r in one.requests
    ]


def test_burstiness_is_the_shape_of_gamma_gaps():
    big = random_trace(8000, 1, 4, 1, seed=0, requests=4000)
    gaps = np.diff([r.arrival_ns for r in with_arrivals(from_trace(big), 10.0, 4.0, 0).requests]) / 1e9
    assert gaps.std() / gaps.mean() == pytest.approx(0.5, rel=0.1)


def test_an_infinite_rate_sends_all_at_once(trace):
    assert {r.arrival_ns for r in with_arrivals(from_trace(trace), math.inf, 1.0, 0).requests} == {0}


def test_a_known_request_keeps_its_routing_and_an_unknown_one_is_drawn(trace, tmp_path):
    file = tmp_path / "w.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens,request_id\n0.5,4,3,r2\n0.1,6,20,other\n")
    workload = read_workload(file, trace, seed=0)
    drawn, known = workload.requests
    assert known.prefill.tolist() == list(range(20, 24)) and known.output_tokens == 3
    assert len(drawn.prefill) == 6 and drawn.output_tokens == 20 and drawn.arrival_ns == 10**8
    assert workload.routing == "1 of 2 requests drawn from the trace"


def test_first_and_slo(trace):
    assert len(first(from_trace(trace), 2).requests) == 2
    assert with_slo(from_trace(trace), 1.5).requests[0].slo_ns == 1_500_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "column 'arrival_s' is missing"),
        ("arrival_s,prompt_tokens\n0,1\n", "column 'output_tokens' is missing"),
        ("arrival_s,prompt_tokens,output_tokens\n", "no requests"),
        ("arrival_s,prompt_tokens,output_tokens\n-1,4,4\n", "line 2: arrival_s '-1'"),
        ("arrival_s,prompt_tokens,output_tokens\nx,4,4\n", "line 2: arrival_s 'x'"),
        ("arrival_s,prompt_tokens,output_tokens\nnan,4,4\n", "line 2: arrival_s 'nan'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,0,4\n", "line 2: prompt_tokens '0'"),
        ("arrival_s,prompt_tokens,output_tokens\n0,4\n", "line 2: output_tokens ''"),
        ("arrival_s,prompt_tokens,output_tokens,task\n0,4,4,poetry\n", "task 'poetry' is not in the trace"),
        ("arrival_s,prompt_tokens,output_tokens,request_id\n0,5,4,r1\n", "the trace has 4 and 7 of request 'r1'"),
        ("arrival_s,prompt_tokens,output_tokens,request_id\n0,4,4,x\n0,4,4,x\n", "'x' appears twice"),
    ],
)
def test_a_bad_file_is_refused_by_line(trace, tmp_path, text, says):
    file = tmp_path / "w.csv"
    file.write_text(text)
    with pytest.raises(WorkloadError, match=says):
        read_workload(file, trace, 0)


def test_values_that_cannot_be_are_refused(trace, tmp_path):
    workload = from_trace(trace)
    for call in (
        lambda: with_arrivals(workload, -1.0, 1.0, 0),
        lambda: with_arrivals(workload, math.nan, 1.0, 0),
        lambda: with_arrivals(workload, 1.0, 0.0, 0),
        lambda: first(workload, 0),
        lambda: with_slo(workload, -5.0),
        lambda: read_workload(tmp_path / "none.csv", trace, 0),
    ):
        with pytest.raises(WorkloadError):
            call()
    binary = tmp_path / "b.csv"
    binary.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(WorkloadError, match="not a CSV"):
        read_workload(binary, trace, 0)


def test_unrolling_gives_every_token_served_a_row_of_its_own(trace, tmp_path):
    file = tmp_path / "w.csv"
    file.write_text("arrival_s,prompt_tokens,output_tokens\n" + "0,6,9\n" * 20)
    workload = read_workload(file, trace, seed=0)
    served, moved = unroll(trace, workload)
    check(served, "unrolled")
    rows = np.concatenate([np.r_[r.prefill, r.decode] for r in moved.requests])
    assert rows.tolist() == list(range(served.tokens)) and served.tokens == 20 * (6 + 8)
    for before, after in zip(workload.requests, moved.requests, strict=True):
        np.testing.assert_array_equal(trace.experts[before.decode], served.experts[after.decode])
    assert from_trace(served).requests[3].output_tokens == 9
