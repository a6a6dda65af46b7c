"""Routing for a model nobody has a trace of."""

from __future__ import annotations

import hashlib
import json
import zipfile
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.architecture import Model
from moesim.files import atomic
from moesim.output import told_if_slow
from moesim.trace import cache
from moesim.trace.routing_model import RoutingModel, draw
from moesim.trace.synth_parameters import from_parameters
from moesim.trace.trace import DECODE, PREFILL, Requests, Trace, TraceInfo

_POOL = 16, 512, 256  # requests, their prompt and decode tokens


def local_routing(model: Model, requests: int, prompt: int, decode: int, seed: int = 0) -> Trace:
    """Drawn with the popularity and reuse that recorded routing of gpt-oss-20b has: what a cache lives by. Seconds."""
    return draw(
        _fitted(model.name, model.experts, model.top_k, model.moe_layers, seed), requests, prompt, decode, seed=seed
    )


def pool_routing(model: Model, seed: int = 0) -> Trace:
    """Such requests as those of a workload file, of any length, are joined from."""
    return local_routing(model, *_POOL, seed=seed)


@lru_cache
def _fitted(name: str, experts: int, top_k: int, layers: tuple[int, ...], seed: int) -> RoutingModel:
    """Tuning takes up to a minute, so its result is kept in the user's cache, where that can be written."""
    import moesim

    asked = json.dumps([moesim.__version__, name, experts, top_k, layers, seed])
    kept = cache.folder() / "routing" / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
    model = _read(kept)
    if model is None:
        with told_if_slow(f"tuning routing for {name}: once per model, up to a minute"):
            model = from_parameters(experts, top_k, len(layers), model=name, moe_layers=layers, seed=seed)
        with suppress(OSError), atomic(kept) as temporary, temporary.open("wb") as file:
            info = json.dumps(asdict(model.info))
            np.savez(file, info=info, **{part: getattr(model, part) for part in _ARRAYS})
    return model


_ARRAYS = ("task_share", "popularity", "taste", "recency", "transition")


def _read(path: Path) -> RoutingModel | None:
    """What was kept; None where there is nothing, or nothing whole."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            info = json.loads(str(kept["info"]))
            arrays = {part: kept[part] for part in _ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    info["moe_layers"] = tuple(info["moe_layers"])
    return RoutingModel(TraceInfo(**info), ("",), **arrays)


def distinct_routing(model: Model, requests: int, prompt: int, decode: int, seed: int = 0) -> Trace:
    """Every token its own `top_k` of all experts, any as likely as another: enough where no cache depends on it."""
    rng, each = np.random.default_rng(seed), prompt + decode
    layers, k = len(model.moe_layers), model.top_k
    experts = _distinct(rng, (requests * each, layers, k), model.experts)
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


def _distinct(rng: np.random.Generator, shape: tuple[int, int, int], experts: int) -> NDArray[np.int16]:
    """Random ids, no two alike along the last axis: rows with a repetition are drawn again, or dealt where many are."""
    k = shape[2]
    ids = rng.integers(experts, size=(shape[0] * shape[1], k), dtype=np.int16)
    left = np.arange(len(ids))
    while k * k <= experts and len(left):
        ordered = np.sort(ids[left], axis=1)
        left = left[(ordered[:, 1:] == ordered[:, :-1]).any(axis=1)]
        ids[left] = rng.integers(experts, size=(len(left), k), dtype=np.int16)
    for first in range(0, len(left), 1 << 14):  # a slice at a time, for memory's sake
        rows = left[first : first + (1 << 14)]
        keys = rng.random((len(rows), experts), dtype=np.float32)
        ids[rows] = np.argpartition(keys, k - 1, axis=1)[:, :k]
    return ids.reshape(shape)
