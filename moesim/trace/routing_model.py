"""The generator behind synthetic routing.

A token of request r chooses its experts at layer l by k draws without replacement (Plackett-Luce), expert e having
the log-weight

    popularity[phase, task, l, e] + taste[l] z[r, l, e] + recency[task, l, bin(tokens since r last used e at l)]
        + sum over the token's experts i at layer l-1 of transition[l, i, e]

with z standard normal. Popularity makes skew and tasks, tastes make requests differ, recency makes reuse and so the
LRU curve, and transition makes the next layer predictable. Tokens see only what came before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
    from moesim.trace.wave import draw_wave

    layers, requests, experts = taste.shape
    top_k, longest = model.info.top_k, int(block.length[0])
    base = np.stack([model.popularity[phase][block.task].transpose(1, 0, 2) + taste for phase in (PREFILL, DECODE)])
    recency = np.ascontiguousarray(model.recency[:, :, np.searchsorted(GAPS, np.arange(GAPS[-1] + 2))])
    last_use = np.full((layers, requests, experts), _NEVER, dtype=np.int32)
    chosen = np.full((layers + 1, requests, top_k), experts)  # row l: by layer l-1; before layer 0: no expert
    given = np.empty((0, layers, top_k), dtype=np.int16) if below is None else below
    rooms = np.empty((2, layers * requests * experts), dtype=np.float32)
    with ThreadPoolExecutor(1) as beside:  # noise for the next wave is drawn while this one uses its own
        drawn: Future[None] | None = None
        for wave in range(longest + layers - 1):
            low, high = max(0, wave - longest + 1), min(layers, wave + 1)
            active = int(np.searchsorted(-block.length, high - 1 - wave))  # longer than the wave's earliest token
            shape = (high - low, active, experts)
            arrival = rooms[wave % 2, : math.prod(shape)].reshape(shape)
            rng.standard_exponential(dtype=np.float32, out=arrival)
            with np.errstate(divide="ignore"):
                np.log(arrival, out=arrival)
            fields = (block.task[:active], block.prompt[:active], block.length[:active], block.start[:active])
            if drawn:
                drawn.result()
            drawn = beside.submit(
                draw_wave, wave, low, high, fields, base, recency, model.transition, arrival, last_use, chosen, given,
                out,
            )  # fmt: skip
        assert drawn is not None
        drawn.result()
