"""What transforms do to a model and its routing, counted by hand, and what always holds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PolicyError
from moesim.model import load_model
from moesim.trace.check import check
from moesim.transforms import (
    DynamicPruning,
    Merge,
    MixedBits,
    Prune,
    ReplacedRouter,
    SensitivityGating,
    SequenceGate,
    TaskExperts,
    apply_all,
    calibration_rows,
)
from moesim.transforms.bits import allocate
from moesim.transforms.gating import MIXTRAL_SENSITIVITY
from tests.fakes import make_trace
from tests.scenes import random_trace

MODEL = replace(load_model("mixtral-8x7b"), layers=3, moe_layers=(0, 1, 2), hidden=64, expert_ffn=128, experts=4)

# One layer's routing of six tokens: expert 0 four times, 1 three times, 2 three times, 3 twice.
CHOSEN = [[0, 1], [1, 0], [2, 0], [2, 3], [0, 2], [3, 1]]
ODDS = [
    [0.5, 0.3, 0.1, 0.1], [0.3, 0.6, 0.1, 0.0], [0.3, 0.0, 0.6, 0.1],
    [0.05, 0.15, 0.5, 0.3], [0.5, 0.1, 0.4, 0.0], [0.2, 0.25, 0.1, 0.45],
]  # fmt: skip


def micro(requests=((2, 4),), probabilities=True, weights=True, tasks=None):
    """Three equal layers of CHOSEN; weights are the chosen experts' odds, made to sum to one."""
    ids = np.repeat(np.array(CHOSEN)[:, None, :], 3, axis=1)
    odds = np.repeat(np.array(ODDS)[:, None, :], 3, axis=1)
    trace = make_trace(ids, 4, requests, tasks)
    shares = np.take_along_axis(odds, ids, axis=2)
    shares /= shares.sum(axis=2, keepdims=True)
    return replace(
        trace,
        weights=shares.astype(np.float16) if weights else None,
        probabilities=odds.astype(np.float16) if probabilities else None,
    )


def layer(trace, index=0):
    return trace.experts[:, index].tolist()


# -- prune and merge ----------------------------------------------------------------------------------------------


