"""Serving: queueing truths, batching, memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.serve import Limits
from moesim.engine.simulate import simulate, split_by_layer
from moesim.errors import MemoryBudgetError
from moesim.systems import load_system
from moesim.trace import Requests
from moesim.workload import Request, Workload, from_trace, with_arrivals
from tests.fakes import FakeModel, FakeTable, make_trace
from tests.scenes import EVERY, random_trace, scenes, serve, setting

QUEUED = 100_000
WITHIN = 0.02  # of theory; the mean wait of so many requests scatters by 1.3 % (M/D/1) and 1.6 % (M/M/1) itself


def queue(tokens_per_request, load, token_ns):
    """One server and Poisson arrivals at `load` of what it can do: the requests' records and service times (ns)."""
    trace = make_trace(np.zeros((1, 1, 1)), 1)
    requests = tuple(
        Request(f"r{i}", "", 0, 0, np.empty(0, int), np.zeros(n, int)) for i, n in enumerate(tokens_per_request)
    )
    service = np.array(tokens_per_request) * token_ns
    workload = with_arrivals(Workload(requests, ""), load * 1e9 / service.mean(), 1.0, seed=3)
    table = FakeTable(1, mixer=token_ns, per_expert=0)
    records = simulate(setting(trace, 1, workload=workload, table=table), load_system("all-resident")).records.requests
    assert records.column("request").tolist() == list(range(len(requests))), "first come, first served"
    return records, service


@pytest.fixture(scope="module")
def md1():
    return queue([1] * QUEUED, 0.6, 1_000_000)


@pytest.fixture(scope="module")
def mm1():
    """Geometric lengths of mean 100 tokens wait 0.5 % less than the exponential ones they stand for."""
    return queue(np.random.default_rng(0).geometric(1 / 100, QUEUED).tolist(), 0.5, 1000)


def waits(records):
    return records.column("admitted") - records.column("arrival")


def test_md1_waits_as_theory_says(md1):
    """M/D/1: mean wait = rho / (2 (1 - rho)) services, and a share rho of the requests waits at all."""
    records, service = md1
    assert waits(records).mean() / service.mean() == pytest.approx(0.6 / (2 * (1 - 0.6)), rel=WITHIN)
    assert (waits(records) > 0).mean() == pytest.approx(0.6, rel=WITHIN)


def test_mm1_waits_as_theory_says(mm1):
    """M/M/1: mean wait = rho / (1 - rho) mean services; those that wait do so 1 / (1 - rho) on average."""
    records, service = mm1
    wait = waits(records) / service.mean()
    assert wait.mean() == pytest.approx(0.5 / (1 - 0.5), rel=WITHIN)
    assert (wait > 0).mean() == pytest.approx(0.5, rel=WITHIN)
    assert wait[wait > 0].mean() == pytest.approx(1 / (1 - 0.5), rel=WITHIN)


def test_mm1_arrivals_find_as_many_requests_as_there_are_on_average(mm1):
    """Poisson arrivals see time averages: what they find in the system is lambda W (Little), and geometric."""
    records, _ = mm1
    arrival, left = records.column("arrival"), records.column("finished")
    found = np.arange(len(arrival)) - np.searchsorted(left, arrival, side="right")
    inside = (left - arrival).sum() / left.max()
    assert found.mean() == pytest.approx(inside, rel=WITHIN)
    assert inside == pytest.approx(0.5 / (1 - 0.5), rel=WITHIN)
    shares = np.bincount(found, minlength=4)[:4] / len(found)
    assert shares == pytest.approx([(1 - 0.5) * 0.5**n for n in range(4)], rel=0.05)


@pytest.mark.parametrize("kind", ["md1", "mm1"])
def test_every_wait_is_lindleys_to_the_nanosecond(kind, request):
    """W(n+1) = max(0, W(n) + S(n) - A(n+1)): no sampling error, so nothing between 0 and 2 % hides here."""
    records, service = request.getfixturevalue(kind)
    walk = np.r_[0, np.cumsum(service[:-1] - np.diff(records.column("arrival")))]
    assert (waits(records) == walk - np.minimum.accumulate(walk)).all()
    assert (records.column("finished") - records.column("admitted") == service).all()


@settings(max_examples=80, deadline=None)
@given(scenes(), st.sampled_from(EVERY), st.floats(0.5, 50), st.integers(0, 3), st.sampled_from(["events", "compiled"]))
def test_littles_law_holds_on_every_run(scene, name, rate, chunk, engine):
    """Requests in service over all steps = time in service over all requests; the two are recorded apart."""
    trace, slots, concurrency, table = scene
    system = load_system(name)
    slots = max(slots, 2) if system.misses.rule == "precision" else slots
    workload = with_arrivals(from_trace(trace), rate * 1e6, 1.0, seed=1)
    one = setting(trace, slots, concurrency=concurrency, table=table, workload=workload, chunk=chunk)
    records = simulate(one, system, engine=engine).records
    steps, served = records.steps, records.requests
    over_steps = (steps.column("sequences") * (steps.column("end") - steps.column("start"))).sum()
    assert over_steps == (served.column("finished") - served.column("admitted")).sum()
    tokens = served.column("output_tokens").sum() - (served.column("prompt_tokens") > 0).sum()
    assert steps.column("decode_tokens").sum() == tokens
    assert steps.column("prefill_tokens").sum() == served.column("prompt_tokens").sum()


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
