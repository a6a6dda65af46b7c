"""What must always hold (docs/design.md), each as a test of that name."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.batch import one_pass
from moesim.engine.events import ARRIVED, RESIDENT, Device
from moesim.engine.residency import D2H, H2D, HOST, REROUTED, SKIPPED
from moesim.engine.simulate import simulate
from moesim.policies import LRU, Eviction, Misses, Placement, Transfer
from moesim.prediction import ExpertMaps, NoPrediction, Oracle, RequestCounts, Transitions
from moesim.systems import System, load_system
from moesim.trace import Trace
from moesim.workload import from_trace, with_arrivals
from tests.fakes import FakeTable, make_device, make_trace
from tests.oracle import events_of, misses
from tests.scenes import CACHED, EVERY, random_trace, scenes, serve, setting

quick = settings(max_examples=60, deadline=None)


@quick
@given(scenes(), st.sampled_from(EVERY))
def test_conservation_every_token_of_every_request_is_served_once(scene, name):
    trace, slots, concurrency, table = scene
    served: list[int] = []
    one_pass_of = Device._pass

    def noting(self, batch, i):
        served.extend(batch.rows_of(i).tolist())
        yield from one_pass_of(self, batch, i)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Device, "_pass", noting)
        out = serve(trace, name, slots, concurrency=concurrency, table=table)
    assert sorted(served) == list(range(trace.tokens))
    assert sorted(out.records.requests.column("request").tolist()) == list(range(len(trace.requests)))
    for request, rows in enumerate(np.split(np.arange(trace.tokens), trace.first_row[1:-1])):
        assert [r for r in served if trace.request[r] == request] == rows.tolist()


@quick
@given(scenes(), st.sampled_from(EVERY))
def test_every_lookup_is_a_hit_a_late_or_a_miss(scene, name):
    trace, slots, concurrency, table = scene
    counts = serve(trace, name, slots, concurrency=concurrency, table=table).counts
    assert counts.hits + counts.lates + counts.misses == counts.lookups > 0


@quick
@given(scenes(), st.sampled_from(EVERY), st.sampled_from(["layer", "global"]))
def test_residency_never_above_capacity(scene, name, scope):
    trace, slots, concurrency, table = scene
    system = load_system(name)
    system = replace(system, eviction=replace(system.eviction, scope=scope))
    from moesim.engine.cache import Pool

    add = Pool.add

    def checked(self, entry):
        add(self, entry)
        assert self.used <= self.capacity
        assert self.used == sum(e.bytes for e in self.entries.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "add", checked)
        serve(trace, system, slots, concurrency=concurrency, table=table)


@quick
@given(scenes(), st.sampled_from(EVERY))
def test_link_busy_time_is_the_sum_of_its_transfers(scene, name):
    trace, slots, concurrency, table = scene
    out = serve(trace, name, slots, concurrency=concurrency, table=table)
    t = out.records.transfers
    for which, link in ((H2D, "h2d"), (D2H, "d2h"), (HOST, "host")):
        mine = t.column("link") == which
        start, end = t.column("start")[mine], t.column("end")[mine]
        assert int((end - start).sum()) == out.busy_ns[link]
        order = np.lexsort((end, start))
        assert (start[order][1:] >= end[order][:-1]).all(), "one transfer at a time"


@quick
@given(scenes(), st.sampled_from(EVERY))
def test_nothing_computes_before_it_arrives(scene, name):
    trace, slots, concurrency, table = scene
    out = serve(trace, name, slots, concurrency=concurrency, table=replace(table, per_expert=7))
    kernels, transfers = out.records.kernels, out.records.transfers
    arrived = transfers.column("link") == H2D
    for layer in range(trace.layers):
        lands = np.sort(transfers.column("end")[arrived & (transfers.column("layer") == layer)])
        here = kernels.column("layer") == layer
        starts = np.sort(kernels.column("start")[here & (kernels.column("what") == ARRIVED)])
        for n, start in enumerate(starts.tolist(), 1):
            assert (lands <= start).sum() >= n


@quick
@given(scenes(), st.sampled_from(EVERY), st.floats(0.5, 50))
def test_busy_and_idle_make_up_the_elapsed_time(scene, name, rate):
    trace, slots, concurrency, table = scene
    workload = with_arrivals(from_trace(trace), rate * 1e6, 1.0, seed=1)
    out = serve(trace, name, slots, concurrency=concurrency, table=table, workload=workload)
    assert sum(out.counts.spent.values()) + out.idle_ns == out.elapsed_ns
    assert all(0 <= busy <= out.elapsed_ns for busy in out.busy_ns.values())
    layers = out.records.layers
    assert layers.column("waited").sum() == sum(out.counts.spent[k] for k in ("pcie", "nvme", "host"))


@quick
@given(scenes(), st.sampled_from(EVERY))
def test_same_inputs_same_bytes_out(scene, name):
    trace, slots, concurrency, table = scene
    one, two = (serve(trace, name, slots, concurrency=concurrency, table=table) for _ in range(2))
    assert one.counts == two.counts and one.elapsed_ns == two.elapsed_ns
    for table_name in ("steps", "layers", "transfers", "requests", "kernels"):
        assert getattr(one.records, table_name).to_arrow().equals(getattr(two.records, table_name).to_arrow())


@quick
@given(scenes())
def test_all_resident_means_no_stall(scene):
    trace, slots, concurrency, table = scene
    out = serve(trace, "all-resident", slots, concurrency=concurrency, table=table)
    assert out.counts.hits == out.counts.lookups
    assert out.busy_ns["gpu"] + out.idle_ns == out.elapsed_ns
    assert not out.link_bytes["h2d"]


def test_an_oracle_over_an_idle_link_means_no_stall():
    trace = random_trace(40, 4, 16, 2, seed=1)
    table = FakeTable(4, mixer=10_000, copy=1000)  # two copies fit well within one layer's own time
    out = serve(trace, "oracle", 8, table=table)
    first = 2  # nothing comes before the first token's first layer, so its experts are demanded
    assert out.counts.misses == first and out.counts.lates == 0
    later = out.records.layers.column("waited")[1:]
    assert not later.any()


def test_one_slot_is_link_bound_at_the_closed_form():
    """k experts through one slot, none reused: each copy waits until the expert before it is computed."""
    experts = np.arange(24).reshape(4, 1, 6)
    trace = make_trace(experts, 24)
    table = FakeTable(1, mixer=100, per_expert=10, copy=1000)
    out = serve(trace, "LRU", 1, table=table)
    assert out.counts.misses == 24
    assert out.elapsed_ns == 4 * (100 + 6 * (1000 + 10))


@quick
@given(scenes(), st.sampled_from(CACHED))
def test_belady_misses_no_more_than_any_other_policy(scene, name):
    trace, slots, concurrency, table = scene
    unique = _most_unique(trace, concurrency)
    slots = max(slots, unique)  # with fewer slots than one step needs, order within the step decides, not foresight
    best = serve(trace, "Belady", slots, concurrency=concurrency, table=table).counts.misses
    assert best <= serve(trace, name, slots, concurrency=concurrency, table=table).counts.misses


@quick
@given(scenes())
def test_lru_misses_fall_as_capacity_grows(scene):
    trace, _, concurrency, table = scene
    least = _most_unique(trace, concurrency)
    counts = [
        serve(trace, "LRU", slots, concurrency=concurrency, table=table).counts.misses
        for slots in range(least, trace.info.experts + 1)
    ]
    assert counts == sorted(counts, reverse=True)


def _most_unique(trace: Trace, concurrency: int) -> int:
    """No step routes to more experts of one layer than this."""
    prompts = int(trace.requests.prompt_tokens.sum())
    return min(trace.info.experts, trace.top_k * max(concurrency, prompts + concurrency))


@quick
@given(scenes(), st.sampled_from([*CACHED, "on-demand", "static"]))
def test_more_bandwidth_is_never_slower_for_fixed_decisions(scene, name):
    trace, slots, concurrency, table = scene
    slots = max(slots, _most_unique(trace, concurrency))  # decisions do not depend on time then
    slow = serve(trace, name, slots, concurrency=concurrency, table=replace(table, copy=table.copy + 5))
    fast = serve(trace, name, slots, concurrency=concurrency, table=table)
    assert fast.counts.misses == slow.counts.misses
    assert fast.elapsed_ns <= slow.elapsed_ns


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 29),
    st.sampled_from([
        Transitions(block=4), Transitions(block=1, top=3), RequestCounts(), RequestCounts(store=1),
        ExpertMaps(distance=1), ExpertMaps(distance=3, store=4), ExpertMaps(distance=1, offline=True),
    ]),
)  # fmt: skip
def test_predictors_are_causal(seed, cut, predictor):
    """Changing the future of a trace changes no earlier belief."""
    trace = random_trace(30, 3, 8, 2, seed, requests=3)
    other = random_trace(30, 3, 8, 2, seed + 1, requests=3)
    mixed = trace.experts.copy()
    mixed[cut:] = other.experts[cut:]
    for before, after in zip(
        predictor.predict(trace, 0), predictor.predict(replace(trace, experts=mixed), 0), strict=True
    ):
        np.testing.assert_array_equal(before.experts[:cut], after.experts[:cut])


def test_the_oracle_alone_looks_ahead():
    trace = random_trace(30, 3, 8, 2, 0)
    np.testing.assert_array_equal(Oracle().predict(trace, 0)[0].experts, trace.experts)
    named = Oracle(recall=0.7).predict(trace, 0)[0].experts
    right = (named[:, :, :, None] == trace.experts[:, :, None, :]).any(axis=3).mean()
    assert 0.6 < right < 0.8
    assert (np.sort(named, axis=2)[:, :, 1:] != np.sort(named, axis=2)[:, :, :-1]).all(), "named experts are distinct"


@pytest.mark.parametrize("policy", ["LRU", "LFU", "FIFO", "Belady"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("slots", [8, 12, 16])
def test_misses_equal_those_of_an_independent_oracle(policy, batch, slots):
    trace = random_trace(200, 3, 32, 2, seed=slots, requests=batch)
    per_request = trace.tokens // batch
    order = np.arange(trace.tokens).reshape(batch, per_request).T.ravel()  # one token of each request per step
    expected = sum(misses(events_of(trace.experts[order], layer, batch), slots, policy) for layer in range(3))
    assert serve(trace, policy, slots, concurrency=batch).counts.misses == expected


def test_a_global_cache_lends_the_slots_of_one_layer_to_another():
    """Layer 0 always wants expert 0, layer 1 cycles through five: 3 + 3 slots hold them only together."""
    trace = make_trace([[[0], [t % 5]] for t in range(20)], 8)
    assert serve(trace, "LRU", 3).counts.misses == 1 + 20
    assert serve(trace, load_system("LRU(scope='global')"), 3).counts.misses == 1 + 5


def test_skip_and_reroute_never_wait_and_account_for_the_weight():
    trace = random_trace(50, 2, 8, 2, seed=5)
    for rule in ("skip", "reroute"):
        system = System("test", eviction=LRU, misses=Misses(rule), placement=Placement("hot"))
        out = serve(trace, system, 4)
        assert out.counts.misses > 0 and out.elapsed_ns == out.busy_ns["gpu"]
        moved = out.counts.weight(REROUTED if rule == "reroute" else SKIPPED)
        assert moved == pytest.approx(out.counts.misses / 2), "each of two experts carries half the weight"


def test_cheaper_takes_the_host_where_it_is_quicker():
    trace = random_trace(20, 1, 8, 2, seed=6)
    system = System("test", eviction=LRU, misses=Misses("cheaper"))
    fast_host = serve(trace, system, 4, table=FakeTable(1, host_expert=10, copy=1000))
    slow_host = serve(trace, system, 4, table=FakeTable(1, host_expert=5000, copy=1000))
    assert fast_host.counts.hosted == fast_host.counts.misses and not fast_host.link_bytes["h2d"]
    assert slow_host.counts.hosted == 0 and slow_host.link_bytes["h2d"] > 0


def test_write_back_copies_every_evicted_expert_to_the_host():
    out = serve(random_trace(60, 2, 8, 2, seed=7), "Mixtral-Offloading", 3)
    assert out.counts.evictions > 0
    assert out.link_bytes["d2h"] == out.counts.evictions * 1000


def test_a_whole_layer_moves_at_a_miss():
    trace = make_trace([[[0]], [[5]]], 6)
    system = System("test", cache=False, misses=Misses("fetch", keep=False), transfer=Transfer("layer"))
    out = serve(trace, system, 0)
    assert out.link_bytes["h2d"] == 2 * 6 * 1000
    assert out.counts.misses == 2


def test_a_demand_passes_between_the_matrices_of_a_prefetch():
    """Layer 1's expert is prefetched in three parts; layer 0 of the next token demands another in between."""
    trace = make_trace([[[0], [1]], [[2], [1]]], 4)
    beliefs = Oracle(distance=1).predict(trace, 0)
    system = System("test", eviction=LRU, transfer=Transfer("matrix"), predictor=NoPrediction())
    out = simulate(setting(trace, 4, table=FakeTable(2, copy=900)), system, detail=True, beliefs=beliefs)
    kinds = Counter(zip(*(out.records.transfers.column(c).tolist() for c in ("layer", "expert")), strict=True))
    assert set(kinds.values()) == {3}


