"""A saved run as one self-contained page: what `moesim replay -o` wrote, drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import MoesimError
from moesim.output import to_json
from moesim.page import format_run
from moesim.plots import write_page
from moesim.question import Run
from moesim.records import Records
from moesim.run_figures import figures_of

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_SUMMARY_BYTES, MAX_ROWS = 1 << 24, 20_000_000


def write_report(directory: Path, output: Path) -> dict[str, Any]:
    """Write the page of the run in `directory`; returns its summary. Raises MoesimError where there is none."""
    summary = read_summary(directory)
    try:
        text = format_run(Run(summary, Records(False), ()))
        inputs = summary["inputs"]
        title = f"{inputs['system']['name']} serving {inputs['model']['name']} on {inputs['machine']['name']}"
        details = f"{text}\n\narguments\n{to_json(inputs['arguments'])}\n\nsystem\n{to_json(inputs['system'])}"
        shown = figures(summary, directory).values()
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


def figures(s: dict[str, Any], directory: Path) -> dict[str, Figure]:
    """Everything there is to draw of the run saved in `directory`, by name."""
    return dict(figures_of(s, lambda table, names: _columns(directory / f"{table}.parquet", names)))


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
