"""One pass over a trace counts what the engine and an independent oracle count, at every cache size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.simulate import served_steps, simulate
from moesim.errors import PolicyError
from moesim.policies import Eviction
from moesim.systems import load_system
from moesim.trace.cut import cut
from moesim.trace.io import read
from moesim.trace.miss_ratio import miss_curve
from tests.fakes import make_trace
from tests.oracle import events_of, misses
from tests.scenes import random_trace, setting

SYSTEM = {"lru": "LRU", "belady": "Belady"}


def engine(trace, policy: str, scope: str, slots: int, **how) -> int:
    """Misses of the event engine; a global pool gets `slots` experts in all."""
    system = replace(load_system("LRU"), eviction=Eviction(((policy, 1.0),), scope))
    scene = setting(trace, slots, **how)
    if scope == "global":
        scene = replace(scene, expert_bytes=slots * scene.table.size)
    return simulate(scene, system).counts.misses


@pytest.mark.parametrize("policy", ["lru", "belady"])
@pytest.mark.parametrize("batch", [1, 3])
def test_misses_equal_those_of_the_oracle(policy, batch):
    trace = random_trace(240, 2, 12, 2, seed=5)
    rows = np.arange(240).reshape(-1, batch)
    curve = miss_curve(trace, policy, steps=list(rows))
    for layer in range(2):
        events = events_of(trace.experts.tolist(), layer, batch)
        widest = max(map(len, events))
        for capacity in range(widest, 13):  # the oracle knows no event wider than the cache
            assert curve.misses[layer, capacity - 1] == misses(events, capacity, SYSTEM[policy]), capacity
        assert curve.lookups[layer] == sum(map(len, events))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 8), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3),
    st.sampled_from(["lru", "count", "belady"]), st.sampled_from(["layer", "global"]), st.integers(0, 9999),
)  # fmt: skip
def test_misses_equal_those_of_the_engine_at_every_size(
    experts, k, layers, requests, concurrency, prompt, policy, scope, seed
):
    """Batches of prompts and decode tokens, caches narrower than one step included."""
    trace = random_trace(requests * 9, layers, experts, min(k, experts), seed, requests, prompt)
    unused = np.random.default_rng(seed).random(trace.experts.shape) < 0.2
    unused[:, :, 0] = False
    trace = replace(trace, experts=np.where(unused, np.int16(-1), trace.experts))
    how = {"concurrency": concurrency}
    curve = miss_curve(trace, policy, scope, served_steps(setting(trace, 1, **how)))
    for capacity, missed in zip(curve.capacities, curve.misses.sum(0), strict=True):
        assert missed == engine(trace, policy, scope, int(capacity), **how), capacity


@pytest.mark.parametrize("policy", ["lru", "count", "belady"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_few_sizes_are_those_of_the_whole_curve(policy, scope):
    trace = random_trace(300, 2, 16, 2, seed=1)
    whole = miss_curve(trace, policy, scope, list(np.arange(300).reshape(-1, 4)))
    few = miss_curve(trace, policy, scope, list(np.arange(300).reshape(-1, 4)), capacities=[1, 5, 12, 99])
    assert np.array_equal(few.misses[:, :3], whole.misses[:, [0, 4, 11]])
    assert np.array_equal(few.misses[:, 3], whole.misses[:, -1])


def test_by_hand():
    """a b a c, with one slot and more: the classical example of stack distances."""
    trace = make_trace(np.array([[[0]], [[1]], [[0]], [[2]]]), 3, [(0, 4)])
    assert miss_curve(trace, "lru").misses.tolist() == [[4, 3, 3]]
    assert miss_curve(trace, "belady").misses.tolist() == [[4, 3, 3]]
    assert miss_curve(trace, "lru").ratio.tolist() == [[1, 0.75, 0.75]]


def test_on_the_shipped_trace(shipped):
    """The engine's golden scene, decode rows one at a time, and steps of four requests with their prompts."""
    trace = cut(read(shipped), requests=12)
    decode = cut(trace, phase="decode")
    for policy in ("lru", "belady"):
        curve = miss_curve(decode, policy)
        for capacity in (1, 2, 8, 16):
            expected = engine(decode, policy, "layer", capacity)
            assert curve.misses[:, capacity - 1].sum() == expected
            if capacity > 1:
                lists = decode.experts.tolist()
                assert expected == sum(
                    misses(events_of(lists, layer), capacity, SYSTEM[policy]) for layer in range(decode.layers)
                )
        steps = served_steps(setting(trace, 1, concurrency=4))
        curve = miss_curve(trace, policy, "global", steps, capacities=[3, 40, 100])
        assert curve.misses[0].tolist() == [engine(trace, policy, "global", c, concurrency=4) for c in (3, 40, 100)]


def test_belady_misses_least_and_larger_caches_less(shipped):
    trace = cut(read(shipped), requests=12, phase="decode")
    curves = {policy: miss_curve(trace, policy).misses for policy in ("lru", "count", "belady")}
    for policy, found in curves.items():
        assert (np.diff(found[:, trace.top_k - 1 :], axis=1) <= 0).all(), policy
        assert (found[:, trace.top_k - 1 :] >= curves["belady"][:, trace.top_k - 1 :]).all()
        assert (found[:, -1] == [len(np.unique(layer[layer >= 0])) for layer in trace.experts.transpose(1, 0, 2)]).all()


def test_what_is_no_stack_policy_is_refused():
    trace = random_trace(4, 1, 4, 1, seed=0)
    with pytest.raises(PolicyError, match="no stack policy"):
        miss_curve(trace, "fifo")
    with pytest.raises(PolicyError, match="scope 'both'"):
        miss_curve(trace, "lru", "both")
    with pytest.raises(PolicyError, match="at least 1"):
        miss_curve(trace, capacities=[0])
