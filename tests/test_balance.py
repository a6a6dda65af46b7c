"""Placements of experts on GPUs: DeepSeek's published example, loads that add up, the integer program's optimum."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PolicyError
from moesim.policies import Parallel
from moesim.policies.balance import Layout, balanced, contiguous, exact


def test_deepseeks_example():
    """The README of github.com/deepseek-ai/EPLB: 12 experts in 4 groups, 16 slots, 2 nodes of 4 GPUs."""
    load = np.array(
        [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ],
        dtype=float,
    )
    assert balanced(load, 16, 8, nodes=2, groups=4).tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_expert_has_a_slot_and_every_pair_a_gpu(data):
    gpus = data.draw(st.sampled_from([1, 2, 4]))
    experts = data.draw(st.integers(2, 12))
    slots = -(-(experts + data.draw(st.integers(0, 6))) // gpus) * gpus
    row = st.lists(st.integers(0, 50), min_size=experts, max_size=experts)
    counts = np.array(data.draw(st.lists(row, min_size=2, max_size=2)))
    placed = balanced(counts.astype(float), slots, gpus)
    assert all(set(row) == set(range(experts)) for row in placed.tolist())
    pairs, active = Layout(placed, gpus, experts).loads(counts)
    assert (pairs.sum(axis=1) == counts.sum(axis=1)).all()
    assert (active <= slots // gpus).all() and (active[pairs == 0] == 0).all()


def test_the_integer_program_finds_the_least_busiest_gpu():
    load = np.random.default_rng(1).integers(1, 40, (3, 8)).astype(float)
    placed, bound = exact(load, 2)
    for layer in range(3):
        total = load[layer].sum()
        halves = [load[layer, list(half)].sum() for half in combinations(range(8), 4)]
        best = min(max(half, total - half) for half in halves)
        mine = Layout(placed, 2, 8).loads(load.astype(int))[0][layer].max()
        assert mine == best and bound[layer] <= best + 1e-6


def test_replicas_share_and_the_first_take_one_more():
    pairs, active = Layout(np.array([[0, 1, 0, 2]]), 2, 3).loads(np.array([[5, 1, 4]]))
    assert pairs.tolist() == [[4, 6]] and active.tolist() == [[2, 2]]


def test_experts_that_a_gpu_must_receive():
    before, after = Layout(contiguous(1, 4), 2, 4), Layout(np.array([[2, 1, 0, 3]]), 2, 4)
    assert before.moved(after) == 1 and before.moved(before) == 0


def test_parallel_refuses_what_means_nothing():
    with pytest.raises(PolicyError, match="unknown 'tensr'"):
        Parallel(attention="tensr")
    with pytest.raises(PolicyError, match=r"set parallel\.experts=expert"):
        Parallel(placement="balanced")
    with pytest.raises(PolicyError, match="go with"):
        Parallel(experts="expert", interval=5)
    with pytest.raises(PolicyError, match="more than the"):
        exact(np.ones((1, 512)), 32)
    assert Parallel("data", "expert", "balanced", None).slots(256, 8) == 288
    assert Parallel("data", "expert", "balanced", None).slots(8, 8) == 16
