"""Routing for a model nobody has a trace of."""

from __future__ import annotations

from functools import cache

import numpy as np

from moesim.architecture import Model
from moesim.trace.routing_model import RoutingModel, draw
from moesim.trace.synth_parameters import from_parameters
from moesim.trace.trace import DECODE, PREFILL, Requests, Trace, TraceInfo


def local_routing(model: Model, requests: int, prompt: int, decode: int, seed: int = 0) -> Trace:
    """Drawn with the popularity and reuse that recorded routing of gpt-oss-20b has: what a cache lives by. Seconds."""
    return draw(
        _fitted(model.name, model.experts, model.top_k, model.moe_layers, seed), requests, prompt, decode, seed=seed
    )


@cache
def _fitted(name: str, experts: int, top_k: int, layers: tuple[int, ...], seed: int) -> RoutingModel:
    return from_parameters(experts, top_k, len(layers), model=name, moe_layers=layers, seed=seed)


def distinct_routing(model: Model, requests: int, prompt: int, decode: int, seed: int = 0) -> Trace:
    """Every token its own `top_k` of all experts, any as likely as another: enough where no cache depends on it."""
    rng, each = np.random.default_rng(seed), prompt + decode
    layers, k = len(model.moe_layers), model.top_k
    experts = np.empty((requests * each, layers, k), dtype=np.int16)
    for row in range(len(experts)):
        keys = rng.random((layers, model.experts), dtype=np.float32)
        experts[row] = np.argpartition(keys, k - 1, axis=1)[:, :k]
    position = np.tile(np.arange(each, dtype=np.int32), requests)
    return Trace(
        info=TraceInfo(model.name, model.experts, k, model.moe_layers, provenance="synthetic"),
        requests=Requests(
            tuple(f"r{i}" for i in range(requests)), ("",) * requests, np.full(requests, prompt, dtype=np.int32)
        ),
        experts=experts,
        request=np.repeat(np.arange(requests, dtype=np.int32), each),
        phase=np.where(position < prompt, PREFILL, DECODE).astype(np.uint8),
        position=position,
    )
