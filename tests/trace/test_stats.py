"""Statistics against known answers, brute force and chance levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moesim.errors import TraceError
from moesim.model import load_model
from moesim.trace import Trace
from moesim.trace.cut import cut
from moesim.trace.importers import import_trace
from moesim.trace.io import read
from moesim.trace.locality import (
    chance_reuse,
    place_in_request,
    same_request_reuse,
    stack_distances,
    token_gaps,
)
from moesim.trace.stats import describe, popularity_skew, random_halves
from moesim.trace.summary import cache_sizes, compare, headline, text, verdict
from tests.fakes import make_trace
from tests.oracle import events_of, misses
from tests.scenes import random_trace


@pytest.fixture(scope="module")
def gpt_oss(public_data) -> Trace:
    """The first requests of recorded gpt-oss-20b routing: 24 layers, top-4 of 32, decode only."""
    path = public_data / "routing_gptoss20b" / "all_ids_nonrep.npz"
    return cut(import_trace("numpy", path, load_model("gpt-oss-20b"), phase="decode"), requests=40)


@st.composite
def choices(draw) -> tuple[np.ndarray, int]:
    """Distinct experts per token, [tokens, k], the last ranks sometimes unused; and the number of experts."""
    experts = draw(st.integers(1, 9))
    k = draw(st.integers(1, experts))
    scores = draw(hnp.arrays(np.float64, (draw(st.integers(1, 40)), experts), elements=st.floats(0, 1)))
    ids = np.argsort(-scores, axis=1)[:, :k].astype(np.int16)
    used = draw(hnp.arrays(np.int8, len(ids), elements=st.integers(1, k)))
    ids[np.arange(k) >= used[:, None]] = -1
    return ids, experts


@given(choices())
@settings(max_examples=200, deadline=None)
def test_stack_distances_give_the_misses_of_every_lru_cache(drawn):
    ids, experts = drawn
    distances = stack_distances(ids, experts)[ids >= 0]
    events = [[int(e) for e in token if e >= 0] for token in ids]
    for capacity in range(ids.shape[1], experts + 1):
        assert (distances >= capacity).sum() == misses(events, capacity, "LRU")


def test_stack_distances_by_hand():
    ids = np.array([[0, 1], [1, 2], [0, 3]], dtype=np.int16)
    # Token 1: of 0 then 1, 1 was touched last. Token 2: 0 was touched before 1, 1 and 2.
    assert stack_distances(ids, 4).tolist() == [[4, 4], [0, 4], [2, 4]]


@given(choices())
@settings(deadline=None)
def test_token_gaps(drawn):
    ids, _ = drawn
    gaps = token_gaps(ids)
    for t, token in enumerate(ids):
        for rank, expert in enumerate(token):
            earlier = [t - s for s in range(t) if expert in ids[s]]
            assert expert < 0 or gaps[t, rank] == (min(earlier) if earlier else len(ids) + 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_places_and_halves(sizes):
    request = np.repeat(np.arange(len(sizes)), sizes)
    assert place_in_request(request).tolist() == [i for size in sizes for i in range(size)]
    half = random_halves(request, np.random.default_rng(0))
    counts = np.bincount(request * 2 + half, minlength=2 * len(sizes)).reshape(-1, 2)
    assert (np.abs(np.diff(counts, axis=1)) <= 1).all()


def test_skew_of_flat_and_of_known_popularity():
    flat = popularity_skew(np.full((1, 20), 7))
    assert flat.top_share["25%"] == pytest.approx(0.25)
    assert (flat.entropy[0], flat.gini[0], flat.zipf[0]) == pytest.approx((1, 0, 0))
    rank = np.arange(1, 65)
    zipf = popularity_skew(np.round(1e6 * rank**-1.3).astype(int)[None])
    assert zipf.zipf[0] == pytest.approx(1.3, abs=0.01)
    one = popularity_skew(np.array([[9, 0, 0, 0]]))
    assert (one.entropy[0], one.gini[0], one.top_share["25%"][0]) == pytest.approx((0, 0.75, 1))


def test_reuse_of_alternating_tokens():
    ids = np.tile([[[0, 1]], [[2, 3]]], (20, 1, 1))
    stats = describe(make_trace(ids, 8, [(0, 20), (0, 20)]))
    assert stats.reuse.within[1] == pytest.approx(0)
    assert stats.reuse.within[2] == pytest.approx(1)
    assert stats.lru.miss_ratio[0, 0] == 1  # two slots: every token throws the other's experts out
    assert stats.lru.miss_ratio[0, 2] == pytest.approx(4 / 80)  # four slots: only the first uses
    assert stats.lru.static[0, 2] == 0


def test_reuse_looks_no_further_than_the_request():
    ids = np.zeros((6, 1, 1), dtype=int)
    stats = describe(make_trace(ids, 4, [(0, 1)] * 6))
    assert np.isnan(stats.reuse.within[1][0]), "no token has a predecessor in its own request"
    assert stats.lru.miss_ratio[0, 0] == pytest.approx(1 / 6), "but the cache is kept from request to request"


def test_independent_tokens_have_the_chance_level():
    trace = random_trace(20_000, 2, 16, 3, seed=3, requests=10)
    stats = describe(trace)
    for window, share in stats.reuse.within.items():
        assert share == pytest.approx(stats.reuse.chance[window], abs=0.02)
    assert stats.reuse.same_request == pytest.approx(stats.reuse.chance[1], abs=0.02)
    found = stats.predictability
    assert found.from_layer == pytest.approx(found.from_popularity, abs=0.03)
    assert stats.unique.mean == pytest.approx(stats.unique.independent, rel=0.03)


def test_chance_of_uniform_popularity():
    assert chance_reuse(np.full((1, 8), 10), 40)[1] == pytest.approx(2 / 8)
    assert chance_reuse(np.full((1, 8), 10), 40)[2] == pytest.approx(1 - (1 - 2 / 8) ** 2)


def test_same_request_reuse_is_the_chance_over_other_tokens():
    ids = random_trace(30, 1, 6, 2, seed=4).experts
    request = np.repeat([0, 1, 2], [4, 1, 25])
    chances = []
    for token in range(30):
        others = [other for other in np.flatnonzero(request == request[token]) if other != token]
        if others:  # the second request's only token has none
            chances.append(np.mean([np.isin(ids[token, 0], ids[other, 0]).mean() for other in others]))
    assert same_request_reuse(ids, request, 6)[0] == pytest.approx(np.mean(chances))


def test_unique_experts():
    same = describe(make_trace(np.tile([[[1, 2]]], (32, 1, 1)), 16, [(0, 4)] * 8)).unique
    assert same.batches.tolist() == [1, 2, 4, 8], "no batch beyond the number of requests"
    assert same.mean.tolist() == [[2, 2, 2, 2]]
    apart = np.repeat(np.arange(8), 4)[:, None, None] * 2 + [0, 1]
    assert describe(make_trace(apart, 16, [(0, 4)] * 8)).unique.mean.tolist() == [[2, 4, 8, 16]]


def test_a_layer_that_decides_the_next_is_predictable():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 12, 2000)
    ids = np.stack([first, (5 * first + 1) % 12, rng.integers(0, 12, 2000)], axis=1)[:, :, None]
    found = describe(make_trace(ids, 12, [(0, 100)] * 20)).predictability
    assert found.from_layer[0] == 1
    assert found.from_popularity[0] < 0.2
    assert found.from_layer[1] < 0.2


def test_tasks_with_experts_of_their_own():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 4, (2000, 2, 1)) + np.repeat([0, 4] * 10, 100)[:, None, None]
    tasks = describe(make_trace(ids, 8, [(0, 100)] * 20, ["a", "b"] * 10)).tasks
    assert tasks.names == ("a", "b")
    assert tasks.requests.tolist() == [10, 10]
    assert tasks.tokens.tolist() == [1000, 1000]
    assert tasks.distance == pytest.approx(np.array([[0, 1], [1, 0]]))
    assert tasks.noise.max() < 0.1
    assert tasks.explained > 0.9
    assert tasks.top_quarter == pytest.approx(0.5, abs=0.05)


def test_labels_without_meaning_explain_nothing():
    trace = random_trace(20_000, 2, 8, 2, seed=5, requests=200)
    labels = tuple("ab"[i % 2] for i in range(200))
    shuffled = make_trace(trace.experts, 8, [(0, 100)] * 200, labels)
    tasks = describe(shuffled).tasks
    assert tasks.explained == pytest.approx(0, abs=0.02)
    assert tasks.distance[0, 1] < 2 * tasks.noise.max()


def test_one_request_per_task_says_so():
    tasks = describe(make_trace(np.zeros((4, 1, 1), int), 4, [(0, 2), (0, 2)], ["a", "b"])).tasks
    assert np.isnan(tasks.explained)
    assert np.isnan(tasks.noise).all()


def test_prefill_against_decode():
    ids = np.concatenate([np.repeat([[[0]], [[1]]], 5, axis=0), np.full((10, 1, 1), 2)])
    trace = make_trace(np.concatenate([ids, ids]), 4, [(10, 10), (10, 10)])
    stats = describe(trace)
    assert (stats.phase, stats.tokens) == ("decode", 20)
    assert stats.phases.distance.tolist() == [1]
    assert stats.phases.noise.tolist() == [0]
    assert stats.phases.prompt_experts.tolist() == [2]


def test_a_trace_of_prompts_is_described_by_them():
    stats = describe(make_trace(np.zeros((6, 1, 1), int), 4, [(3, 0), (3, 0)]))
    assert (stats.phase, stats.tokens, stats.phases) == ("prefill", 6, None)


def test_unused_ranks_count_nowhere():
    ids = np.tile([[[0, -1], [1, 2]]], (40, 1, 1))
    stats = describe(make_trace(ids, 8, [(0, 10)] * 4))
    assert stats.popularity[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert stats.reuse.within[1] == pytest.approx(1)
    assert stats.unique.mean[0].tolist() == [1, 1, 1]
    assert stats.lru.distances.sum(1).tolist() == [40, 80]
    assert stats.predictability.from_layer == pytest.approx(1)


def test_a_layer_without_choices_is_refused():
    ids = np.full((4, 2, 1), -1)
    ids[:, 0] = 1
    with pytest.raises(TraceError, match="layer 1 routes no decode token"):
        describe(make_trace(ids, 4))


def test_one_token_is_enough():
    stats = describe(make_trace(np.array([[[3, 1]]]), 4))
    assert stats.predictability is None
    assert stats.tasks is None
    assert "cacheable" in verdict(stats)
    assert "1 decode tokens" in text(stats)


def test_same_seed_same_numbers():
    trace = random_trace(2000, 2, 8, 2, seed=6, requests=20)
    assert headline(describe(trace, 3)) == headline(describe(trace, 3))


def test_comparison_with_itself():
    stats = describe(random_trace(500, 2, 8, 2, seed=7, requests=5))
    rows = compare(stats, stats)
    assert all(row["original"] == row["drawn"] for row in rows)
    assert {row["statistic"] for row in rows} >= set(headline(stats))


def test_the_shipped_trace(shipped):
    stats = describe(read(shipped))
    assert stats.reuse.within[1].mean() > 1.5 * stats.reuse.chance[1].mean()
    assert stats.predictability.from_layer.mean() > 2 * stats.predictability.from_popularity.mean()
    assert stats.tasks.distance[0, 1] > stats.tasks.noise.max()
    assert "Verdict: cacheable: somewhat" in text(stats)


def test_lru_curve_of_real_routing(gpt_oss):
    stats = describe(gpt_oss)
    events = events_of(gpt_oss.experts.tolist(), 11)
    for size, index in cache_sizes(stats):
        expected = misses(events, size, "LRU") / (4 * len(events))
        assert stats.lru.miss_ratio[11, index] == pytest.approx(expected, abs=1e-12)
    assert stats.reuse.within[1].mean() == pytest.approx(1 - stats.lru.miss_ratio[:, 0].mean(), abs=0.01)
    assert 0.3 < stats.reuse.within[1].mean() < 0.6
    assert stats.predictability.from_layer.min() > 1.5 * stats.predictability.from_popularity.mean()
