"""Replays of real routing, counted against an oracle that shares no code with the engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moesim.question import Question, run
from moesim.trace.cut import cut
from moesim.trace.importers import import_trace
from moesim.trace.io import read
from tests.oracle import events_of, misses


@pytest.fixture(scope="module")
def gpt_oss(public_data):
    from moesim.model import load_model

    path = public_data / "routing_gptoss20b" / "all_ids_nonrep.npz"
    return import_trace("numpy", path, load_model("gpt-oss-20b"), phase="decode")


def expected(trace, slots, policy):
    """Every request starts with what the one before left in the cache, so the events run on across requests."""
    return sum(misses(events_of(trace.experts.tolist(), layer), slots, policy) for layer in range(trace.layers))


@pytest.mark.parametrize("slots", [4, 8, 16])
@pytest.mark.parametrize("policy", ["LRU", "LFU", "Belady"])
def test_misses_on_gpt_oss_routing_equal_the_oracle(gpt_oss, policy, slots):
    trace = cut(gpt_oss, requests=8)
    m = run(trace, policy, Question(slots_per_layer=slots, max_concurrency=1), anchors=False).summary["metrics"]
    assert m["lookups"] == trace.tokens * 24 * 4
    assert m["misses"] == expected(trace, slots, policy)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [4, 8, 16])
@pytest.mark.parametrize("policy", ["LRU", "LFU", "Belady"])
def test_misses_on_all_of_gpt_oss_routing_equal_the_oracle(gpt_oss, policy, slots):
    m = run(gpt_oss, policy, Question(slots_per_layer=slots), anchors=False).summary["metrics"]
    assert m["misses"] == expected(gpt_oss, slots, policy)


@pytest.mark.parametrize("name", ["LRU", "FIFO", "LFU"])
def test_misses_equal_those_of_libcachesim(name):
    """With one expert per token an event is an ordinary cache request, so a general cache simulator must agree."""
    libcachesim = pytest.importorskip("libcachesim")
    from tests.scenes import random_trace, serve

    trace = random_trace(3000, 1, 64, 1, seed=4)
    for slots in (4, 16, 40):
        cache = getattr(libcachesim, name)(cache_size=slots)
        hits = 0
        for expert in trace.experts[:, 0, 0].tolist():
            request = libcachesim.Request()
            request.obj_id, request.obj_size = expert, 1
            hits += bool(cache.get(request))
        assert serve(trace, name, slots).counts.misses == trace.tokens - hits


GOLDEN = json.loads((Path(__file__).parent / "golden" / "tiny-moe-8x16.json").read_text())


@pytest.fixture(scope="module")
def own_trace(shipped):
    return cut(read(shipped), requests=24)


@pytest.mark.parametrize("policy", list(GOLDEN["counts"]))
def test_golden_counts_on_the_shipped_trace(own_trace, policy):
    counts = []
    for slots in GOLDEN["slots_per_layer"]:
        m = run(own_trace, policy, Question(slots_per_layer=slots), anchors=False).summary["metrics"]
        counts.append([m["hits"], m["misses"]])
    assert counts == GOLDEN["counts"][policy]


@pytest.mark.parametrize("policy", ["LRU", "LFU", "FIFO", "Belady"])
def test_misses_on_the_decode_rows_of_the_shipped_trace_equal_the_oracle(own_trace, policy):
    decode = cut(own_trace, phase="decode")
    for slots in (2, 8, 12):
        m = run(decode, policy, Question(slots_per_layer=slots), anchors=False).summary["metrics"]
        assert m["misses"] == expected(decode, slots, policy)
