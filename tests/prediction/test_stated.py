"""Predictors of a stated accuracy: right as often as they say, at the precision they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import PolicyError
from moesim.policies import HIGH, LOW, precision_levels
from moesim.prediction import Oracle, StackedGates, WholeLayer
from tests.fakes import make_trace
from tests.scenes import random_trace


def right(named, trace):
    return (named[:, :, :, None] == trace.experts[:, :, None, :]).any(axis=3) & (named >= 0)


@pytest.mark.parametrize(("recall", "precision"), [(1.0, 0.5), (0.8, 0.4), (0.9, 0.95), (0.5, 0.5)])
def test_an_oracle_has_the_recall_and_the_precision_it_is_given(recall, precision):
    trace = random_trace(3000, 2, 16, 2, 0)
    (beliefs,) = Oracle(recall, precision=precision).predict(trace, 0)
    hits, names = right(beliefs.experts, trace).sum(), (beliefs.experts >= 0).sum()
    assert hits / trace.experts.size == pytest.approx(recall, abs=0.02)
    assert hits / names == pytest.approx(precision, abs=0.02)
    ordered = np.sort(beliefs.experts, axis=2)
    assert ((ordered[:, :, 1:] != ordered[:, :, :-1]) | (ordered[:, :, 1:] < 0)).all(), "named experts are distinct"
    assert Oracle(recall, precision=precision).provenance == "assumed"


def test_a_precision_that_needs_more_experts_than_there_are_is_refused():
    with pytest.raises(PolicyError, match="only 6 experts"):
        Oracle(precision=0.1).predict(random_trace(4, 1, 8, 2, 0), 0)
    for bad in ({"precision": 0.0}, {"precision": 1.5}, {"recall": 0.0, "precision": 0.5}):
        with pytest.raises(PolicyError, match="precision"):
            Oracle(**bad)


def test_stacked_gates_are_right_as_often_as_stated_at_each_distance():
    trace = random_trace(3000, 3, 16, 2, 0)
    beliefs = StackedGates((0.96, 0.8)).predict(trace, 0)
    assert [b.distance for b in beliefs] == [1, 2]
    for belief, accuracy in zip(beliefs, (0.96, 0.8), strict=True):
        assert right(belief.experts, trace).mean() == pytest.approx(accuracy, abs=0.02)
    assert StackedGates().provenance == "assumed"


def test_an_accuracy_table_is_read_at_the_same_relative_depth():
    trace = random_trace(3000, 3, 16, 2, 0)
    (belief,) = StackedGates((1.0,), by_layer=(0.2, 1.0)).predict(trace, 0)
    np.testing.assert_allclose(right(belief.experts, trace).mean(axis=(0, 2)), [0.2, 0.6, 1.0], atol=0.03)


def test_gates_name_the_precision_that_the_miss_rule_will_ask_for():
    """Ids from `experts` on are low-precision copies; what will be skipped is not named."""
    weights = -np.sort(-np.random.default_rng(0).random((50, 3, 2)), axis=2)
    trace = replace(random_trace(50, 3, 8, 2, 0), weights=weights.astype(np.float16))
    thresholds = (0.6, 0.8)
    (belief,) = StackedGates((1.0,), levels=thresholds).predict(trace, 0)
    seen = set()
    for row in range(50):
        levels = precision_levels(trace.weights[row, 0].astype(float).tolist(), thresholds)
        for chosen, named, level in zip(trace.experts[row, 0], belief.experts[row, 0], levels, strict=True):
            assert named == (chosen if level == HIGH else chosen + 8 if level == LOW else -1)
            seen.add(level)
    assert len(seen) == 3, "all three levels occur"


def test_gates_may_leave_prompts_out():
    trace = random_trace(20, 2, 8, 2, 0, prompt=5)
    (belief,) = StackedGates((1.0,), decode_only=True).predict(trace, 0)
    assert (belief.experts[:5] == -1).all() and (belief.experts[5:] >= 0).all()


def test_an_unused_rank_is_never_named():
    trace = make_trace([[[0, -1]], [[2, -1]]], 4)
    trace = replace(trace, weights=np.full(trace.experts.shape, 0.5, dtype=np.float16))
    (belief,) = StackedGates((1.0,), levels=(0.6, 0.9)).predict(trace, 0)
    assert belief.experts.tolist() == [[[0, -1]], [[2, -1]]]


def test_a_layer_agnostic_engine_wants_the_whole_next_layer():
    (belief,) = WholeLayer().predict(random_trace(3, 2, 4, 1, 0), 0)
    assert belief.experts.shape == (3, 2, 4) and belief.distance == 1 and belief.wraps
    assert belief.experts[2, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("make", [lambda: StackedGates(()), lambda: StackedGates((1.2,))])
def test_accuracies_are_shares(make):
    with pytest.raises(PolicyError, match="accuracy"):
        make()
