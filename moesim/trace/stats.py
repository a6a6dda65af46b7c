"""What decides whether a trace's experts can be cached or predicted. numpy in, plain data out.

Statistics describe decode tokens, one request after another as a batch of one would serve them. A trace without
decode rows is described token by token over its prefill rows instead; `TraceStats.phase` says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.trace.locality import (
    Floats,
    History,
    Ids,
    Ints,
    Lru,
    Reuse,
    chance_reuse,
    look_back,
    lru_curves,
    ratio,
    request_counts,
    same_request_reuse,
)
from moesim.trace.trace import DECODE, PHASES, PREFILL, Trace

TOP_SHARES = (0.10, 0.25, 0.50)
QUARTERS = (0.25, 0.50, 0.75)  # cache sizes, in shares of the experts, that headlines name
BATCHES = (1, 2, 4, 8, 16, 32, 64)
_STEPS = 512  # batches drawn to measure unique experts
_DRAWS = 8_000_000  # random numbers spent on them, at most
_TEST_TOKENS = 20_000  # tokens a layer-to-layer guess is judged on, at most


@dataclass(frozen=True, eq=False)
class Skew:
    """How unequal experts' popularity is, per layer."""

    top_share: dict[str, Floats]  # share of all choices that the most popular 10, 25, 50 % of experts receive
    entropy: Floats  # of the popularity, as a share of the uniform one's: 1 is flat
    gini: Floats  # 0 is flat, near 1 is one expert
    zipf: Floats  # exponent s of share ~ rank^-s, least squares over the experts ever chosen


@dataclass(frozen=True, eq=False)
class Unique:
    """Distinct experts that one decode step of several requests needs, by batch size."""

    batches: Ints
    mean: Floats  # [layers, batches]
    independent: Floats  # [layers, batches]: tokens drawn independently with the layer's popularity


@dataclass(frozen=True, eq=False)
class Predictability:
    """Share of layer l+1's experts that a guess of top_k experts names, [layers - 1]; fitted on other requests."""

    from_layer: Floats  # naive Bayes on the experts chosen at layer l
    from_popularity: Floats  # the most popular experts


@dataclass(frozen=True, eq=False)
class TaskStats:
    """How much routing depends on the task."""

    names: tuple[str, ...]
    requests: Ints
    tokens: Ints
    next_token_reuse: Floats
    lru_hit: Floats  # [tasks, 3] with 25, 50, 75 % of the experts
    top_quarter: Floats  # share of a task's choices that its own most popular quarter of experts receives
    distance: Floats  # [tasks, tasks] total variation between popularities, mean over layers
    noise: Floats  # the same between two random halves of a task's requests; nan with one request
    explained: float  # share of the variance between requests' popularities that tasks account for (adjusted R^2)


@dataclass(frozen=True, eq=False)
class PhaseStats:
    """How prefill differs from decode, per layer."""

    distance: Floats  # total variation between the two popularities
    noise: Floats  # the same between the decode tokens of two random halves of the requests
    prompt_experts: Floats  # distinct experts a whole prompt needs, mean over requests


@dataclass(frozen=True, eq=False)
class TraceStats:
    """Everything `moesim trace stats` reports."""

    model: str
    provenance: str
    phase: str  # whose tokens are described
    requests: int
    tokens: int
    moe_layers: tuple[int, ...]
    experts: int
    top_k: int
    popularity: Floats  # [layers, experts], each layer sums to 1
    skew: Skew
    reuse: Reuse
    lru: Lru
    unique: Unique
    predictability: Predictability | None  # None with one layer or one request
    tasks: TaskStats | None  # None with one task
    phases: PhaseStats | None  # None unless the trace has both


def describe(trace: Trace, seed: int = 0) -> TraceStats:
    """All statistics of a trace; `seed` draws the sampled batches and halves. Raises TraceError if a layer is empty."""
    phase = DECODE if (trace.phase == DECODE).any() else PREFILL
    rows = np.flatnonzero(trace.phase == phase)
    counts = trace.popularity(rows)
    if not counts.any(axis=1).all():
        layer = trace.info.moe_layers[int((~counts.any(axis=1)).argmax())]
        raise TraceError(f"trace of {trace.info.model}: layer {layer} routes no {PHASES[phase]} token; leave it out")
    rng = np.random.default_rng(seed)
    ids = trace.experts[rows]
    present, request = np.unique(trace.request[rows], return_inverse=True)
    names, task = np.unique([trace.requests.task[i] for i in present], return_inverse=True)
    history = look_back(ids, request, trace.info.experts, task[request])
    within, chance = history.within, chance_reuse(counts, rows.size)
    return TraceStats(
        model=trace.info.model,
        provenance=trace.info.provenance,
        phase=PHASES[phase],
        requests=present.size,
        tokens=rows.size,
        moe_layers=trace.info.moe_layers,
        experts=trace.info.experts,
        top_k=trace.top_k,
        popularity=ratio(counts, counts.sum(1, keepdims=True)),
        skew=popularity_skew(counts),
        reuse=Reuse(within, chance, same_request_reuse(ids, request, trace.info.experts)),
        lru=lru_curves(history.distances.sum(0), counts, ids),
        unique=unique_experts(ids, request, counts, rng),
        predictability=layer_predictability(ids, request, trace.info.experts),
        tasks=task_dependence(ids, request, task, tuple(map(str, names)), history, rng=rng) if names.size > 1 else None,
        phases=phase_difference(trace, rng) if np.unique(trace.phase).size > 1 else None,
    )


