"""Small traces for the trace tests."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from moesim.trace import Requests, Trace, TraceInfo


@pytest.fixture
def model() -> SimpleNamespace:
    """3 MoE layers (1, 2, 3; layer 0 is dense), top-2 of 8."""
    return SimpleNamespace(name="tiny", experts=8, top_k=2, moe_layers=(1, 2, 3))


@pytest.fixture
def trace() -> Trace:
    """Two requests: 3 prefill and 2 decode tokens, then 4 decode tokens; weights and probabilities."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(8), (9, 3)).astype(np.float16)
    experts = np.argsort(-probabilities.astype(np.float32), axis=-1)[..., :2].astype(np.int16)
    return Trace(
        info=TraceInfo("tiny", 8, 2, (1, 2, 3), engine="test 1.0", extra={"seed": 0}),
        requests=Requests(
            ("a", "b"), ("code", "prose"), np.array([3, 7], np.int32), np.array([0, 5_000_000_000], np.int64)
        ),
        experts=experts,
        request=np.array([0, 0, 0, 0, 0, 1, 1, 1, 1], np.int32),
        phase=np.array([0, 0, 0, 1, 1, 1, 1, 1, 1], np.uint8),
        position=np.array([0, 1, 2, 3, 4, 7, 8, 9, 10], np.int32),
        weights=np.take_along_axis(probabilities, experts.astype(np.int64), axis=-1),
        probabilities=probabilities,
    )
