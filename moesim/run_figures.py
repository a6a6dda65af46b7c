"""What there is to draw of one run, by name, from its summary and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.metrics import CAUSES, QUEUE, queue_depth
from moesim.plots import (
    latency_distribution,
    queue_over_time,
    shares_of_layers,
    stacked_memory,
    steps_over_time,
    value_bars,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

POINTS = 1500  # of a line over time
LOOKUPS = ("hits", "lates", "misses")
# (table, columns) -> int64 arrays by column; empty where the run kept no such table.
Columns = Callable[[str, tuple[str, ...]], dict[str, Any]]


def figures_of(s: dict[str, Any], columns: Columns) -> Iterator[tuple[str, Figure]]:
    """`critical path`, `anchors`, `memory`, `latency`, `steps`, `queue` and `layers`, as far as the run has them."""
    if s["metrics"]:
        path = {CAUSES[cause]: 100 * share for cause, share in s["bottleneck"]["critical_path"].items()}
        yield "critical path", value_bars("Where the critical path goes", "share of the time serving (%)", path)
        if "anchors" in s:
            yield "anchors", _anchors(s["anchors"])
    tiers = {"GPU": "gpu_bytes", "host": "host_bytes", "NVMe": "nvme_bytes"}
    yield "memory", stacked_memory({tier: s["memory"][key] for tier, key in tiers.items() if s["memory"][key]})
    if s["metrics"]:
        yield from _from_tables(columns)


def _anchors(anchors: dict[str, Any]) -> Figure:
    sample = anchors["of_sample"]
    rows = {"this policy": sample["policy"]} | {name: row for name, row in anchors.items() if name != "of_sample"}
    speeds = {
        name.replace("_", " ") + ("" if row.get("fits", True) else " (does not fit)"): row["output_throughput"]
        for name, row in rows.items()
        if "error" not in row
    }
    return value_bars("Beside the four anchors", f"output tok/s on the first {sample['requests']} requests", speeds)


def _from_tables(columns: Columns) -> Iterator[tuple[str, Figure]]:
    requests = columns("requests", ("sent", "first_token", "finished", "output_tokens"))
    if requests:
        sent, first, last, tokens = requests.values()
        many = tokens > 1
        times = {"TTFT": first - sent, "E2EL": last - sent}
        if many.any():
            times["TPOT"] = (last - first)[many] / (tokens[many] - 1)
        yield "latency", latency_distribution({name: np.sort(values) / 1e6 for name, values in times.items()})
    steps = columns("steps", ("start", "end"))
    if steps:
        yield "steps", steps_over_time(*_thinned(steps["start"] / 1e9, (steps["end"] - steps["start"]) / 1e6))
    times = columns("requests", QUEUE)
    if steps and times:
        waiting, running = queue_depth(times, steps["start"])
        at, _, _, most = _thinned(steps["start"] / 1e9, waiting)
        yield "queue", queue_over_time(at, most, _thinned(steps["start"], running)[3])
    layers = columns("layers", ("layer", *LOOKUPS))
    if layers:
        number = layers.pop("layer")
        sums = {name: np.bincount(number, weights=values) for name, values in layers.items()}
        total = np.maximum(sum(sums.values()), 1)
        yield "layers", shares_of_layers({name: 100 * values / total for name, values in sums.items()})


def _thinned(at: Any, values: Any) -> tuple[Any, Any, Any, Any]:
    """At most POINTS stretches of as many values each: their start, and lowest, median and highest value."""
    pieces = np.array_split(np.arange(len(at)), min(POINTS, len(at)))
    low, middle, high = (np.array([f(values[p]) for p in pieces]) for f in (np.min, np.median, np.max))
    return np.array([at[p[0]] for p in pieces]), low, middle, high