def test_pruning_sends_a_token_to_its_next_best_survivor():
    """Experts 0 and 1 stay; tokens keep their own survivors first, and fill up by probability."""
    done = Prune(2, keep=((0, 1),) * 3).apply(MODEL, micro(), 0)
    assert layer(done.trace) == [[0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    assert (done.model.experts, done.model.top_k, done.trace.info.experts) == (2, 2, 2)
    w = micro().weights.astype(float)[:, 0]
    moved = w[2, 0] + w[3].sum() + w[4, 1] + w[5, 0]  # tokens on 2 and 3
    assert done.altered["rerouted"] == pytest.approx(np.full((3, 1), moved / 6), rel=1e-3)
    assert not done.altered["skipped"].any()
    assert done.trace.weights[3, 0].astype(float) == pytest.approx([0.75, 0.25], abs=1e-3), "0.15 to 0.05"


def test_pruning_keeps_the_most_used_by_count_or_by_weight():
    """Counts are 4, 3, 3, 2; weights gathered are 1.87, 1.40, 1.74, 0.99."""
    trace = micro(((0, 6),))
    assert Prune(2, by="count").survivors(trace)[0].tolist() == [0, 1], "the lower of equals"
    assert Prune(2, by="soft").survivors(trace)[0].tolist() == [0, 2]


def test_without_probabilities_the_popular_take_over():
    """Survivors 0 (chosen most), 1 and 3: token [2, 3] keeps 3 and gets 0."""
    done = Prune(3, keep=((0, 1, 3),) * 3).apply(MODEL, micro(probabilities=False), 0)
    assert layer(done.trace)[3] == [2, 0], "expert 3 is now number 2"
    assert any("no gate probabilities" in note for note in done.notes)


def test_fewer_experts_per_token_drop_the_lowest_rank():
    done = Prune(4, top_k=1).apply(MODEL, micro(), 0)
    assert layer(done.trace) == [[first] for first, _ in CHOSEN]
    assert np.all(done.trace.weights == 1), "renormalised"
    assert done.altered["skipped"] == pytest.approx(
        micro().weights.astype(float)[:, :, 1].mean(axis=0)[:, None], rel=1e-3
    )
    assert done.model.top_k == done.trace.top_k == 1


def test_merging_serves_like_pruning_but_every_expert_is_new():
    pruned = Prune(2, top_k=1)
    a, b = pruned.apply(MODEL, micro(), 0), Merge(pruned).apply(MODEL, micro(), 0)
    assert np.array_equal(a.trace.experts, b.trace.experts) and a.model == b.model
    assert b.altered["merged"] == pytest.approx(1 - a.altered["skipped"])
    assert not b.altered["rerouted"].any()


@pytest.mark.parametrize(
    "prune", [Prune(5), Prune(2, top_k=3), Prune(4, top_k=0), Prune(2, keep=((0, 1),)), Prune(2, keep=((0, 4),) * 3)]
)
def test_pruning_that_makes_no_sense_is_refused(prune):
    with pytest.raises(PolicyError, match="prune"):
        prune.apply(MODEL, micro(), 0)


# -- bits ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 5), st.integers(0, 1 << 16), st.data())
def test_the_integer_program_is_optimal(experts, seed, data):
    """Against every assignment of 1, 2 or 3 bits to up to five experts."""
    costs = np.sort(np.random.default_rng(seed).random((experts, 3)), axis=1)[:, ::-1]
    budget = data.draw(st.integers(experts + 3, 3 * experts))
    allowed = [
        widths
        for widths in itertools.product((1, 2, 3), repeat=experts)
        if sum(widths) <= budget and 2 in widths and 3 in widths
    ]
    best = min(sum(costs[i, w - 1] for i, w in enumerate(widths)) for widths in allowed)
    found = allocate(costs, (1, 2, 3), budget)
    assert sum(found) <= budget and {2, 3} <= set(found.tolist())
    assert sum(costs[i, w - 1] for i, w in enumerate(found)) == pytest.approx(best, rel=1e-6)


def test_the_most_used_expert_gets_the_most_bits():
    done = MixedBits(2.0, other_bits=None).apply(MODEL, micro(((0, 6),)), 0)
    sizes = done.model.expert_sizes[0]
    assert sizes[0] == max(sizes) and sizes[3] == min(sizes), "phi and w rank the experts 0, 2, 1, 3"
    one_bit = MODEL.expert_params / 8
    assert sum(sizes) == pytest.approx((8 + 4 * 18 / 128) * one_bit, rel=1e-3), "8 bits in all, and scales"
    assert done.model.total_expert_bytes == 3 * sum(sizes)
    assert done.model.expert_bytes(0) == max(sizes) and done.model.expert_bytes(0, None, 3) == sizes[3]
    assert np.all(done.altered["lower_precision"] == 1)


def test_a_budget_that_cannot_be_met_is_refused():
    with pytest.raises(PolicyError, match="cannot be"):
        allocate(np.ones((4, 3)), (1, 2, 3), 6)


@pytest.mark.parametrize(("mean", "gb"), [(2.5, 16.24), (2.0, 13.41), (1.5, 10.82)])
def test_mixtral_at_the_bits_of_the_paper_has_its_bytes(mean, gb):
    """MC, table 4: memory of the compressed Mixtral-8x7B."""
    mixtral = load_model("mixtral-8x7b")
    trace = random_trace(40, 32, 8, 2, seed=0, requests=4)
    served = MixedBits(mean).apply(mixtral, trace, 0).model
    assert served.total_bytes / 1e9 == pytest.approx(gb, rel=0.04)


# -- fewer experts per token --------------------------------------------------------------------------------------


def test_odp_drops_below_the_median_ratio():
    """Ratios are 0.6, 0.5, 0.5, 0.6, 0.8, 0.556: the median is 0.578, so three second experts go."""
    done = DynamicPruning(protected=0, layers=1).apply(MODEL, micro(), 0)
    assert layer(done.trace) == [[0, 1], [1, -1], [2, -1], [2, 3], [0, 2], [3, -1]]
    assert done.trace.weights[1, 0].tolist() == [1, 0]
    assert done.altered["skipped"] == pytest.approx(np.full((3, 1), (1 / 3 + 1 / 3 + 0.357) / 6), rel=1e-2)


def test_odp_protects_prompt_tokens_and_spares_layers():
    everything = DynamicPruning(protected=1, layers=1).apply(MODEL, micro(((6, 0),)), 0)
    assert layer(everything.trace) == CHOSEN
    one = DynamicPruning(protected=0, layers=1 / 3).apply(MODEL, micro(), 0)
    assert [layer(one.trace, i) == CHOSEN for i in range(3)] == [False, True, True], "the first of equals"


def test_odp_on_20_of_32_layers_saves_the_papers_share_of_compute():
    """20/32 layers x half the tokens x one of two experts = 15.6 %; the paper reports 15 %."""
    trace = random_trace(400, 32, 8, 2, seed=1, requests=1)
    first = np.random.default_rng(0).uniform(0.5, 1, (400, 32))
    trace = replace(trace, weights=np.stack([first, 1 - first], axis=2).astype(np.float16))
    done = DynamicPruning(protected=0).apply(MODEL, trace, 0)
    assert (done.trace.experts < 0).mean() == pytest.approx(0.156, abs=0.003)


def test_gating_drops_by_sensitivity_in_decoding_only():
    """Limits are sqrt(0.01 / S) = 1, 0.4 and 0.1; second weights 0.375, 0.333, 0.333, 0.375, 0.444, 0.357."""
    done = SensitivityGating(0.01, (0.01, 0.0625, 1.0)).apply(MODEL, micro(), 0)
    assert layer(done.trace, 0) == CHOSEN[:2] + [[first, -1] for first, _ in CHOSEN[2:]], "two prompt tokens keep all"
    assert layer(done.trace, 1) == [[0, 1], [1, 0], [2, -1], [2, -1], [0, 2], [3, -1]]
    assert layer(done.trace, 2) == CHOSEN
    kept = (done.trace.experts[2:] >= 0).sum() / (4 * 3)
    dropped = (done.trace.experts[2:, :, 1] < 0).mean()
    assert kept == pytest.approx(2 - dropped), "SYSTEMS 14.6: a single-expert share of 0.259 leaves 1.74 experts"


def test_gating_drops_less_in_early_layers_as_the_released_lists_say():
    weights = np.random.default_rng(0).uniform(0, 0.5, (500, 32))
    trace = random_trace(500, 32, 8, 2, seed=1)
    trace = replace(trace, weights=np.stack([1 - weights, weights], axis=2).astype(np.float16))
    dropped = (SensitivityGating().apply(MODEL, trace, 0).trace.experts[:, :, 1] < 0).mean(axis=0)
    limits = np.sqrt(0.005 / np.array(MIXTRAL_SENSITIVITY))
    assert dropped == pytest.approx(np.minimum(limits / 0.5, 1), abs=0.06)
    half = random_trace(500, 16, 8, 2, seed=1)
    half = replace(half, weights=trace.weights[:, :16])
    assert "same relative depth" in SensitivityGating().apply(MODEL, half, 0).notes[0]


@pytest.mark.parametrize("rule", [DynamicPruning(), SensitivityGating()])
def test_rules_on_weights_refuse_a_trace_without_any(rule):
    with pytest.raises(PolicyError, match="gate weights"):
        rule.apply(MODEL, micro(weights=False), 0)


# -- one expert per sequence or task ------------------------------------------------------------------------------


def test_a_sequence_merges_the_experts_of_its_prompt():
    """Prompt rows 0, 1 and 3, 4: mean odds choose 1 and 0, then 2 and 0 (0.9 and 0.55)."""
    trace = micro(((2, 1), (2, 1)))
    done = SequenceGate(k=2, sequences=2).apply(MODEL, trace, 0)
    assert layer(done.trace) == [[4, 1, 0], [4, -1, -1], [4, -1, -1], [5, 2, 0], [5, -1, -1], [5, -1, -1]]
    assert (done.model.experts, done.model.top_k, done.sequences) == (6, 1, 2)
    w = trace.weights.astype(float)[:, 0]
    inside = w[0].sum() + w[1].sum() + w[2, 1] + w[3, 0] + w[4].sum()
    assert done.altered["merged"] == pytest.approx(np.full((3, 1), inside / 6), rel=1e-3)
    assert done.altered["merged"] + done.altered["rerouted"] == pytest.approx(np.ones((3, 1)))


def test_sequences_share_buffers_once_all_are_used():
    done = SequenceGate(k=1, sequences=2).apply(MODEL, micro(((1, 1), (1, 1), (1, 1))), 0)
    assert done.trace.experts[:, 0, 0].tolist() == [4, 4, 5, 5, 4, 4]


def test_tasks_merge_once_each():
    done = SequenceGate(k=2, level="task").apply(MODEL, micro(((1, 1), (1, 1), (1, 1)), tasks=["a", "b", "a"]), 0)
    assert done.trace.experts[:, 0, 0].tolist() == [4, 4, 5, 5, 4, 4]
    assert (done.trace.experts[:, 0, 1] >= 0).tolist() == [True, False, True, False, False, False]
    with pytest.raises(PolicyError, match="task labels"):
        SequenceGate(level="task").apply(MODEL, micro(), 0)


def test_a_task_keeps_its_most_proficient_expert():
    """Rows 0 to 2 are task a's: expert 0 has the hits (3 of 6), and 0.625 + 0.333 + 0.333 of the weight."""
    done = TaskExperts().apply(MODEL, micro(((0, 3), (0, 3)), tasks=["a", "b"]), 0)
    assert layer(done.trace) == [[0], [0], [0], [1], [1], [1]]
    assert (done.model.experts, done.model.top_k) == (2, 1)
    alone = TaskExperts().apply(MODEL, micro(), 0)
    assert alone.model.experts == 1 and alone.model.total_expert_bytes * 4 == MODEL.total_expert_bytes
    trace = micro()
    w = trace.weights.astype(float)[:, 0]
    kept = w[0, 0] + w[1, 1] + w[2, 1] + w[4, 0]
    assert alone.altered["rerouted"] == pytest.approx(np.full((3, 1), (w[3, 0] + w[5, 0]) / 6), rel=1e-3)
    assert 1 - sum(alone.altered.values()) == pytest.approx(np.full((3, 1), kept / 6), rel=1e-3)


# -- the router replaced ------------------------------------------------------------------------------------------


def test_a_perfect_hash_names_the_first_choices():
    done = ReplacedRouter(1, accuracy=1).apply(MODEL, micro(), 0)
    assert layer(done.trace) == [[first] for first, _ in CHOSEN]
    assert done.altered["skipped"] == pytest.approx(
        micro().weights.astype(float)[:, :, 1].mean(axis=0)[:, None], rel=1e-3
    )
    three = ReplacedRouter(3, accuracy=1).apply(MODEL, micro(), 0)
    assert layer(three.trace)[3] == [2, 3, 1], "the chosen two, then the next best"
    assert three.trace.weights[0, 0].tolist() == [0.5, 0.25, 0.25]
    assert not three.altered["skipped"].any() and not three.altered["rerouted"].any()


def test_a_hash_is_right_as_often_as_stated():
    trace = random_trace(3000, 2, 8, 1, seed=0)
    named = ReplacedRouter(1, accuracy=0.9).apply(MODEL, trace, 0)
    assert (named.trace.experts == trace.experts).mean() == pytest.approx(0.9, abs=0.02)
    assert named.altered["rerouted"].mean() == pytest.approx(0.1, abs=0.02)
    three = ReplacedRouter(3, accuracy=0.9).apply(MODEL, trace, 0).trace.experts
    assert (three == trace.experts).any(axis=2).mean() == pytest.approx(0.9, abs=0.02)


# -- what always holds --------------------------------------------------------------------------------------------

ALL = (
    Prune(2), Prune(2, top_k=1, by="soft"), Merge(Prune(2)), MixedBits(2.5), DynamicPruning(), SensitivityGating(),
    SequenceGate(2), TaskExperts(), ReplacedRouter(1), ReplacedRouter(2),
)  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(ALL), st.booleans(), st.integers(0, 99))
def test_transforms_keep_tokens_and_make_a_trace_that_passes_the_check(transform, probabilities, seed):
    trace = random_trace(24, 3, 4, 2, seed=seed, requests=3, prompt=3)
    odds = np.random.default_rng(seed).dirichlet(np.ones(4), (24, 3))
    order = -np.sort(-np.take_along_axis(odds, trace.experts.astype(int), axis=2), axis=2)
    shares = (order / order.sum(axis=2, keepdims=True)).astype(np.float16)
    trace = replace(trace, weights=shares, probabilities=odds.astype(np.float16) if probabilities else None)
    done = transform.apply(MODEL, trace, seed)
    check(done.trace, "transformed")
    assert done.trace.request is trace.request and done.trace.phase is trace.phase and done.trace.tokens == 24
    assert done.trace.info.experts == done.model.experts
    assert done.trace.weights.sum(axis=2, dtype=float) == pytest.approx(np.ones((24, 3)), abs=4e-3)
    shares = 1 - sum(done.altered.values())
    assert all(a.shape == (3, 1) and (a >= 0).all() for a in done.altered.values()) and (shares > -1e-9).all()
    again = transform.apply(MODEL, trace, seed)
    assert np.array_equal(again.trace.experts, done.trace.experts) and again.model == done.model


@pytest.mark.parametrize("transform", [Prune(2), MixedBits(2.5), DynamicPruning(0), TaskExperts()])
def test_only_the_first_tenth_of_the_requests_decides(transform):
    """Changing every later request changes nothing that is decided before serving."""
    trace = random_trace(200, 3, 4, 2, seed=0, requests=20, prompt=3)
    weights = np.broadcast_to(np.array([0.7, 0.3]), trace.experts.shape).astype(np.float16)
    rng = np.random.default_rng(0)
    weights = weights + np.array([1, -1]) * rng.uniform(-0.1, 0.2, (200, 3, 1))
    trace = replace(trace, weights=weights.astype(np.float16))
    later = calibration_rows(trace).stop
    changed = trace.experts.copy()
    changed[later:] = (changed[later:] + 1) % 4
    other = replace(trace, experts=changed)
    a, b = transform.apply(MODEL, trace, 0), transform.apply(MODEL, other, 0)
    assert a.model == b.model
    assert np.array_equal(a.trace.experts[:later], b.trace.experts[:later])


def test_shares_are_told_task_by_task():
    """Expert 3 goes: task a (tokens 0 to 2) never chose it, task b has the weights 0.375 and 0.643 of 3 on it."""
    done = Prune(3, keep=((0, 1, 2),) * 3).apply(MODEL, micro(((0, 3), (0, 3)), tasks=["a", "b"]), 0)
    assert done.altered["rerouted"] == pytest.approx(np.tile([0, (0.375 + 0.643) / 3], (3, 1)), rel=2e-3)


def test_transforms_in_a_row_count_each_weight_once():
    done = apply_all((MixedBits(2.5), DynamicPruning(0, 1)), MODEL, micro(), 0)
    alone = DynamicPruning(0, 1).apply(MODEL, micro(), 0)
    assert done.altered["skipped"] == pytest.approx(alone.altered["skipped"])
    assert done.altered["lower_precision"] == pytest.approx(1 - alone.altered["skipped"])
    assert done.model.expert_sizes is not None and len(done.notes) > len(alone.notes)
    after = apply_all((Prune(4, top_k=1), MixedBits(2.5)), MODEL, micro(), 0)
    assert sum(after.altered.values()) == pytest.approx(np.ones((3, 1)))
