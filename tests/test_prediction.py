"""Predictors learn what there is to learn, and only that."""

from __future__ import annotations

import numpy as np

from moesim.prediction import History, NoPrediction, Oracle, Transitions
from tests.fakes import make_trace
from tests.scenes import random_trace


def test_transitions_learn_a_fixed_successor():
    """Expert e is always followed by e + 1 in the next layer, and by e again in the next token."""
    first = np.array([t % 4 for t in range(40)])
    ids = np.stack([first, (first + 1) % 4], axis=1)[:, :, None]
    (beliefs,) = Transitions(block=8).predict(make_trace(ids, 4), 0)
    np.testing.assert_array_equal(beliefs.experts[8:, 1], ids[8:, 1])
    assert (beliefs.experts[:8] == -1).all(), "nothing is known during the first block"
    assert beliefs.distance == 1 and beliefs.wraps


def test_transitions_across_tokens_stay_within_a_request():
    ids = np.zeros((6, 2, 1), dtype=int)
    (beliefs,) = Transitions(block=1).predict(make_trace(ids, 4, [(0, 3), (0, 3)]), 0)
    assert beliefs.experts[3, 0, 0] == -1, "the first token of a request follows nothing"
    assert beliefs.experts[4, 0, 0] == 0


def test_no_prediction_is_nothing():
    assert NoPrediction().predict(random_trace(4, 1, 4, 1, 0), 0) == ()


def test_a_spoilt_oracle_is_seeded_and_says_that_it_is_assumed():
    trace = random_trace(50, 2, 8, 2, 0)
    one, two = (Oracle(recall=0.5).predict(trace, seed)[0].experts for seed in (1, 1))
    np.testing.assert_array_equal(one, two)
    assert (Oracle(recall=0.5).predict(trace, 2)[0].experts != one).any()
    assert Oracle(recall=0.5).provenance == "assumed" and Oracle().provenance == "oracle"


def test_an_oracle_of_no_recall_names_only_wrong_experts():
    trace = random_trace(50, 2, 8, 2, 0)
    named = Oracle(recall=0.0).predict(trace, 0)[0].experts
    assert not (named[:, :, :, None] == trace.experts[:, :, None, :]).any()


def test_a_plan_weighs_tasks_by_their_tokens():
    trace = make_trace([[[0]], [[1]]], 4, [(1, 0), (1, 0)], tasks=["a", "b"])
    history = History(trace)
    assert history.plan([("a", 1.0)]) is None
    history.observe("a", np.array([0]))
    history.observe("b", np.array([1]))
    np.testing.assert_allclose(history.plan([("a", 10.0), ("b", 5.0)]), [[10, 5, 0, 0]])
    np.testing.assert_allclose(history.plan([("new", 2.0)]), [[0, 2, 0, 0]])
