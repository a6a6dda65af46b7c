"""The shipped trace is whole, matches its model and holds what its page says."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moesim.trace import PREFILL, Trace, io

ROOT = Path(__file__).parents[2]
FILE = ROOT / "traces" / "tiny-moe-8x16.parquet"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return io.read(FILE)


def test_matches_the_model(trace: Trace) -> None:
    config = json.loads((ROOT / "moesim" / "data" / "tiny-moe-8x16.json").read_text())
    assert trace.info.model == "tiny-moe-8x16" and trace.info.provenance == "real"
    assert trace.layers == config["num_hidden_layers"]
    assert trace.info.experts == config["num_local_experts"]
    assert trace.top_k == config["num_experts_per_tok"]
    shape = trace.info.extra["shape"]
    assert (shape["hidden"], shape["expert_hidden"]) == (config["hidden_size"], config["intermediate_size"])


def test_requests(trace: Trace) -> None:
    assert Counter(trace.requests.task) == dict.fromkeys(("code", "prose", "markup", "manual"), 84)
    assert trace.tokens >= 50_000
    prefill = np.bincount(trace.request[trace.phase == PREFILL])
    np.testing.assert_array_equal(prefill, trace.requests.prompt_tokens)
    assert (np.diff(trace.first_row) > prefill).all(), "every request decodes"


def test_choices_agree_with_probabilities(trace: Trace) -> None:
    """The experts are the router's own; probabilities are rounded to 1/1024, so nearly equal ones may tie."""
    assert trace.weights is not None and trace.probabilities is not None
    chosen = np.take_along_axis(trace.probabilities, trace.experts.astype(np.int64), -1).astype(np.float32)
    best = -np.sort(-trace.probabilities.astype(np.float32), axis=-1)[..., :2]
    np.testing.assert_array_equal(chosen, best)
    shares = chosen / chosen.sum(-1, keepdims=True)
    assert np.abs(shares - trace.weights).max() < 0.01
    assert (trace.weights[..., 0] >= trace.weights[..., 1]).all()


def test_file_holds_no_text() -> None:
    names = pq.read_schema(FILE).names
    assert not {"text", "token", "tokens", "token_id", "bytes"} & set(names)
    assert FILE.stat().st_size < 12 << 20