def test_prefetches_for_a_passed_layer_are_dropped():
    """A belief about layer 1 that is still queued when layer 1 is routed elsewhere is never copied."""
    trace = make_trace([[[0], [3]]], 4)
    (exact,) = Oracle(distance=1).predict(trace, 0)
    wrong = (replace(exact, experts=np.array([[[0], [1]]], dtype=np.int16)),)
    system = System("test", eviction=LRU)
    out = simulate(setting(trace, 4, table=FakeTable(2, mixer=1, copy=1000)), system, detail=True, beliefs=wrong)
    assert out.counts.prefetched + out.counts.dropped == 1
    assert out.counts.misses == 2


def test_a_demand_for_a_queued_prefetch_is_late_and_hurries_it():
    trace = make_trace([[[0], [1]]], 4)
    out = serve(trace, "oracle", 4, table=FakeTable(2, mixer=1, copy=1000))
    assert (out.counts.misses, out.counts.lates, out.counts.hits) == (1, 1, 0)
    assert out.link_bytes["h2d"] == 2000


def test_an_expert_in_use_is_never_evicted():
    """A step with more experts than slots passes them through one by one and computes each."""
    trace = make_trace([[[0, 1, 2, 3]]], 8)
    env = simpy.Environment()
    device = make_device(env, trace, load_system("LRU"), slots=2)
    env.run(env.process(device.steps(one_pass([0], contexts=[1]))))
    kernels = device._records.kernels.column("what").tolist()
    assert kernels.count(ARRIVED) == 4 and kernels.count(RESIDENT) == 0
    assert device.counts.evictions == 2
    assert device.memory.resident_bytes == 2000


