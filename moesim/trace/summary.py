"""Trace statistics in few numbers and in words."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moesim.trace.locality import Floats
from moesim.trace.stats import QUARTERS, TraceStats, slots

_WIDEST = 8  # tasks whose differences are printed as a table


def headline(stats: TraceStats) -> dict[str, float]:
    """The statistics as single numbers, means over layers; shares are of 1. What two traces are compared by."""
    out = {f"top_{name.rstrip('%')}_share": float(share.mean()) for name, share in stats.skew.top_share.items()}
    out |= {name: float(getattr(stats.skew, name).mean()) for name in ("entropy", "gini", "zipf")}
    out |= {f"reuse_{window}": float(share.mean()) for window, share in stats.reuse.within.items()}
    out |= {"reuse_1_chance": float(stats.reuse.chance[1].mean())}
    out |= {"reuse_same_request": float(stats.reuse.same_request.mean())}
    for share, (_, index) in zip(QUARTERS, cache_sizes(stats), strict=True):
        out[f"lru_hit_{share:.0%}".rstrip("%")] = float(1 - stats.lru.miss_ratio[:, index].mean())
    out |= {f"unique_{b}": float(stats.unique.mean[:, i].mean()) for i, b in enumerate(stats.unique.batches)}
    if stats.predictability:
        out["next_layer_recall"] = float(stats.predictability.from_layer.mean())
        out["next_layer_recall_by_popularity"] = float(stats.predictability.from_popularity.mean())
    if stats.tasks:
        out["task_distance"] = between_tasks(stats.tasks.distance)
        out["task_explained"] = stats.tasks.explained
    if stats.phases:
        out["phase_distance"] = float(stats.phases.distance.mean())
    return out


def cache_sizes(stats: TraceStats) -> list[tuple[int, int]]:
    """Experts per layer nearest to 25, 50 and 75 % of them that hold one token's, and their places in the LRU curve."""
    sizes = [max(stats.top_k, slots(share, stats.experts)) for share in QUARTERS]
    return [(size, size - stats.top_k) for size in sizes]


def between_tasks(distance: Floats) -> float:
    """Mean over pairs of different tasks."""
    return float(distance[~np.eye(len(distance), dtype=bool)].mean())


def compare(original: TraceStats, drawn: TraceStats) -> list[dict[str, float | str]]:
    """Headlines side by side, and how far single layers' LRU hit ratios are apart at most."""
    ours, theirs = headline(original), headline(drawn)
    rows: list[dict[str, float | str]] = [
        {
            "statistic": name,
            "original": ours[name],
            "drawn": theirs[name],
            "ratio": theirs[name] / (ours[name] or np.nan),
        }
        for name in ours
        if name in theirs
    ]
    for share, (_, index) in zip(QUARTERS, cache_sizes(original), strict=True):
        hits = 1 - original.lru.miss_ratio[:, index], 1 - drawn.lru.miss_ratio[:, index]
        layer = int(np.abs(hits[0] - hits[1]).argmax())
        row = {"original": float(hits[0][layer]), "drawn": float(hits[1][layer])}
        name = f"lru_hit_{100 * share:.0f} of layer {original.moe_layers[layer]}, the furthest off"
        rows.append({"statistic": name, **row, "ratio": row["drawn"] / (row["original"] or np.nan)})
    return rows


def comparison_text(rows: list[dict[str, float | str]]) -> str:
    """The rows of `compare` as a table."""
    head = ["statistic", "original", "drawn", "ratio"]
    return _table([head, *([str(r["statistic"]), *(f"{r[name]:.3f}" for name in head[1:])] for r in rows)])


def verdict(stats: TraceStats) -> str:
    """One line: is this routing cacheable, predictable, task-dependent? docs/trace-statistics.md has the limits."""
    size, index = cache_sizes(stats)[1]
    miss, random = stats.lru.miss_ratio[:, index].mean(), 1 - size / stats.experts
    static = stats.lru.static[:, index].mean()
    answers = [
        f"cacheable: {_grade(1 - miss / random if random else 1.0, 0.5, 0.2)} (LRU with {size} of {stats.experts} "
        f"experts hits {1 - miss:.0%}, the best fixed set {1 - static:.0%}, a random one {1 - random:.0%})"
    ]
    if stats.predictability:
        found, base = stats.predictability.from_layer.mean(), stats.predictability.from_popularity.mean()
        answers.append(
            f"predictable: {_grade((found - base) / (1 - base) if base < 1 else 1.0, 0.4, 0.15)} (one layer's experts "
            f"find {found:.0%} of the next layer's, popularity {base:.0%})"
        )
    if stats.tasks:
        noise = stats.tasks.noise[~np.isnan(stats.tasks.noise)]
        halves = f", halves of one task by {noise.mean():.2f}" if noise.size else ""
        share = stats.tasks.explained
        explained = "" if np.isnan(share) else f"; the task explains {share:.0%} of how requests differ"
        answers.append(
            f"task-dependent: {_grade(share, 0.25, 0.05)} (tasks differ by "
            f"{between_tasks(stats.tasks.distance):.2f}{halves}{explained})"
        )
    return "; ".join(answers)


def _grade(value: float, much: float, some: float) -> str:
    if np.isnan(value):
        return "unknown"
    return "yes" if value >= much else "somewhat" if value >= some else "no"


