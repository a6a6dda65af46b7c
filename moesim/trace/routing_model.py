"""Synthetic routing: a causal generator fitted to a trace, or made from a few parameters.

A token of request r chooses its experts at layer l by k draws without replacement (Plackett-Luce), expert e having
the log-weight

    popularity[phase, task, l, e] + taste[l] * z[r, l, e] + recency[l, bin(tokens since r last used e at l)]
        + sum over the token's experts i at layer l-1 of transition[l, i, e]

with z standard normal. Popularity makes skew and tasks, tastes make requests differ, recency makes reuse and so the
LRU curve, and transition makes the next layer predictable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.trace.check import check_size
from moesim.trace.locality import Floats, Ids, Ints
from moesim.trace.trace import DECODE, PREFILL, Requests, Trace, TraceInfo

Weights = NDArray[np.float32]

# Upper ends of the bins of tokens since last use; one more bin holds longer ago and never.
GAPS = np.array([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 128])
_CELLS = 1 << 19  # layers x requests x experts scored at once: a few MB
CENTRE = True
_NEVER = -(1 << 30)


@dataclass(frozen=True, eq=False)
class RoutingModel:
    """What synthetic routing is drawn from; see the module's formula."""

    info: TraceInfo  # of the traces drawn
    tasks: tuple[str, ...]
    task_share: Floats  # of the requests
    popularity: Weights  # [2 phases, tasks, layers, experts]
    taste: Weights  # [layers]
    recency: Weights  # [layers, len(GAPS) + 1]
    transition: Weights  # [layers, experts + 1, experts]; layer 0 and the last row, for no expert, are 0
    gates: NDArray[np.float16] | None = None  # [samples, layers, k]: gate weights of tokens seen, by rank


def draw(
    model: RoutingModel,
    requests: int,
    prompt_tokens: int,
    decode_tokens: int,
    seed: int = 0,
    tasks: Sequence[str] = (),
) -> Trace:
    """A synthetic trace of equally long requests; `tasks` names those to draw from (all if empty).

    Raises TraceError for an unknown task, a count that is no count, or a trace too large to hold.
    """
    if requests < 1 or prompt_tokens < 0 or decode_tokens < 0 or prompt_tokens + decode_tokens < 1:
        raise TraceError(
            f"{requests} requests of {prompt_tokens} prompt and {decode_tokens} output tokens; "
            "draw at least one request of at least one token"
        )
    rng = np.random.default_rng(seed)
    known = np.array([_task_index(model, name) for name in tasks or model.tasks])
    share = model.task_share[known] / model.task_share[known].sum()
    task = known[rng.choice(known.size, requests, p=share)]
    prompt, decode = np.full(requests, prompt_tokens), np.full(requests, decode_tokens)
    return draw_requests(model, task, prompt, decode, rng, {"seed": seed})


def redraw(model: RoutingModel, trace: Trace, seed: int = 0) -> Trace:
    """A synthetic trace with the tasks and lengths of the requests of `trace`: what comparisons are made with."""
    task = np.array([_task_index(model, name) for name in trace.requests.task])
    prompt = trace.decode_start - trace.first_row[:-1]
    decode = trace.first_row[1:] - trace.decode_start
    return draw_requests(model, task, prompt, decode, np.random.default_rng(seed), {"seed": seed})


