"""Routing fidelity, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.metrics import routing_fidelity
from moesim.policies import Misses, Placement
from moesim.systems import System, load_system
from moesim.trace import WEIGHT_ONE
from moesim.transforms import Prune
from moesim.workload import from_trace
from tests.fakes import make_trace
from tests.scenes import serve
from tests.test_transforms import MODEL, micro

# Task a chooses experts 0 and 1, task b experts 0 and 2, two tokens each; 0 and 1 are resident, so b loses 2.
TRACE = replace(
    make_trace([[[0, 1]], [[0, 1]], [[0, 2]], [[0, 2]]], 4, [(0, 2), (0, 2)], ["a", "b"]),
    weights=np.array([[[0.75, 0.25]], [[0.75, 0.25]], [[0.5, 0.5]], [[0.75, 0.25]]], dtype=np.float16),
)
SKIPPING = System("skipping", misses=Misses("skip"), placement=Placement("hot"))


def test_what_is_skipped_counts_for_its_task():
    out = serve(TRACE, SKIPPING, 2)
    assert out.counts.altered[:, 0].tolist() == [[0, 0], [0, 0], [0, 0.75 * WEIGHT_ONE]]
    told = routing_fidelity(TRACE, TRACE, from_trace(TRACE), out.counts)
    assert told["overall"] == {
        "exact": 1 - 0.75 / 4, "lower_precision": 0, "rerouted": 0, "merged": 0, "skipped": 0.75 / 4
    }  # fmt: skip
    assert told["by_layer"]["skipped"] == [0.75 / 4]
    assert [told["by_task"][task]["skipped"] for task in "ab"] == [0, 0.75 / 2]


def test_what_was_skipped_before_serving_cannot_be_skipped_again():
    """Top-1 leaves each token its first expert's weight; a cache of expert 0 alone then skips all other tokens."""
    trace = micro()
    done = Prune(4, top_k=1).apply(MODEL, trace, 0)
    out = serve(done.trace, SKIPPING, 1)
    told = routing_fidelity(trace, done.trace, from_trace(trace), out.counts, done.altered)
    before, during = 1 - done.altered["skipped"], (done.trace.experts[:, :, 0] == 0).mean()
    assert told["overall"]["exact"] == pytest.approx(before.mean() * during)
    assert told["overall"]["skipped"] == pytest.approx(1 - before.mean() * during)
    assert sum(told["overall"].values()) == pytest.approx(1)


def test_weights_are_whole_numbers_whatever_the_trace_keeps():
    assert TRACE.routed_weight(0)[2:].tolist() == [[WEIGHT_ONE // 2] * 2, [WEIGHT_ONE * 3 // 4, WEIGHT_ONE // 4]]
    bare = make_trace([[[0, 1, 2]], [[3, 1, -1]]], 4)
    assert bare.routed_weight(0).tolist() == [[5592405] * 3, [WEIGHT_ONE // 2] * 2 + [0]]


def test_a_batch_of_requests_alters_no_more_than_was_routed():
    for policy in ("HOBBIT(thresholds=(0.3, 0.5))", "eMoE(period=1)"):
        trace = micro(((1, 2), (1, 2)), tasks=["a", "b"])
        out = serve(trace, load_system(policy), 2, concurrency=2)
        routed = np.stack([trace.routed_weight(layer).sum(axis=1).reshape(2, 3).sum(axis=1) for layer in range(3)])
        assert out.counts.altered.any() and (out.counts.altered.sum(axis=0) <= routed).all()
