"""Predictors that learn from earlier requests, on traces small enough to compute by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PolicyError
from moesim.prediction import ExpertMaps, RequestCounts
from tests.conftest import small_trace
from tests.fakes import make_trace


def with_maps(maps, requests):
    """A trace whose router says `maps` [tokens, layers, experts] and takes the first of each."""
    maps = np.asarray(maps, dtype=np.float16)
    trace = make_trace(maps.argmax(axis=2)[:, :, None], maps.shape[2], requests)
    return replace(trace, probabilities=maps)


ONE = [(0, 1)]
PAST = [[1, 0, 0, 0], [0.5, 0.3, 0.2, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(
    ("now", "named"),
    [
        ([1, 0, 0, 0], [0]),  # the same: delta 0, so k = 1 expert
        ([0.6, 0.8, 0, 0], [0]),  # cosine 0.6: 0.5 reaches delta 0.4
        ([0.3, 0.954, 0, 0], [0, 1]),  # cosine 0.3: 0.5 + 0.3 reaches delta 0.7
        ([0, 1, 0, 0], [0, 1, 2]),  # nothing alike: delta 1, all that have any probability
    ],
)
def test_expert_maps_name_experts_until_their_sum_reaches_one_minus_the_similarity(now, named):
    trace = with_maps([PAST, [now, PAST[1], PAST[2]]], ONE * 2)
    _, far = ExpertMaps(distance=1).predict(trace, 0)
    assert far.distance == 1
    assert far.experts[1, 1].tolist() == named + [-1] * (4 - len(named))
    np.testing.assert_allclose(far.map[1, 1], PAST[1], atol=1e-3)
    assert (far.experts[0] == -1).all(), "the first request has nothing to learn from"
    assert (far.experts[:, 0] == -1).all(), "the first d layers are the semantic search's"


def test_expert_maps_follow_the_trajectory_and_not_the_last_layer_alone():
    """Two past maps agree on layer 1; layer 0 tells them apart, and with them what comes in layer 2."""
    a, b = np.eye(4)[[0, 2, 0]], np.eye(4)[[1, 2, 3]]
    _, far = ExpertMaps(distance=1).predict(with_maps([a, b, a, b], ONE * 4), 0)
    assert far.experts[2, 2].tolist() == [0, -1, -1, -1]
    assert far.experts[3, 2].tolist() == [3, -1, -1, -1]


def test_expert_maps_search_by_the_token_before_for_the_first_layers():
    """Expert 0 is followed by expert 1, expert 2 by expert 3."""
    rows = [np.eye(4)[[e, e]] for e in (0, 1, 2, 3, 0, 1, 2, 3)]
    near, _ = ExpertMaps(distance=1).predict(with_maps(rows, [(0, 2)] * 4), 0)
    assert near.distance == 0
    assert near.experts[5, 0, 0] == 1 and near.experts[7, 0, 0] == 3
    assert (near.experts[:, 1] == -1).all(), "only the first d layers are named"


def test_a_full_store_overwrites_its_most_redundant_map():
    """The third map is nearly the first one, so the first one goes and the second one stays."""
    first, other, third = np.eye(4)[[0, 0, 0]], np.eye(4)[[1, 1, 1]], np.eye(4)[[0, 0, 3]]
    trace = with_maps([first, other, third, first, other], ONE * 5)
    _, far = ExpertMaps(distance=1, store=2).predict(trace, 0)
    assert far.experts[3, 2, 0] == 3
    assert far.experts[4, 2, 0] == 1


def test_offline_maps_learn_from_the_first_requests_and_believe_nothing_of_them():
    trace = with_maps([PAST] * 10, ONE * 10)
    near, far = ExpertMaps(distance=1, offline=True).predict(trace, 0)
    assert (far.experts[:7] == -1).all() and (near.experts[:7] == -1).all()
    assert (far.experts[7:, 2, 0] == 2).all()


def test_without_probabilities_maps_hold_what_was_chosen_and_results_say_so():
    trace = make_trace([[[0, 1], [2, 3]], [[0, 1], [3, 1]]], 4, ONE * 2)
    _, far = ExpertMaps(distance=1).predict(trace, 0)
    assert set(far.experts[1, 1].tolist()) == {2, 3, -1}
    assert far.map[1, 1].tolist() == [0, 0, 0.5, 0.5]
    assert any("probabilities" in note for note in ExpertMaps().notes(trace))
    assert not any("probabilities" in note for note in ExpertMaps().notes(small_trace(weights=True)))


def test_request_counts_believe_the_nearest_request():
    """Request 2 begins like request 1, which chose expert 1 twice and expert 3 once in layer 1."""
    ids = [[[0], [0]], [[0], [0]], [[0], [0]], [[2], [1]], [[2], [1]], [[2], [3]], [[2], [1]], [[0], [0]]]
    trace = make_trace(ids, 4, [(0, 3), (0, 3), (0, 2)])
    (beliefs,) = RequestCounts().predict(trace, 0)
    assert beliefs.distance == 0
    assert (beliefs.experts[6] == -1).all(), "nothing is known of a request before its first token"
    assert beliefs.experts[7].tolist() == [[2, -1, -1, -1], [1, 3, -1, -1]]
    np.testing.assert_allclose(beliefs.map[7, 1], [0, 2 / 3, 0, 1 / 3], atol=1e-3)
    assert (beliefs.experts[:3] == -1).all()


def test_request_counts_use_the_prompt_and_forget_the_least_picked():
    ids = [[[0]], [[0]], [[1]], [[1]], [[0]], [[0]], [[0]], [[1]], [[1]]]
    trace = make_trace(ids, 4, [(1, 1), (1, 1), (1, 2), (1, 1)])
    (both,) = RequestCounts(store=2).predict(trace, 0)
    assert both.experts[5, 0, 0] == 0, "the prompt alone tells which request this is like"
    assert both.experts[8, 0, 0] == 0, "request 1, never picked, made room for request 2"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, 29), st.booleans(),
    st.sampled_from([ExpertMaps(distance=1), ExpertMaps(distance=2, store=5), RequestCounts(store=2)]),
)  # fmt: skip
def test_learned_predictors_know_no_layer_before_its_time(seed, cut, whole, predictor):
    """A token's own routing changes only what is believed `distance` layers later, and no earlier token."""
    trace = small_trace(requests=6, tokens=30, weights=whole)
    other = np.random.default_rng(seed).permutation(30)
    for layer in range(3):
        experts, maps = trace.experts.copy(), None if trace.probabilities is None else trace.probabilities.copy()
        experts[cut + 1 :], experts[cut, layer:] = trace.experts[other][cut + 1 :], trace.experts[other][cut, layer:]
        if maps is not None:
            maps[cut + 1 :] = trace.probabilities[other][cut + 1 :]
            maps[cut, layer:] = trace.probabilities[other][cut, layer:]
        changed = replace(trace, experts=experts, probabilities=maps)
        for before, after in zip(predictor.predict(trace, 0), predictor.predict(changed, 0), strict=True):
            same = slice(None) if not before.distance else slice(0, layer + before.distance)
            np.testing.assert_array_equal(before.experts[:cut], after.experts[:cut])
            np.testing.assert_array_equal(before.experts[cut, same], after.experts[cut, same])
            np.testing.assert_array_equal(before.map[:cut], after.map[:cut])
            np.testing.assert_array_equal(before.map[cut, same], after.map[cut, same])


@pytest.mark.parametrize(
    "make", [lambda: ExpertMaps(distance=0), lambda: ExpertMaps(store=0), lambda: RequestCounts(store=0)]
)
def test_sizes_are_checked(make):
    with pytest.raises(PolicyError, match="at least 1"):
        make()
