"""Counts per layer and expert: too little for a trace, so tokens are drawn that have these popularities."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.trace.check import RoutedModel, check_size, chunks
from moesim.trace.importers.common import describe, lay_out, read_csv
from moesim.trace.trace import Requests, Trace

_COLUMNS = {"layer": pa.int64(), "expert": pa.int64(), "count": pa.int64()}
_MAX_TOTAL = 1 << 48  # so that k times a layer's sum stays an exact int64
LOST = "drawn from counts: order of tokens, links between layers and tokens, tasks and ranks are not those of the model"


def read(
    path: Path,
    model: RoutedModel,
    *,
    tokens: int,
    seed: int = 0,
    task: str = "",
    engine: str = "",
    source: str = "",
) -> Trace:
    """A synthetic trace: one request of `tokens` decode tokens drawn independently from `layer,expert,count`.

    Each token takes top-k different experts per layer, expert e with probability k x count[e] / sum(count). An expert
    without a row has count 0; `layer` is the model's own layer number. Raises TraceError.
    """
    counts = _counts(path, model)
    check_size(tokens, 2 * counts.shape[0] * model.top_k, str(path))
    rng = np.random.default_rng(seed)
    experts = np.empty((tokens, counts.shape[0], model.top_k), np.int16)
    for rows in chunks(tokens):
        for layer, of_layer in enumerate(counts):
            experts[rows, layer] = draw(rng, of_layer, model.top_k, rows.stop - rows.start)
    none = np.zeros(1, np.int64)
    request, phase, position = lay_out(np.array([tokens]), none, none)
    info = describe(model, path, engine, source)
    return Trace(
        info=replace(info, provenance="synthetic", extra={"lost": LOST, "seed": seed}),
        requests=Requests((path.stem,), (task,), none.astype(np.int32)),
        experts=experts,
        request=request,
        phase=phase,
        position=position,
    )


def draw(rng: np.random.Generator, counts: NDArray[np.int64], k: int, tokens: int) -> NDArray[np.int16]:
    """[tokens, k] different experts per token, expert e chosen with probability k x counts[e] / sum(counts) exactly.

    Systematic sampling over a fresh random order of the experts per token (Madow 1949), in whole numbers: drawing one
    after another without replacement would flatten the popularities.
    """
    total = int(counts.sum())
    order = rng.random((tokens, counts.size)).argsort(axis=1)
    reached = k * counts[order].cumsum(axis=1) + rng.integers(total, size=(tokens, 1))
    chosen = np.diff(reached // total, axis=1, prepend=0) > 0
    return order[chosen].reshape(tokens, k).astype(np.int16)


def _counts(path: Path, model: RoutedModel) -> NDArray[np.int64]:
    """[layers, experts], each layer's counts such as top-k routing can produce."""
    columns = read_csv(path, _COLUMNS, tuple(_COLUMNS))
    layer, expert, count = (columns[name].to_numpy() for name in _COLUMNS)
    known = {number: index for index, number in enumerate(model.moe_layers)}
    out = np.full((len(known), model.experts), -1, np.int64)
    for row, (number, e, n) in enumerate(zip(layer.tolist(), expert.tolist(), count.tolist(), strict=True)):
        if number not in known:
            raise TraceError(f"{path}, row {row}: layer {number} is not a MoE layer of {model.name}")
        if not 0 <= e < model.experts:
            raise TraceError(f"{path}, row {row}: expert {e}, but {model.name} has {model.experts}, from 0")
        if not 0 <= n <= _MAX_TOTAL // model.experts:
            raise TraceError(f"{path}, row {row}: count {n}; must be 0 or more, and below 2^48 over all experts")
        if out[known[number], e] >= 0:
            raise TraceError(f"{path}, row {row}: layer {number}, expert {e} appears twice; add its counts up")
        out[known[number], e] = n
    np.maximum(out, 0, out=out)
    for number, of_layer in zip(model.moe_layers, out, strict=True):
        total = int(of_layer.sum())
        if total == 0:
            raise TraceError(f"{path}: layer {number} has no counts; each MoE layer of {model.name} needs some")
        if model.top_k * int(of_layer.max()) > total:
            raise TraceError(
                f"{path}: layer {number}, expert {int(of_layer.argmax())} has {of_layer.max()} of {total} counts, more "
                f"than once per token at top-{model.top_k}; choose the right --model"
            )
    return out
