"""Serving: queueing truths, batching, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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
from moesim.workload_files import read_rows
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


def served(trace, limits, *, engine="compiled", workload=None, kv_per_token=10, mixer=100):
    table = FakeTable(trace.layers, mixer=mixer, per_expert=0, model=FakeModel(kv_per_token=kv_per_token))
    one = replace(setting(trace, 4, table=table, workload=workload), limits=limits)
    return simulate(one, load_system("all-resident"), engine=engine).records


def test_the_last_to_come_is_preempted_and_computed_again_by_hand():
    """Two requests of 2 prompt and 4 generated rows, KV for 9 tokens. A pass takes 100 ns.

    Pass 1 prefills both (2 + 2), 2 and 3 add one each (3 + 3, 4 + 4); a fourth would need 5 + 5, so the second goes.
    The first is alone in 4 and 5 (5, 6) and leaves. The second has made 2 rows and prefills 2 + 2 and the next one, 3,
    in pass 6, which yields its next token, and the last row follows in 7.
    """
    trace = random_trace(12, 1, 4, 1, seed=0, requests=2, prompt=2)
    records = served(trace, Limits(9, 9, 8192, 0, 90, preempts=True))
    r = records.requests
    assert records.steps.column("sequences").tolist() == [2, 2, 2, 1, 1, 1, 1]
    assert records.steps.column("kv_bytes").tolist() == [40, 60, 80, 50, 60, 50, 60]
    assert records.steps.column("prefill_tokens").tolist() == [4, 0, 0, 0, 0, 5, 0]
    assert r.column("finished").tolist() == [500, 700]
    assert r.column("preemptions").tolist() == [0, 1]
    assert r.column("recomputed_tokens").tolist() == [0, 5]
    assert r.column("preempted_ns").tolist() == [0, 200]
    assert sorted(records.gaps) == [100] * 7 + [300]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 6), st.integers(1, 12), st.integers(1, 12), st.integers(0, 5), st.integers(0, 40), st.integers(1, 8),
    st.sampled_from(["events", "compiled"]), st.floats(0.5, 50),
)  # fmt: skip
def test_preemption_conserves_tokens_and_time(requests, prompt, decode, chunk, spare, together, engine, rate):
    trace = random_trace(requests * (prompt + decode), 1, 4, 1, seed=0, requests=requests, prompt=prompt)
    workload = with_arrivals(from_trace(trace), rate * 1e6, 1.0, seed=2)
    limits = Limits(99, together, 8192, chunk, 10 * (prompt + decode + spare), preempts=True)
    records = served(trace, limits, engine=engine, workload=workload)
    steps, r = records.steps, records.requests
    assert sorted(r.column("request").tolist()) == list(range(requests))
    assert steps.column("kv_bytes").max() <= limits.kv_bytes
    assert steps.column("sequences").max() <= together
    done = steps.column("prefill_tokens").sum() + steps.column("decode_tokens").sum()
    again, redone = r.column("recomputed_tokens"), r.column("preemptions").sum()
    assert 0 <= done - again.sum() - requests * (prompt + decode) + redone <= redone
    assert (again[r.column("preemptions") == 0] == 0).all()
    assert len(records.gaps) == requests * decode
    over_steps = (steps.column("sequences") * (steps.column("end") - steps.column("start"))).sum()
    inside = r.column("finished") - r.column("admitted") - r.column("preempted_ns")
    assert over_steps == inside.sum(), "Little's law, without the time out of service"
    assert (r.column("finished") > r.column("first_token")).all()


def test_without_need_nobody_is_preempted_and_times_are_the_same():
    trace = random_trace(60, 2, 4, 1, seed=0, requests=5, prompt=4)
    plain, ready = (served(trace, Limits(9, 3, 8192, 2, 1 << 40, preempts=p)) for p in (False, True))
    assert (plain.requests.rows() == ready.requests.rows()).all() and (plain.steps.rows() == ready.steps.rows()).all()


def test_more_are_in_service_where_requests_need_not_fit_at_their_longest():
    trace = random_trace(200, 1, 4, 1, seed=0, requests=10, prompt=2)
    limits = Limits(99, 99, 8192, 0, 10 * 60)
    whole, now = served(trace, limits), served(trace, replace(limits, preempts=True))
    assert now.steps.column("sequences").max() > whole.steps.column("sequences").max() == 3


def prompts(hashes, tail=8, decode=3, seed=0, gap=10_000):
    """(trace, workload) of requests with such blocks of 512 tokens, `tail` more prompt tokens and `decode` rows."""
    sizes = [(512 * len(own) + tail, decode) for own in hashes]
    ids = np.random.default_rng(seed).integers(0, 4, (sum(p + d for p, d in sizes), 1, 1))
    trace = make_trace(ids, 4, sizes)
    requests = [
        replace(r, blocks=own, arrival_ns=i * gap)
        for i, (r, own) in enumerate(zip(from_trace(trace).requests, hashes, strict=True))
    ]
    return trace, Workload(tuple(requests), "")


def cached(hashes, blocks_of_room, **how):
    trace, workload = prompts(hashes, **how)
    room = blocks_of_room * 512 + 64
    records = served(trace, Limits(99, 99, 1 << 20, 0, room, prefixes=True), workload=workload, kv_per_token=1)
    return records.requests.column("cached_tokens").tolist(), records


def test_a_prompt_begins_where_the_longest_kept_one_ends():
    found, records = cached([(1, 2), (1, 2, 3), (1, 9), (4,), (1, 2, 3)], 20)
    assert found == [0, 1024, 512, 0, 1536]
    assert records.steps.column("prefill_tokens")[records.steps.column("prefill_tokens") > 0].tolist() == [
        1032, 520, 520, 520, 8,
    ]  # fmt: skip


def test_one_token_is_always_computed():
    assert cached([(1, 2), (1, 2)], 20, tail=0)[0] == [0, 512]


def test_blocks_leave_least_recently_used_and_deepest_first():
    """Room for four blocks: (1, 2) and (3, 4) fill it; (5,) drops 2, the deepest of the one used longest ago."""
    assert cached([(1, 2), (3, 4), (5,), (1, 2), (3, 4)], 4)[0] == [0, 0, 0, 512, 512]


def test_what_running_requests_share_takes_memory_once():
    hashes = [(1, 2, 3)] + [(1, 2, 3)] * 3
    found, records = cached(hashes, 5, gap=150)  # the first has computed its prompt when the others come
    assert found == [0, 1536, 1536, 1536]
    assert records.steps.column("sequences").max() > 1
    assert records.steps.column("kv_bytes").max() < 2 * 1536


MOONCAKE = Path(__file__).parents[2] / "../shared/data/mooncake_traces/FAST25-release/traces/conversation_trace.jsonl"


def test_hits_on_a_real_trace_are_those_counted_apart():
    """One request at a time and room for all: a block is there as soon as a request before had it."""
    if not MOONCAKE.exists():
        pytest.skip(f"no Mooncake trace at {MOONCAKE}")
    trace = make_trace(np.zeros((1, 1, 1)), 1)
    rows, seen, expected, requests = read_rows(MOONCAKE)[:600], set(), [], []
    for i, row in enumerate(rows):
        leading = len(row.blocks)
        for n, block in enumerate(row.blocks):
            if block not in seen:
                leading = n
                break
        expected.append(min(leading, (row.prompt - 1) // 512) * 512)
        seen.update(row.blocks)
        requests.append(
            Request(f"{i}", "", i, row.prompt, np.zeros(row.prompt, int), np.zeros(1, int), blocks=row.blocks)
        )
    limits = Limits(1, 1, 1 << 20, 0, 1 << 60, prefixes=True)
    found = served(trace, limits, workload=Workload(tuple(requests), "")).requests.column("cached_tokens")
    assert found.tolist() == expected
    assert sum(expected) > 0.05 * sum(row.prompt for row in rows)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=8), st.integers(0, 6), st.integers(0, 600),
    st.booleans(), st.integers(0, 700),
)  # fmt: skip
def test_prefixes_conserve_memory_and_tokens(paths, spare, gap, preempts, chunk):
    """A block's hash stands for all before it, so hashes are made from paths."""
    hashes = [tuple(hash(tuple(path[: i + 1])) for i in range(len(path))) for path in paths]
    trace, workload = prompts(hashes, gap=gap)
    room = 512 * max(map(len, hashes)) + 11 + 100 * spare
    limits = Limits(99, 3, 1 << 20, chunk, room, preempts, prefixes=True)
    records = served(trace, limits, workload=workload, kv_per_token=1)
    r, steps = records.requests, records.steps
    assert steps.column("kv_bytes").max() <= room
    again, kept = r.column("recomputed_tokens").sum(), r.column("cached_tokens").sum()
    first_time = steps.column("prefill_tokens").sum() - again
    assert first_time <= r.column("prompt_tokens").sum() - kept if not preempts else True
    assert len(records.gaps) == 3 * len(hashes)
    if not preempts:
        assert again == 0 and first_time == r.column("prompt_tokens").sum() - kept
