"""What a sweep found: which choices varied, which points come first, how a metric moves along an axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import SweepError, nearest
from moesim.plan.results import AXES, METRICS, Row, read_rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHOWN = (*METRICS, "exact", "ceiling_reached")
# All other metrics are costs: times, bytes, misses.
HIGHER = {"completed", "hits", "hit_rate", "exact", "ceiling_reached", "prefetch_precision", "prefetch_useful_bytes"}
BESIDE = ("output_throughput", "mean_tpot_ms", "mean_ttft_ms", "hit_rate", "h2d_bytes_per_token")
_BARS = 20


@dataclass(frozen=True)
class View:
    """axes: what varied, with its values in order; ranked: points with an answer, best first; unanswered: the rest."""

    by: str
    axes: dict[str, list[Any]]
    ranked: list[Row]
    unanswered: list[Row]


def higher_is_better(metric: str) -> bool:
    return metric in HIGHER or metric.endswith("throughput")


def view(folder: Path, by: str = "output_throughput") -> View:
    """The points in `folder`, ranked. Raises SweepError for an unknown metric or a directory without results."""
    if by not in SHOWN:
        raise SweepError(f"--by {by}: no such metric{nearest(by, SHOWN)}")
    columns = ["status", "reason", "limited_by", "model_name", *AXES, *SHOWN]
    rows = read_rows(folder, columns)
    for row in rows:  # every changed choice is an axis of its own
        row |= {k: _read(v) for k, _, v in (s.partition("=") for s in _settings(row.pop("settings") or ""))}
    names = list(dict.fromkeys(name for row in rows for name in row if name not in (*SHOWN, "id", "reason")))
    values = {name: _ordered({row.get(name) for row in rows}) for name in names}
    axes = {n: v for n, v in values.items() if len(v) > 1 and n not in ("status", "limited_by", "model_name")}
    rows.sort(key=lambda row: [v.index(row.get(name)) for name, v in axes.items()])
    answered = [row for row in rows if row[by] is not None]
    answered.sort(key=lambda row: -row[by] if higher_is_better(by) else row[by])
    return View(by, axes, answered, [row for row in rows if row[by] is None])


def _settings(text: str) -> list[str]:
    """Settings as they were joined; a value may hold commas, but a setting holds a `=` before any bracket."""
    found: list[str] = []
    for piece in text.split(", "):
        if "=" in piece.partition("(")[0] or not found:
            found.append(piece)
        else:
            found[-1] += f", {piece}"
    return [setting for setting in found if setting]


def _read(text: str) -> Any:
    """A setting's value, as a number where it is one."""
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def _ordered(values: set[Any]) -> list[Any]:
    """Numbers by size, names by the alphabet, then what is absent."""
    return sorted(
        values, key=lambda v: (v is None, isinstance(v, str), v if isinstance(v, (int, float)) else 0, str(v))
    )


def to_dict(view: View, top: int) -> dict[str, Any]:
    """What `moesim sweep show --json` prints."""
    kept = ("id", "status", "reason", "limited_by", *view.axes)
    return {
        "by": view.by,
        "higher_is_better": higher_is_better(view.by),
        "points": len(view.ranked) + len(view.unanswered),
        "axes": view.axes,
        "ranking": [{k: row.get(k) for k in (*kept, *SHOWN)} for row in view.ranked[:top]],
        "unanswered": [{k: row.get(k) for k in kept} for row in view.unanswered],
    }


def text(view: View, x: str | None, top: int) -> str:
    """The best points as a table, the best along `x`, and what has no answer."""
    total = len(view.ranked) + len(view.unanswered)
    fixed = "" if view.axes else "; nothing varied"
    lines = [f"{total} points, by {view.by} ({'highest' if higher_is_better(view.by) else 'lowest'} first){fixed}", ""]
    if view.ranked:
        lines += _table(view, view.ranked[:top])
    if x is not None:
        lines += ["", f"the best at each {x}:", "", *_table(view, list(best_along(view, x).values()))]
    for status in sorted({row["status"] for row in view.unanswered}):
        found = [row for row in view.unanswered if row["status"] == status]
        reasons = list(dict.fromkeys(str(row["reason"]) for row in found))
        lines += ["", f"{status}: {len(found)} points without an answer, {len(reasons)} reasons, such as: {reasons[0]}"]
    return "\n".join(lines)


def best_along(view: View, x: str) -> dict[Any, Row]:
    """The best point for every value of axis `x`, in the axis's order."""
    best: dict[Any, Row] = {}
    for row in view.ranked:
        best.setdefault(row.get(x), row)
    return {value: best[value] for value in _axis(view, x) if value in best}


def _axis(view: View, x: str) -> list[Any]:
    if x not in view.axes:
        known = nearest(x, view.axes) if view.axes else "; nothing varied"
        raise SweepError(f"--x {x}: no axis of this sweep{known}")
    return view.axes[x]


def _table(view: View, rows: Sequence[Row]) -> list[str]:
    metrics = list(dict.fromkeys([view.by, *BESIDE]))
    head = [*view.axes, *metrics, "status", "limited_by"]
    body = [[_cell(row.get(name)) for name in head] for row in rows]
    width = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    left = len(view.axes)  # axes to the left, numbers to the right
    return [
        "  ".join(
            c.ljust(w) if i < left or i >= left + len(metrics) else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, width, strict=True))
        ).rstrip()
        for line in [head, *body]
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


# -- figures ------------------------------------------------------------------------------------------------------


def figures(view: View, x: str | None) -> list[Figure]:
    """The metric along an axis, series by the next axis, and the best points as bars."""
    from moesim import plots

    if not view.ranked:
        raise SweepError("no point has an answer, so there is nothing to plot; 'moesim sweep show' says why")
    if not view.axes:
        raise SweepError("nothing varied in this sweep, so there is nothing to plot; add an axis")
    x = x or _most_numeric(view)
    series = next((name for name in ("policy", *view.axes) if name in view.axes and name != x), None)
    others = [name for name in view.axes if name not in (x, series)]
    numeric = all(isinstance(value, (int, float)) for value in _axis(view, x))
    drawn = {}
    for value in view.axes[series] if series else [None]:
        rows = [row for row in view.ranked if not series or row.get(series) == value]
        if rows:
            points = [(row.get(x) if numeric else _cell(row.get(x)), row[view.by], _label(row, others)) for row in rows]
            drawn[_cell(value) if series else view.by] = points
    order = None if numeric else [_cell(value) for value in view.axes[x]]
    best = [(_label(row, list(view.axes)), row[view.by]) for row in view.ranked[:_BARS]]
    return [
        plots.sweep_lines(x, view.by, series, drawn, order, bool(others), higher_is_better(view.by)),
        plots.sweep_ranking(view.by, best),
    ]


def _most_numeric(view: View) -> str:
    """The axis worth a scale: numbers, of which the most; else the one of the most values."""
    numbers = {n: v for n, v in view.axes.items() if all(isinstance(value, (int, float)) for value in v)}
    return max(numbers or view.axes, key=lambda name: len(view.axes[name]))


def _label(row: Row, names: Sequence[str]) -> str:
    return ", ".join(_cell(row.get(n)) if n in ("policy", "machine") else f"{n} {_cell(row.get(n))}" for n in names)
