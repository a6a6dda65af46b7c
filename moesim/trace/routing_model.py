"""The generator behind synthetic routing.

A token of request r chooses its experts at layer l by k draws without replacement (Plackett-Luce), expert e having
the log-weight

    popularity[phase, task, l, e] + taste[l] z[r, l, e] + recency[task, l, bin(tokens since r last used e at l)]
        + sum over the token's experts i at layer l-1 of transition[l, i, e]

with z standard normal. Popularity makes skew and tasks, tastes make requests differ, recency makes reuse and so the
LRU curve, and transition makes the next layer predictable. Tokens see only what came before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.trace.check import check_size
from moesim.trace.locality import Floats, Ids, Ints
from moesim.trace.trace import DECODE, PREFILL, Requests, Trace, TraceInfo

Weights = NDArray[np.float32]

# Upper ends of the bins of tokens since last use; one more bin holds longer ago and never.
GAPS = np.array([1, 2, 3, 4, 6, 8, 12, 16, 24, 32])
_CELLS = 1 << 19  # layers x requests x experts scored at once: a few MB
_NEVER = -(1 << 30)


@dataclass(frozen=True, eq=False)
class RoutingModel:
    """What synthetic routing is drawn from; see the module's formula."""

    info: TraceInfo  # of the traces drawn
    tasks: tuple[str, ...]
    task_share: Floats  # of the requests
    popularity: Weights  # [2 phases, tasks, layers, experts]
    taste: Weights  # [layers]
    recency: Weights  # [tasks, layers, len(GAPS) + 1]
    transition: Weights  # [layers, experts + 1, experts]; layer 0 and the last row, for no expert, are 0
    gates: NDArray[np.float16] | None = None  # [samples, layers, k]: gate weights seen, by rank


class Batch(NamedTuple):
    """Requests to draw, each field [requests]."""

    task: Ints  # index into RoutingModel.tasks
    prompt: Ints  # prefill rows
    length: Ints  # rows
    start: Ints  # first row

    @staticmethod
    def of(task: Ints, prompt: Ints, decode: Ints) -> Batch:
        length = prompt + decode
        return Batch(task, prompt, length, np.cumsum(length) - length)


def draw(
    model: RoutingModel,
    requests: int,
    prompt_tokens: int,
    decode_tokens: int,
    *,
    seed: int = 0,
    tasks: Sequence[str] = (),
) -> Trace:
    """A synthetic trace of equally long requests; `tasks` names those to draw from (all if empty).

    Raises TraceError for an unknown task, impossible counts, or a trace too large to hold.
    """
    if requests < 1 or min(prompt_tokens, decode_tokens) < 0 or prompt_tokens + decode_tokens < 1:
        raise TraceError(
            f"{requests} requests of {prompt_tokens} prompt and {decode_tokens} output tokens; "
            "draw at least one request of at least one token"
        )
    per_token = 2 * len(model.info.moe_layers) * model.info.top_k
    check_size(requests * (prompt_tokens + decode_tokens), per_token, "synthetic trace")
    rng = np.random.default_rng(seed)
    known = np.array([task_index(name, model.tasks) for name in tasks or model.tasks])
    share = model.task_share[known]
    task = known[rng.choice(known.size, requests, p=share / share.sum())]
    batch = Batch.of(task, np.full(requests, prompt_tokens), np.full(requests, decode_tokens))
    return _trace(model, batch, seed, rng)


def redraw(model: RoutingModel, trace: Trace, seed: int = 0) -> Trace:
    """A synthetic trace whose requests have the tasks and rows of those in `trace`, to compare the two."""
    task = np.array([task_index(name, model.tasks) for name in trace.requests.task])
    batch = Batch.of(task, trace.decode_start - trace.first_row[:-1], trace.first_row[1:] - trace.decode_start)
    return _trace(model, batch, seed, np.random.default_rng(seed))


def task_index(name: str, tasks: Sequence[str]) -> int:
    """Place of `name` in `tasks`; raises TraceError with the nearest name where it has none."""
    if name not in tasks:
        raise TraceError(
            f"unknown task '{name}'" + (nearest(name, tasks) if any(tasks) else "; there are no task labels")
        )
    return list(tasks).index(name)


def _trace(model: RoutingModel, batch: Batch, seed: int, rng: np.random.Generator) -> Trace:
    ids = draw_ids(model, batch, rng)
    request = np.repeat(np.arange(batch.task.size, dtype=np.int32), batch.length)
    position = np.arange(request.size) - batch.start[request]
    gates = None
    if model.gates is not None:
        sample = rng.integers(len(model.gates), size=(request.size, ids.shape[1]))
        gates = model.gates[sample, np.arange(ids.shape[1])]
    names = tuple(f"synthetic-{i}" for i in range(batch.task.size))
    extra: dict[str, Any] = {**model.info.extra, "seed": seed}
    return Trace(
        info=replace(model.info, extra=extra),
        requests=Requests(names, tuple(model.tasks[i] for i in batch.task), batch.prompt.astype(np.int32)),
        experts=ids,
        request=request,
        phase=np.where(position < batch.prompt[request], PREFILL, DECODE).astype(np.uint8),
        position=position.astype(np.int32),
        weights=gates,
    )