def popularity_skew(counts: Ints) -> Skew:
    """Skew of choices per expert, [layers, experts]."""
    experts = counts.shape[1]
    share = np.sort(counts / counts.sum(1, keepdims=True), axis=1)[:, ::-1]
    rank = np.arange(1, experts + 1)
    logs = np.log(share, where=share > 0, out=np.zeros_like(share))
    return Skew(
        top_share={f"{s:.0%}": share[:, : slots(s, experts)].sum(1) for s in TOP_SHARES},
        entropy=-(share * logs).sum(1) / np.log(max(experts, 2)),
        gini=(experts + 1 - 2 * (share * rank).sum(1)) / experts,
        zipf=np.array([-_slope(np.log(rank[s > 0]), np.log(s[s > 0])) for s in share]),
    )


def slots(share: float, experts: int) -> int:
    """A share of the experts as a number of them, at least one."""
    return max(1, round(share * experts))


def _slope(x: Floats, y: Floats) -> float:
    spread = ((x - x.mean()) ** 2).sum()
    return float(((x - x.mean()) * y).sum() / spread) if spread else 0.0


def unique_experts(ids: Ids, request: Ints, counts: Ints, rng: np.random.Generator) -> Unique:
    """Mean distinct experts when tokens of B different requests are stepped together, over sampled steps.

    A request takes part in proportion to its length, at a uniformly drawn token: requests in a running batch stand
    at unrelated places. Batches larger than the number of requests are left out.
    """
    tokens, layers, _ = ids.shape
    _, start, size = np.unique(request, return_index=True, return_counts=True)
    batches = np.array([b for b in BATCHES if b <= size.size])
    steps = max(1, min(_STEPS, _DRAWS // size.size))
    keys = np.log(size) + rng.gumbel(size=(steps, size.size))  # the largest: drawn by length without replacement
    picked = np.argsort(-keys, axis=1)[:, : batches[-1]]
    rows = start[picked] + (rng.random(picked.shape) * size[picked]).astype(np.int64)
    experts = counts.shape[1]
    mean = np.empty((layers, batches.size))
    for layer in range(layers):
        seen = np.zeros((steps, experts + 1), dtype=bool)  # the last column takes unused ranks
        for member in range(batches[-1]):
            np.put_along_axis(seen, ids[rows[:, member], layer].astype(np.int64), True, axis=1)
            if member + 1 in batches:
                mean[layer, np.searchsorted(batches, member + 1)] = seen[:, :experts].sum() / steps
    q = counts / tokens
    return Unique(batches, mean, np.stack([(1 - (1 - q) ** b).sum(1) for b in batches], axis=1))


def layer_predictability(ids: Ids, request: Ints, experts: int) -> Predictability | None:
    """Recall of a guess of top_k experts of the next layer: fitted on every other request, judged on the rest."""
    fit = request % 2 == 0  # halves by turns, as traces often list one task after the other
    _, layers, k = ids.shape
    if layers < 2 or fit.all():
        return None
    judged = np.flatnonzero(~fit)
    judged = judged[:: -(-judged.size // _TEST_TOKENS)]
    from_layer, from_popularity = np.empty(layers - 1), np.empty(layers - 1)
    for layer in range(layers - 1):
        given, known, target = ids[judged, layer], ids[fit, layer + 1], ids[judged, layer + 1]
        evidence = lift(pair_counts(ids[fit, layer], known, experts)).astype(np.float32)
        popularity = np.bincount(known[known >= 0], minlength=experts) + 0.5
        score = np.log(popularity) + sum(evidence[given[:, rank]] for rank in range(k))
        from_layer[layer] = recall(np.argpartition(-score, k - 1, axis=1)[:, :k], target)
        from_popularity[layer] = recall(np.argsort(-popularity)[None, :k], target)
    return Predictability(from_layer, from_popularity)


def pair_counts(given: Ids, target: Ids, experts: int) -> Floats:
    """How often expert i of given [tokens, k] met expert j of target in one token: [experts, experts]."""
    pairs = np.zeros(experts**2)
    for i in range(given.shape[1]):
        for j in range(target.shape[1]):
            both = (given[:, i] >= 0) & (target[:, j] >= 0)
            pairs += np.bincount(given[both, i].astype(np.int64) * experts + target[both, j], minlength=experts**2)
    return pairs.reshape(experts, experts)


def lift(pairs: Floats, rare: float = 0.5) -> Floats:
    """log P(j | i) / P(j) from pair counts [.., i, j], with a further row, found by -1, of 0: no expert, no news.

    `rare` pairs are added to every cell, seen and expected: fewer than that say little.
    """
    total = np.maximum(pairs.sum((-2, -1), keepdims=True), 1)
    expected = pairs.sum(-1, keepdims=True) * pairs.sum(-2, keepdims=True) / total
    out = np.zeros((*pairs.shape[:-2], pairs.shape[-2] + 1, pairs.shape[-1]))
    out[..., :-1, :] = np.log((pairs + rare) / (expected + rare))
    return out


def recall(guess: Ints, target: Ids) -> float:
    """Share of the experts in target [tokens, k] that guess [tokens or 1, k] names; nan if there are none."""
    found = (target[:, :, None] == guess[:, None, :]).any(2)
    return float(ratio(found[target >= 0].sum(), (target >= 0).sum()))


def task_dependence(
    ids: Ids, request: Ints, task: Ints, names: tuple[str, ...], history: History, *, rng: np.random.Generator
) -> TaskStats:
    """How popularity depends on the task; task [requests] indexes names, every name has a request."""
    layers, tasks, experts = ids.shape[1], len(names), history.distances.shape[2] - 1
    half = random_halves(task, rng)
    size = np.bincount(request)
    by_task, noise = np.empty((tasks, layers, experts)), np.empty((tasks, layers))
    squares = np.zeros(2)
    for layer in range(layers):
        counts = request_counts(ids[:, layer], request, experts)
        by_task[:, layer] = _shares(sum_by(counts, task, tasks))
        halves = _shares(sum_by(counts, task * 2 + half, tasks * 2))
        noise[:, layer] = np.abs(halves[0::2] - halves[1::2]).sum(1) / 2
        squares += _squares_within_and_total(counts / size[:, None], size, task)
    hits = np.cumsum(history.distances.sum(1), axis=1)
    return TaskStats(
        names=names,
        requests=np.bincount(task),
        tokens=np.bincount(task, size).astype(np.int64),
        next_token_reuse=history.next_token,
        lru_hit=np.stack([ratio(hits[:, slots(s, experts) - 1], hits[:, -1]) for s in QUARTERS], axis=1),
        top_quarter=np.sort(by_task, axis=2)[:, :, -slots(0.25, experts) :].sum(2).mean(1),
        distance=np.stack([np.abs(by_task - one).sum(2).mean(1) / 2 for one in by_task]),
        noise=noise.mean(1),
        explained=_adjusted_r2(squares[0], squares[1], task.size, tasks),
    )


def phase_difference(trace: Trace, rng: np.random.Generator) -> PhaseStats:
    """Prefill against decode popularity of a trace that has both."""
    prefill, decode = (np.flatnonzero(trace.phase == phase) for phase in (PREFILL, DECODE))
    half = random_halves(np.zeros(len(trace.requests), dtype=np.int64), rng)[trace.request[decode]]
    first, second = (_shares(trace.popularity(decode[half == side])) for side in (0, 1))
    request = np.unique(trace.request[prefill], return_inverse=True)[1]
    needed = [
        (request_counts(trace.experts[prefill, layer], request, trace.info.experts) > 0).sum(1).mean()
        for layer in range(trace.layers)
    ]
    difference = _shares(trace.popularity(prefill)) - _shares(trace.popularity(decode))
    return PhaseStats(np.abs(difference).sum(1) / 2, np.abs(first - second).sum(1) / 2, np.array(needed))


def random_halves(label: Ints, rng: np.random.Generator) -> Ints:
    """0 or 1 per item, so that the items of each label fall into two random halves, equal but for one."""
    order = np.lexsort((rng.random(label.size), label))
    within = np.arange(label.size) - np.searchsorted(label[order], label[order])
    half = np.empty(label.size, dtype=np.int64)
    half[order] = within % 2
    return half


def _squares_within_and_total(share: Floats, size: Ints, task: Ints) -> Floats:
    """Sums of squares of requests' popularities [requests, experts] around their task's mean and around all's."""
    weighted = share * size[:, None]
    by_task = sum_by(weighted, task, int(task.max()) + 1) / np.bincount(task, size)[:, None]
    centres = (by_task[task], weighted.sum(0) / size.sum())
    return np.array([(size[:, None] * (share - centre) ** 2).sum() for centre in centres])


def _adjusted_r2(within: float, total: float, items: int, groups: int) -> float:
    if items <= groups or total == 0:
        return float("nan")
    return float(1 - (within / (items - groups)) / (total / (items - 1)))


def sum_by(values: NDArray, label: Ints, groups: int) -> NDArray:
    """Rows of `values` summed by label: [groups, columns]."""
    out = np.zeros((groups, values.shape[1]), dtype=values.dtype)
    np.add.at(out, label, values)
    return out


def _shares(counts: NDArray) -> Floats:
    return ratio(counts, counts.sum(1, keepdims=True))