def draw_requests(
    model: RoutingModel, task: Ints, prompt: Ints, decode: Ints, rng: np.random.Generator, extra: dict | None = None, below=None
) -> Trace:
    """A trace of requests of given task index, prompt rows and decode rows, each [requests]."""
    length = prompt + decode
    request = np.repeat(np.arange(task.size, dtype=np.int32), length)
    _, layers, experts = model.popularity.shape[1:]
    check_size(request.size, 2 * layers * model.info.top_k, "synthetic trace")
    position = np.arange(request.size) - np.repeat(np.cumsum(length) - length, length)
    order = np.argsort(-length, kind="stable")  # blocks of similar lengths waste the least
    start = np.r_[0, np.cumsum(length)]
    ids = np.empty((request.size, layers, model.info.top_k), dtype=np.int16)
    block = max(1, _CELLS // (layers * experts))
    for first in range(0, order.size, block):
        part = order[first : first + block]
        _draw_block(model, task[part], prompt[part], length[part], start[part], ids, rng, below)
    gates = None
    if model.gates is not None:
        sample = rng.integers(len(model.gates), size=(request.size, layers))
        gates = model.gates[sample, np.arange(layers)]
    return Trace(
        info=replace(model.info, extra={**model.info.extra, **(extra or {})}),
        requests=Requests(
            tuple(f"synthetic-{i}" for i in range(task.size)),
            tuple(model.tasks[i] for i in task),
            prompt.astype(np.int32),
        ),
        experts=ids,
        request=request,
        phase=np.where(position < prompt[request], PREFILL, DECODE).astype(np.uint8),
        position=position.astype(np.int32),
        weights=gates,
    )


def _task_index(model: RoutingModel, name: str) -> int:
    if name not in model.tasks:
        raise TraceError(f"unknown task '{name}'{nearest(name, model.tasks)}")
    return model.tasks.index(name)


def _draw_block(
    model: RoutingModel, task: Ints, prompt: Ints, length: Ints, start: Ints, out: Ids, rng: np.random.Generator, below=None
) -> None:
    """Fill the rows of `out` of some requests, longest first; start [requests]: their first rows.

    Layer l of token t needs layer l of token t-1 and layer l-1 of token t only, so all (t, l) with the same t + l are
    drawn together: wave after wave over [layers, requests, experts].
    """
    layers, experts = model.popularity.shape[2:]
    top_k, longest = model.info.top_k, int(length[0])
    taste = rng.standard_normal((layers, task.size, experts), dtype=np.float32)
    if CENTRE: taste -= taste.mean(1, keepdims=True)
    taste *= model.taste[:, None, None]
    base = [model.popularity[phase][task].transpose(1, 0, 2) + taste for phase in (PREFILL, DECODE)]
    bin_of_gap = np.searchsorted(GAPS, np.arange(GAPS[-1] + 2))
    recency = np.ascontiguousarray(model.recency[:, bin_of_gap])
    last_use = np.full((layers, task.size, experts), _NEVER, dtype=np.int32)
    chosen = np.full((layers + 1, task.size, top_k), experts)  # by layer, after a layer before the first: no expert
    for wave in range(longest + layers - 1):
        low, high = max(0, wave - longest + 1), min(layers, wave + 1)
        layer = np.arange(low, high)
        token = (wave - layer).astype(np.int32)
        active = int(np.searchsorted(-length, -token[-1]))  # longer than the earliest token of the wave
        here = (slice(low, high), slice(0, active))
        in_prompt = token[:, None] < prompt[:active]
        score = _by_phase(in_prompt, base[PREFILL][here], base[DECODE][here])
        gap = np.minimum(token[:, None, None] - last_use[here], recency.shape[1] - 1)
        score += np.take(recency, gap + (layer * recency.shape[1])[:, None, None])
        if below is None:
            given = chosen[here]
        else:
            at = np.minimum(start[:active] + token[:, None], len(below) - 1)
            given = np.where((layer > 0)[:, None, None], below[at, layer[:, None] - 1], experts)
        for rank in range(top_k):
            score += model.transition[layer[:, None], given[:, :, rank]]
        picked = _plackett_luce(score, top_k, rng)
        chosen[low + 1 : high + 1, :active] = picked
        np.put_along_axis(last_use[here], picked, token[:, None, None], axis=2)
        for index in range(high - low):
            alive = int(np.searchsorted(-length, -token[index]))
            out[start[:alive] + token[index], low + index] = picked[index, :alive]


def _by_phase(in_prompt: NDArray[np.bool_], prefill: Weights, decode: Weights) -> Weights:
    """A new array of the phase's log-weights, by [layers, requests]."""
    if in_prompt.all() or not in_prompt.any():
        return (prefill if in_prompt.any() else decode).copy()
    return np.where(in_prompt[:, :, None], prefill, decode)


def _plackett_luce(log_weight: Weights, top_k: int, rng: np.random.Generator) -> Ints:
    """k experts drawn one after the other without replacement, [layers, requests, k]; overwrites its input.

    An exponential divided by the weight is an arrival time; who arrives first was drawn first (the Gumbel-max trick).
    """
    with np.errstate(divide="ignore"):
        log_weight -= np.log(rng.standard_exponential(log_weight.shape, dtype=np.float32))
    picked = np.empty((*log_weight.shape[:2], top_k), dtype=np.int64)
    for rank in range(top_k):
        best = log_weight.argmax(axis=2)
        picked[:, :, rank] = best
        np.put_along_axis(log_weight, best[:, :, None], -np.inf, axis=2)
    return picked
