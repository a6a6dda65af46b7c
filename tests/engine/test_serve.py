"""Serving: queueing truths, batching, memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine.serve import Limits
from moesim.engine.simulate import simulate, split_by_layer
from moesim.errors import MemoryBudgetError
from moesim.systems import load_system
from moesim.trace import Requests
from moesim.workload import Request, Workload, from_trace, with_arrivals
from tests.fakes import FakeModel, FakeTable, make_trace
from tests.scenes import random_trace, serve, setting


def queue_waits(tokens_per_request, rate, service_ns):
    """Waiting times before admission of a queue with one server, in units of the mean service time."""
    count = len(tokens_per_request)
    trace = make_trace(np.zeros((1, 1, 1)), 1)
    requests = tuple(
        Request(f"r{i}", "", 0, 0, np.empty(0, int), np.zeros(n, int)) for i, n in enumerate(tokens_per_request)
    )
    workload = with_arrivals(Workload(requests, ""), rate, 1.0, seed=3)
    table = FakeTable(1, mixer=service_ns, per_expert=0)
    out = simulate(setting(trace, 1, workload=workload, table=table), load_system("all-resident"))
    r = out.records.requests
    assert len(r) == count
    return r.column("admitted") - r.column("arrival"), out


def test_md1_waits_as_theory_says():
    """M/D/1: mean wait = rho / (2 (1 - rho)) services."""
    service, rho = 1_000_000, 0.6
    waits, _ = queue_waits([1] * 60_000, rho * 1e9 / service, service)
    assert waits.mean() / service == pytest.approx(rho / (2 * (1 - rho)), rel=0.04)


def test_mm1_waits_as_theory_says():
    """M/M/1 in the limit of geometric lengths: mean wait = rho / (1 - rho) mean services."""
    rng = np.random.default_rng(0)
    lengths = rng.geometric(1 / 30, 30_000)
    service, rho = 1000 * lengths.mean(), 0.5
    waits, _ = queue_waits(lengths.tolist(), rho * 1e9 / service, 1000)
    assert waits.mean() / service == pytest.approx(rho / (1 - rho), rel=0.06)


def test_littles_law_holds_on_a_run():
    """Requests in the system on average = arrival rate x time in the system, over the whole run."""
    _, out = queue_waits([3] * 2000, 200.0, 1_000_000)
    r = out.records.requests
    arrival, left = r.column("arrival"), r.column("finished")
    span = left.max()
    edges = np.concatenate([arrival, left])
    change = np.concatenate([np.ones(len(arrival)), -np.ones(len(left))])
    order = np.argsort(edges, kind="stable")
    level = np.cumsum(change[order])[:-1]
    inside = (level * np.diff(edges[order])).sum() / span
    assert inside == pytest.approx(len(r) / span * (left - arrival).mean(), rel=1e-9)


def test_a_prompt_gives_its_first_token_and_decode_rows_the_rest():
    trace = random_trace(10, 2, 4, 1, seed=0, requests=1, prompt=6)
    out = serve(trace, "all-resident", 4, table=FakeTable(2, mixer=100, per_expert=0))
    r = out.records.requests
    assert r.column("first_token").tolist() == [200], "the prompt is one step of two layers"
    assert r.column("output_tokens").tolist() == [1 + 4]
    assert out.records.gaps.tolist() == [200] * 4


def test_chunked_prefill_spreads_a_prompt_over_steps():
    trace = random_trace(10, 1, 4, 1, seed=0, requests=1, prompt=6)
    whole = serve(trace, "all-resident", 4)
    chunked = serve(trace, "all-resident", 4, chunk=2)
    assert whole.records.steps.column("prefill_tokens").tolist()[:1] == [6]
    assert chunked.records.steps.column("prefill_tokens").tolist()[:3] == [2, 2, 2]
    assert whole.counts.lookups < chunked.counts.lookups, "each chunk looks its experts up anew"


def test_prefill_and_decode_share_a_step():
    trace = random_trace(40, 1, 4, 1, seed=0, requests=2, prompt=10)
    arrivals = np.array([0, 150], dtype=np.int64)
    trace = replace(trace, requests=replace(trace.requests, arrival_ns=arrivals))
    steps = serve(trace, "all-resident", 4, concurrency=2).records.steps
    both = (steps.column("prefill_tokens") > 0) & (steps.column("decode_tokens") > 0)
    assert both.any()


def test_no_more_requests_at_once_than_allowed():
    trace = random_trace(40, 1, 4, 1, seed=0, requests=8)
    steps = serve(trace, "all-resident", 4, concurrency=3).records.steps
    assert steps.column("sequences").max() == 3


def test_a_request_waits_for_kv_memory():
    trace = random_trace(40, 1, 4, 1, seed=0, requests=4)
    table = FakeTable(1, model=FakeModel(kv_per_token=10))
    one = setting(trace, 4, concurrency=4, table=table)
    tight = replace(one, limits=Limits(9, 4, 8192, 0, kv_bytes=100))  # one request of ten tokens
    assert simulate(tight, load_system("all-resident")).records.steps.column("sequences").max() == 1
    with pytest.raises(MemoryBudgetError, match="its KV cache"):
        simulate(replace(one, limits=Limits(9, 4, 8192, 0, kv_bytes=99)), load_system("all-resident"))


def test_kv_growth_takes_expert_slots_and_gives_them_back():
    """16 expert slots shared with a KV cache that grows by one expert's bytes per token."""
    trace = random_trace(30, 1, 16, 2, seed=2, requests=3)
    table = FakeTable(1, model=FakeModel(kv_per_token=1000))
    shared = replace(setting(trace, 16, table=table), shared_bytes=16_000, expert_bytes=16_000)
    fixed = simulate(setting(trace, 16, table=table), load_system("LRU"))
    squeezed = simulate(shared, load_system("LRU"))
    assert fixed.counts.evictions == 0 < squeezed.counts.evictions
    assert squeezed.records.steps.column("kv_bytes").max() == 10_000


def test_slots_are_dealt_out_evenly_from_the_first_layer():
    assert split_by_layer(7, [1, 1, 1]) == (3, 2, 2)
    assert split_by_layer(10, [4, 2, 2]) == (4, 4, 2)
    assert split_by_layer(-5, [1, 1]) == (0, 0)


def test_arrivals_at_their_times():
    trace = random_trace(6, 1, 4, 1, seed=0, requests=2)
    trace = replace(trace, requests=Requests(("a", "b"), ("", ""), np.zeros(2, np.int32), np.array([0, 10**6])))
    out = serve(trace, "all-resident", 4)
    assert out.records.requests.column("admitted").tolist() == [0, 10**6]
    assert out.idle_ns > 0
    assert from_trace(trace).arrivals == "as recorded"


def test_held_back_requests_are_timed_from_when_they_are_sent():
    """One client, two requests at hand: the second is sent when the first is done, and waited for nothing."""
    trace = random_trace(8, 1, 4, 1, seed=0, requests=2)
    one = setting(trace, 4, table=FakeTable(1, mixer=100, per_expert=0))
    out = simulate(replace(one, limits=replace(one.limits, clients=1)), load_system("all-resident"))
    assert out.records.requests.column("sent").tolist() == [0, 400]
    assert out.records.requests.column("first_token").tolist() == [100, 500]