def draw_ids(
    model: RoutingModel, batch: Batch, rng: np.random.Generator, *, below: Ids | None = None, centred: bool = False
) -> Ids:
    """Experts of the batch's tokens, [tokens, layers, k].

    For fitting: `below` [tokens, layers, k] stands in for the experts drawn at the layer before, and `centred` tastes
    sum to zero over requests.
    """
    layers, experts = model.popularity.shape[2:]
    ids = np.empty((int(batch.length.sum()), layers, model.info.top_k), dtype=np.int16)
    order = np.argsort(-batch.length, kind="stable")  # requests of similar length together waste the least
    size = max(1, _CELLS // (layers * experts))
    for first in range(0, order.size, size):
        block = Batch(*(field[order[first : first + size]] for field in batch))
        taste = rng.standard_normal((layers, block.task.size, experts), dtype=np.float32)
        if centred:
            taste -= taste.mean(axis=1, keepdims=True)
        _draw_block(model, block, taste * model.taste[:, None, None], rng, out=ids, below=below)
    return ids


def _draw_block(
    model: RoutingModel, block: Batch, taste: Weights, rng: np.random.Generator, *, out: Ids, below: Ids | None
) -> None:
    """Fill the rows of `out` that belong to some requests, longest first; taste [layers, requests, experts].

    Layer l of token t needs layer l of token t-1 and layer l-1 of token t only, so all (t, l) with the same t + l are
    drawn together, wave after wave over [layers, requests, experts].
    """
    layers, requests, experts = taste.shape
    top_k, longest = model.info.top_k, int(block.length[0])
    base = [model.popularity[phase][block.task].transpose(1, 0, 2) + taste for phase in (PREFILL, DECODE)]
    recency = np.ascontiguousarray(model.recency[:, :, np.searchsorted(GAPS, np.arange(GAPS[-1] + 2))])
    row_of_gaps = (block.task * layers + np.arange(layers)[:, None]) * recency.shape[2]  # [layers, requests]
    last_use = np.full((layers, requests, experts), _NEVER, dtype=np.int32)
    chosen = np.full((layers + 1, requests, top_k), experts)  # row l: by layer l-1; before layer 0: no expert
    for wave in range(longest + layers - 1):
        low, high = max(0, wave - longest + 1), min(layers, wave + 1)
        layer = np.arange(low, high)
        token = (wave - layer).astype(np.int32)
        active = int(np.searchsorted(-block.length, -token[-1]))  # requests longer than the wave's earliest token
        here = (slice(low, high), slice(0, active))
        score = _by_phase(token[:, None] < block.prompt[:active], base[PREFILL][here], base[DECODE][here])
        gap = np.minimum(token[:, None, None] - last_use[here], recency.shape[2] - 1)
        score += np.take(recency, gap + row_of_gaps[here][:, :, None])
        given = chosen[here] if below is None else _below(below, block.start[:active] + token[:, None], layer, experts)
        for rank in range(top_k):
            score += model.transition[layer[:, None], given[:, :, rank]]
        picked = _plackett_luce(score, top_k, rng)
        chosen[low + 1 : high + 1, :active] = picked
        np.put_along_axis(last_use[here], picked, token[:, None, None], axis=2)
        for index in range(high - low):
            alive = int(np.searchsorted(-block.length, -token[index]))
            out[block.start[:alive] + token[index], low + index] = picked[index, :alive]


def _by_phase(in_prompt: NDArray[np.bool_], prefill: Weights, decode: Weights) -> Weights:
    """A new array of the phase's log-weights; in_prompt [layers, requests]."""
    if in_prompt.all() or not in_prompt.any():
        return (prefill if in_prompt.any() else decode).copy()
    return np.where(in_prompt[:, :, None], prefill, decode)


def _below(ids: Ids, rows: Ints, layer: Ints, experts: int) -> Ints:
    """Experts of `ids` at the layer before, [layers, requests, k]; rows past a request's end are never used."""
    rows = np.minimum(rows, len(ids) - 1)
    return np.where((layer > 0)[:, None, None], ids[rows, layer[:, None] - 1].astype(np.int64), experts)


def _plackett_luce(log_weight: Weights, top_k: int, rng: np.random.Generator) -> Ints:
    """k experts drawn one after the other without replacement, [layers, requests, k]; overwrites its input.

    An exponential divided by the weight is an arrival time; who arrives first is drawn first (the Gumbel-max trick).
    """
    with np.errstate(divide="ignore"):
        log_weight -= np.log(rng.standard_exponential(log_weight.shape, dtype=np.float32))
    picked = np.empty((*log_weight.shape[:2], top_k), dtype=np.int64)
    for rank in range(top_k):
        best = log_weight.argmax(axis=2)
        picked[:, :, rank] = best
        np.put_along_axis(log_weight, best[:, :, None], -np.inf, axis=2)
    return picked
