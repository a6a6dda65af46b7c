"""`moesim validate published` in words, as tables for docs/accuracy.md, and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.files import write_text
from moesim.output import to_json

WORST = 10
_HEADER = ("metric", "group", "cases", "median", "mean", "bias", "P95", "tau", "in P10-P90")


def text(result: dict[str, Any]) -> str:
    """Scores by metric and group, the worst cases, and what was not predicted or not scored."""
    rows = [_HEADER, *_score_rows(result)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [f"published measurements: {result['status'].upper()}", ""]
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        lines.append("  ".join([left, *(cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True))]))
    lines += ["", "worst"]
    for case in _worst(result):
        lines.append(
            f"  {case['error']:+7.0%}  {case['id']:10} {case['metric']} {case['measured']:g}, predicted "
            f"{case['predicted']:.4g} ({case['low']:.4g} to {case['high']:.4g}): {case['system']}, {case['model']}; "
            f"limited by {case['bottleneck']}" + (f"; assumed: {case['assumed']}" if case["assumed"] else "")
        )
    lines += ["", *_remarks(result)]
    return "\n".join(lines)


def _score_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric, summary in result["summary"].items():
        tolerance = result["tolerances"][metric]
        for group, score in [("all", summary), *summary["groups"].items()]:
            error = score["median_points"] if metric == "hit_rate" else score["median_abs_error"]
            mark = "" if error <= tolerance or group == "all" else "!"
            rows.append((
                metric if group == "all" else "", group, str(score["cases"]), f"{error:.1%}{mark}",
                f"{score['mean_abs_error']:.1%}", f"{score['signed_bias']:+.1%}", f"{score['p95']:.1%}",
                "-" if score["kendall_tau"] is None else f"{score['kendall_tau']:.2f}",
                "-" if score["coverage"] is None else f"{score['coverage']:.0%}",
            ))  # fmt: skip
    return rows


def _worst(result: dict[str, Any]) -> list[dict[str, Any]]:
    scored = [row for row in result["cases"] if "error" in row and row["trust"] != "low"]
    return sorted(scored, key=lambda row: -abs(row["error"]))[:WORST]


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['not_scored']} cases of low trust are predicted, not scored"] if result["not_scored"] else []
    for row in result["cases"]:
        if "error" not in row:
            lines.append(f"{row['id']}: not predicted: {row['status']}: {row['reason']}")
    lines.append("! over the tolerance; hit_rate in points; median, mean and P95 of absolute errors")
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/accuracy.md."""
    lines = [f"| {' | '.join(_HEADER)} |", "|---|---|" + "--:|" * (len(_HEADER) - 2)]
    lines += [f"| {' | '.join(row)} |" for row in _score_rows(result)]
    lines += ["", "| case | system, model, machine | metric | measured | predicted | P10 to P90 | error |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    for row in result["cases"]:
        if "error" in row:
            lines.append(
                f"| {row['id']}{' (low trust)' if row['trust'] == 'low' else ''} | {row['system']}, "
                f"{row['model'].rpartition('/')[2]}, {row['machine']} | {row['metric']} | {row['measured']:g} | "
                f"{row['predicted']:.4g} | {row['low']:.4g} to {row['high']:.4g} | {row['error']:+.0%} |"
            )
    return "\n".join(lines)


def save(result: dict[str, Any], directory: Path) -> None:
    """published.json, published.md and, where plotly is installed, the page published.html."""
    write_text(directory / "published.json", to_json(result) + "\n")
    write_text(directory / "published.md", markdown(result) + "\n")
    try:
        import plotly  # noqa: F401
    except ImportError:
        return
    from moesim.plots import predicted_against_measured, write_page

    figures = []
    for metric in result["summary"]:
        points: dict[str, list[tuple[float, float, str]]] = {}
        for row in result["cases"]:
            if "error" in row and row["metric"] == metric:
                points.setdefault(row["group"], []).append((row["measured"], row["predicted"], row["id"]))
        figures.append(predicted_against_measured(metric, points, result["tolerances"][metric]))
    write_page(directory / "published.html", "Published measurements", result["status"], figures, text(result))
