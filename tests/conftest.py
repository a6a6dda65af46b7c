"""A small model, a trace of it and where the shipped and the public data lie."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import moesim.cli
from moesim.trace import Trace
from moesim.trace.io import write
from tests.scenes import random_trace

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "traces" / "tiny-moe-8x16.parquet"
PUBLIC = ROOT.parent / "shared" / "data"

CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_hidden_layers": 3, "hidden_size": 512,
    "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 1000, "torch_dtype": "bfloat16", "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Tests neither read nor fill the user's cache of decoded traces."""
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def small_config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def small_trace(requests: int = 6, tokens: int = 240, weights: bool = False) -> Trace:
    """3 MoE layers, 8 experts, top-2; prompts of 10 tokens; tasks a and b."""
    trace = random_trace(tokens, 3, 8, 2, seed=0, requests=requests, prompt=10)
    tasks = tuple("ab"[i % 2] for i in range(requests))
    trace = replace(trace, requests=replace(trace.requests, task=tasks), info=replace(trace.info, model="small"))
    if not weights:
        return trace
    rng = np.random.default_rng(0)
    scores = rng.random((tokens, 3, 8))
    np.put_along_axis(scores, trace.experts.astype(int), 2 - np.arange(2) * 0.5 + np.zeros((tokens, 3, 1)), axis=2)
    probabilities = (scores / scores.sum(axis=2, keepdims=True)).astype(np.float16)
    chosen = np.take_along_axis(probabilities, trace.experts.astype(int), axis=2).astype(np.float32)
    shares = (chosen / chosen.sum(axis=2, keepdims=True)).astype(np.float16)
    return replace(trace, weights=shares, probabilities=probabilities)


@pytest.fixture
def trace_file(tmp_path) -> Path:
    path = tmp_path / "trace.parquet"
    write(small_trace(), path)
    return path


@pytest.fixture(scope="session")
def shipped() -> Path:
    if not SHIPPED.exists():
        pytest.skip("the shipped trace is not in this checkout")
    return SHIPPED


@pytest.fixture(scope="session")
def public_data() -> Path:
    if not PUBLIC.is_dir():
        pytest.skip("the folder of public data is not beside this checkout")
    return PUBLIC


@pytest.fixture
def call(monkeypatch, capsys):
    """main() in this process: (exit code, stdout, stderr)."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moesim", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            moesim.cli.main()
        out = capsys.readouterr()
        return int(left.value.code or 0), out.out, out.err

    return run
