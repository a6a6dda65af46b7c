"""A saved run as one self-contained page: what `moesim replay -o` wrote, drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import MoesimError
from moesim.metrics import CAUSES
from moesim.output import to_json
from moesim.page import format_run
from moesim.plots import latency_distribution, shares_of_layers, stacked_memory, steps_over_time, value_bars, write_page
from moesim.question import ANCHORS, Run
from moesim.records import Records

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_SUMMARY_BYTES, MAX_ROWS = 1 << 24, 20_000_000
POINTS = 1500  # of a line over time
LOOKUPS = ("hits", "lates", "misses")


def write_report(directory: Path, output: Path) -> dict[str, Any]:
    """Write the page of the run in `directory`; returns its summary. Raises MoesimError where there is none."""
    summary = read_summary(directory)
    try:
        text = format_run(Run(summary, Records(False), ()))
        inputs = summary["inputs"]
        title = f"{inputs['system']['name']} serving {inputs['model']['name']} on {inputs['machine']['name']}"
        details = f"{text}\n\narguments\n{to_json(inputs['arguments'])}\n\nsystem\n{to_json(inputs['system'])}"
        shown = list(figures(summary, directory))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MoesimError(
            f"{directory / 'summary.json'}: not a summary of this moesim ({error!r}); run 'moesim replay -o' again"
        ) from error
    write_page(output, title, _lead(summary), shown, details)
    return summary


def read_summary(directory: Path) -> dict[str, Any]:
    """summary.json of a run's directory. Raises MoesimError by file, rule and remedy."""
    path = directory / "summary.json"
    if not path.is_file():
        raise MoesimError(f"{directory}: holds no summary.json; make one with 'moesim replay TRACE -o {directory}'")
    if path.stat().st_size > MAX_SUMMARY_BYTES:
        raise MoesimError(f"{path}: larger than {MAX_SUMMARY_BYTES} bytes, so it is no summary of moesim")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise MoesimError(f"{path}: not JSON ({error}); run 'moesim replay -o' again") from error
    if not isinstance(summary, dict):
        raise MoesimError(f"{path}: must be one JSON object; run 'moesim replay -o' again")
    return summary


def _lead(s: dict[str, Any]) -> str:
    inputs, m = s["inputs"], s["metrics"]
    parts = [f"{s['status']}" + (f": {s['status_reason']}." if s["status_reason"] else ".")]
    if m:
        parts.append(f"{m['output_throughput']:.4g} output tok/s; limited by {s['bottleneck']['explanation']}.")
    parts.append(f"Costs: {inputs['costs']}; {inputs['trace']['provenance']} routing.")
    return " ".join(parts)


def figures(s: dict[str, Any], directory: Path) -> Iterator[Figure]:
    """Everything there is to draw of the run saved in `directory`."""
    if s["metrics"]:
        path = {CAUSES[cause]: 100 * share for cause, share in s["bottleneck"]["critical_path"].items()}
        yield value_bars("Where the critical path goes", "share of the time serving (%)", path)
        if "anchors" in s:
            sample = s["anchors"]["of_sample"]
            rows = {"this policy": sample["policy"]} | {name: s["anchors"][name] for name in ANCHORS}
            speeds = {
                name.replace("_", " ") + ("" if row.get("fits", True) else " (does not fit)"): row["output_throughput"]
                for name, row in rows.items()
                if "error" not in row
            }
            what = f"output tok/s on the first {sample['requests']} requests"
            yield value_bars("Beside the four anchors", what, speeds)
    tiers = {"GPU": "gpu_bytes", "host": "host_bytes", "NVMe": "nvme_bytes"}
    yield stacked_memory({tier: s["memory"][key] for tier, key in tiers.items() if s["memory"][key]})
    if s["metrics"]:
        yield from _from_tables(directory)


def _from_tables(directory: Path) -> Iterator[Figure]:
    requests = _columns(directory / "requests.parquet", ("sent", "first_token", "finished", "output_tokens"))
    if requests:
        sent, first, last, tokens = requests.values()
        many = tokens > 1
        times = {"TTFT": first - sent, "E2EL": last - sent}
        if many.any():
            times["TPOT"] = (last - first)[many] / (tokens[many] - 1)
        yield latency_distribution({name: np.sort(values) / 1e6 for name, values in times.items()})
    steps = _columns(directory / "steps.parquet", ("start", "end"))
    if steps:
        yield steps_over_time(*_thinned(steps["start"] / 1e9, (steps["end"] - steps["start"]) / 1e6))
    layers = _columns(directory / "layers.parquet", ("layer", *LOOKUPS))
    if layers:
        number = layers.pop("layer")
        sums = {name: np.bincount(number, weights=values) for name, values in layers.items()}
        total = np.maximum(sum(sums.values()), 1)
        yield shares_of_layers({name: 100 * values / total for name, values in sums.items()})


def _columns(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """int64 columns of a table; empty where the run kept none."""
    if not path.exists():
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows > MAX_ROWS:
            raise MoesimError(f"{path}: {file.metadata.num_rows} rows, more than {MAX_ROWS}; report a shorter run")
        table = file.read(list(names))
        columns = {name: table.column(name).to_numpy().astype(np.int64) for name in names}
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise MoesimError(f"{path}: not a table of a run ({reason}); run 'moesim replay -o' again") from error
    return columns if len(table) else {}


def _thinned(at: Any, values: Any) -> tuple[Any, Any, Any, Any]:
    """At most POINTS stretches of as many values each: their start, and lowest, median and highest value."""
    pieces = np.array_split(np.arange(len(at)), min(POINTS, len(at)))
    low, middle, high = (np.array([f(values[p]) for p in pieces]) for f in (np.min, np.median, np.max))
    return np.array([at[p[0]] for p in pieces]), low, middle, high
