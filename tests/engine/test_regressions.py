"""Faults found once, each pinned."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.cache import Entry, Now, Pool
from moesim.engine.host_tier import HostTier
from moesim.errors import PolicyError
from moesim.policies import Misses
from moesim.systems import load_system, with_setting
from tests.fakes import FakeTable, make_device, make_trace
from tests.scenes import random_trace, scenes, serve


def test_a_plan_renews_the_unfinished_copies_of_the_one_before():
    env = simpy.Environment()
    device = make_device(env, random_trace(2, 1, 8, 1, 0), load_system("eMoE"), slots=4)
    values = np.array([[8.0, 7, 6, 5, 0, 0, 0, 0]])
    device.memory.plan(values)
    env.run(until=1500)
    device.memory.plan(values)
    env.run()
    assert sorted(device.memory.here[0]) == [0, 1, 2, 3] and device.counts.dropped == 0


def test_a_plan_drops_what_it_no_longer_names():
    env = simpy.Environment()
    device = make_device(env, random_trace(2, 1, 8, 1, 0), load_system("eMoE"), slots=2)
    device.memory.plan(np.array([[8.0, 7, 0, 0, 0, 0, 0, 0]]))
    env.run(until=500)
    device.memory.plan(np.array([[8.0, 0, 0, 0, 0, 0, 0, 7]]))
    env.run()
    assert sorted(device.memory.here[0]) == [0, 7] and device.counts.dropped == 1


@pytest.mark.parametrize("rule", ["host", "cheaper", "fetch"])
def test_experts_that_are_not_in_host_memory_are_read_before_anyone_computes_them(rule):
    """Four experts, host memory for two, each used once: two reads whatever the rule."""
    trace = make_trace([[[e]] for e in range(4)], 4)
    system = replace(load_system("LRU"), misses=Misses(rule))
    out = serve(trace, system, 4, host_slots=2, table=FakeTable(1, host_expert=1, copy=1000))
    assert out.link_bytes["nvme"] == 2 * 1000
    assert out.elapsed_ns >= 2 * 3000


def test_a_dropped_prefetch_does_not_count_as_read():
    tier = HostTier(2000, 1, 4, [1000])
    assert tier.touch(0, 0) and not tier.touch(0, 2)
    assert tier.touch(0, 1), "asking changes nothing"
    tier.insert(0, 2, 1000)
    assert tier.touch(0, 2) and not tier.touch(0, 0)


def test_the_heap_never_compares_experts():
    pool = Pool(10_000, lambda e: 0.0, False, Now(1))
    for _ in range(2):
        entry = Entry(0, 3, 1000, brought=_, key=3)
        entry.landed = True
        pool.add(entry)
        pool.offer(entry)
        pool.remove(entry)
    other = Entry(0, 4, 1000, brought=5, key=4)
    other.landed = True
    pool.add(other)
    pool.offer(other)
    assert pool.victim() is other


def test_tokens_are_not_dropped_while_the_only_expert_is_on_its_way():
    system = with_setting(load_system("eMoE"), "placement.start=empty")
    out = serve(make_trace([[[1]]], 4), system, 2)
    assert not out.counts.altered.any()


PARTS = {
    "misses.rule": ["fetch", "host", "cheaper", "reroute", "skip"],
    "misses.keep": ["true", "false"],
    "eviction.scope": ["layer", "global"],
    "eviction.score": ["lru", "lfu", "belady", "random", "lru:1,lfu:2", "prob"],
    "predictor": ["none", "transitions", "oracle(recall=0.5)", "oracle(distance=2)", "oracle(distance=0)"],
    "prefetch.per_layer": ["none", "1"],
    "prefetch.pin": ["true", "false"],
    "transfer.unit": ["expert", "matrix", "layer"],
    "transfer.write_back": ["true", "false"],
    "refresh": ["LRU", "eMoE(period=1)"],
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    scenes(),
    st.sampled_from(["LRU", "static", "on-demand", "eMoE", "Fiddler", "HOBBIT"]),
    st.lists(
        st.sampled_from(sorted(PARTS)).flatmap(lambda p: st.tuples(st.just(p), st.sampled_from(PARTS[p]))), max_size=4
    ),
)
def test_any_composition_that_is_accepted_serves_every_request(scene, name, changes):
    trace, slots, concurrency, table = scene
    system = load_system(name)
    try:
        for part, value in changes:
            system = with_setting(system, f"{part}={value}")
    except PolicyError:
        return  # refused, with a reason
    least = 2 if name == "HOBBIT" else 1
    out = serve(trace, system, max(slots, least), concurrency=concurrency, table=table)
    assert len(out.records.requests) == len(trace.requests)
    assert out.counts.hits + out.counts.lates + out.counts.misses == out.counts.lookups
    assert sum(out.counts.spent.values()) + out.idle_ns == out.elapsed_ns