def text(stats: TraceStats) -> str:
    """The statistics as tables, and the verdict."""
    layers = stats.moe_layers
    title = (
        f"{stats.model}, {stats.provenance} routing: {stats.tokens} {stats.phase} tokens of {stats.requests} requests, "
        f"top-{stats.top_k} of {stats.experts} experts, {len(layers)} MoE layers ({layers[0]} to {layers[-1]})"
    )
    parts = [title, _skew_text(stats), _reuse_text(stats), _lru_text(stats), _unique_text(stats)]
    if stats.predictability:
        parts.append(_predictability_text(stats))
    if stats.tasks:
        parts.append(_tasks_text(stats))
    if stats.phases:
        parts.append(_phases_text(stats))
    return "\n\n".join([*parts, "Verdict: " + verdict(stats)])


def _skew_text(stats: TraceStats) -> str:
    rows = [["popularity", "mean", "least skewed layer", "most skewed layer"]]
    for name, share in stats.skew.top_share.items():
        rows.append([f"share of the top {name} of experts", *map(_percent, (share.mean(), share.min(), share.max()))])
    skew = stats.skew
    for label, low, high in (
        ("entropy (1 = flat)", skew.entropy.max(), skew.entropy.min()),
        ("Gini (0 = flat)", skew.gini.min(), skew.gini.max()),
        ("Zipf exponent", skew.zipf.min(), skew.zipf.max()),
    ):
        mean = getattr(skew, label.split()[0].lower()).mean()
        rows.append([label, *(f"{value:.2f}" for value in (mean, low, high))])
    return _table(rows)


def _reuse_text(stats: TraceStats) -> str:
    rows = [["a token's experts its request used", "measured", "independent tokens"]]
    for window, share in stats.reuse.within.items():
        label = "in the previous token" if window == 1 else f"in the previous {window}"
        rows.append([label, _percent(share.mean()), _percent(stats.reuse.chance[window].mean())])
    rows.append(["in a random other token of it", _percent(stats.reuse.same_request.mean()), ""])
    return _table(rows)


def _lru_text(stats: TraceStats) -> str:
    sizes = cache_sizes(stats)
    rows = [["choices hit, experts cached per layer", *(f"{c} ({c / stats.experts:.0%})" for c, _ in sizes)]]
    lru = stats.lru
    found = (
        ("LRU", lru.miss_ratio.mean(0)),
        ("LRU, worst layer", lru.miss_ratio.max(0)),
        ("LRU, one cache for all layers", lru.shared),
        ("Belady's, which looks ahead", lru.belady.mean(0)),
        ("best fixed set, in hindsight", lru.static.mean(0)),
    )
    rows += [[label, *(_percent(1 - miss[index]) for _, index in sizes)] for label, miss in found]
    rows.append(["random fixed set", *(_percent(1 - stats.lru.random[index]) for _, index in sizes)])
    return _table(rows)


def _unique_text(stats: TraceStats) -> str:
    unique = stats.unique
    rows = [["distinct experts per layer, batch of", *map(str, unique.batches)]]
    for label, values in (("measured", unique.mean), ("independent tokens", unique.independent)):
        rows.append([label, *(f"{value:.1f}" for value in values.mean(0))])
    return _table(rows)


def _predictability_text(stats: TraceStats) -> str:
    assert stats.predictability is not None
    rows = [[f"next layer's experts in a guess of {stats.top_k}", "mean", "worst layer", "best layer"]]
    found = (("from this layer's experts", "from_layer"), ("from popularity", "from_popularity"))
    for label, name in found:
        share = getattr(stats.predictability, name)
        rows.append([label, *map(_percent, (share.mean(), share.min(), share.max()))])
    return _table(rows)


def _tasks_text(stats: TraceStats) -> str:
    tasks = stats.tasks
    assert tasks is not None
    names = [name or "(none)" for name in tasks.names]
    size = cache_sizes(stats)[1][0]
    rows = [["task", "requests", "tokens", "next-token reuse", f"LRU hit, {size} experts", "top 25% share"]]
    for i, name in enumerate(names):
        shares = (tasks.next_token_reuse[i], tasks.lru_hit[i, 1], tasks.top_quarter[i])
        rows.append([name, str(tasks.requests[i]), str(tasks.tokens[i]), *map(_percent, shares)])
    if len(names) > _WIDEST:
        return _table(rows) + f"\n\ndifferences between {len(names)} tasks: see --plot or --json"
    distances = [["difference of popularity (0 to 1)", *names, "between halves"]]
    for name, row, noise in zip(names, tasks.distance, tasks.noise, strict=True):
        distances.append([name, *(f"{value:.2f}" for value in row), "-" if np.isnan(noise) else f"{noise:.2f}"])
    return _table(rows) + "\n\n" + _table(distances)


def _phases_text(stats: TraceStats) -> str:
    phases = stats.phases
    assert phases is not None
    rows = [
        ["prefill against decode", "mean", "least layer", "most layer"],
        ["difference of popularity (0 to 1)", *_spread(phases.distance)],
        ["between halves of the decode tokens", *_spread(phases.noise)],
        ["distinct experts a prompt needs", *_spread(phases.prompt_experts, 1)],
    ]
    return _table(rows)


def _spread(values: Floats, digits: int = 2) -> list[str]:
    return [f"{value:.{digits}f}" for value in (values.mean(), values.min(), values.max())]


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{share:.1%}"


def _table(rows: Iterable[list[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    rows = list(rows)
    width = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        [row[0].ljust(width[0]), *(cell.rjust(w) for cell, w in zip(row[1:], width[1:], strict=True))] for row in rows
    )
    return "\n".join("  ".join(line).rstrip() for line in lines)
