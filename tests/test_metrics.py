"""Routing fidelity and queues, counted by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from moesim.metrics import QUEUE, queue_depth, queue_metrics, routing_fidelity
from moesim.policies import Misses, Placement
from moesim.records import Records
from moesim.run_report import figures as run_figures
from moesim.run_report import read_summary
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


def test_queue_depth_by_hand():
    """Three requests: one served at once, two that wait for it, one of them until after it has finished."""
    records = Records(False)  # request, arrival, sent, admitted, first token, finished, prompt, output
    for number, (sent, admitted, finished) in enumerate(((0, 0, 40), (10, 20, 60), (10, 40, 100))):
        records.requests.add((number, 0, sent, admitted, finished, finished, 1, 1, 0, 0, 0, 0))
    times = {name: records.requests.column(name) for name in QUEUE}
    waiting, running = queue_depth(times, np.array([0, 5, 10, 20, 39, 40, 99, 100]))
    assert waiting.tolist() == [0, 0, 2, 1, 1, 0, 0, 0]
    assert running.tolist() == [1, 1, 1, 2, 2, 2, 1, 0]
    assert queue_metrics(records) == {
        "mean_num_requests_waiting": (10 + 30) / 100, "max_num_requests_waiting": 2,
        "mean_num_requests_running": (40 + 40 + 60) / 100, "max_num_requests_running": 2,
    }  # fmt: skip


def test_queue_depth_of_a_run_is_in_steps_plots_and_the_timeline(tmp_path, small_config, trace_file, call):
    """Six requests at once, of which the server takes two: the others wait, and Little's law holds for them."""
    words = ("replay", trace_file, "--model", small_config, "--request-rate", "inf", "--max-num-seqs", 2)
    words += ("--engine", "events", "--no-anchors", "--timeline", tmp_path / "t.json", "-o", tmp_path / "run", "--json")
    metrics = json.loads(call(*words)[1])["metrics"]
    assert metrics["max_num_requests_waiting"] == 4 and metrics["max_num_requests_running"] == 2
    requests = pq.read_table(tmp_path / "run" / "requests.parquet").to_pandas()
    rate = metrics["request_throughput"]
    waited = (requests["admitted"] - requests["sent"]).mean() / 1e9
    assert metrics["mean_num_requests_waiting"] == pytest.approx(rate * waited)
    steps = pq.read_table(tmp_path / "run" / "steps.parquet").to_pandas()
    assert steps["waiting"].iloc[0] == 4 and steps["waiting"].iloc[-1] == 0
    assert (steps["running"] == steps["sequences"]).all()
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    queue = [e["args"] for e in events if e["name"] == "requests" and e["ph"] == "C"]
    assert [e["waiting"] for e in queue] == steps["waiting"].tolist()
    drawn = run_figures(read_summary(tmp_path / "run"), tmp_path / "run")["queue"]
    assert drawn.data[0].name == "waiting" and max(drawn.data[0].y) == 4