def test_eviction_by_a_weighted_sum_lies_between_its_features():
    trace = random_trace(100, 2, 16, 2, seed=9)
    mixed = System("test", eviction=Eviction((("lru", 1.0), ("lfu", 0.0))))
    assert serve(trace, mixed, 6).counts.misses == serve(trace, "LRU", 6).counts.misses


def test_wrong_prefetches_without_a_cache_do_not_clog_the_scratch_slots():
    trace = random_trace(60, 3, 8, 2, seed=1, requests=3)
    for recall in (0.0, 0.5, 1.0):
        system = replace(load_system("on-demand"), predictor=Oracle(recall=recall))
        for copy in (1, 100, 10_000):
            out = serve(trace, system, 0, table=FakeTable(3, copy=copy))
            assert len(out.records.requests) == 3
    assert out.counts.hits + out.counts.lates > 0


def test_a_plan_for_a_global_cache_takes_the_most_valuable_of_all_layers():
    env = simpy.Environment()
    trace = random_trace(4, 2, 4, 1, seed=0)
    device = make_device(env, trace, replace(load_system("eMoE"), eviction=Eviction((("plan", 1.0),), "global")), 2)
    device.memory.plan(np.array([[9.0, 8, 7, 0], [1.0, 6, 0, 0]]))
    env.run()
    assert [sorted(here) for here in device.memory.here] == [[0, 1, 2], [1]]
