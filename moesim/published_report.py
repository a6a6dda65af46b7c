"""`moesim validate published` in words, as tables for docs/accuracy.md, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.files import write_text
from moesim.output import to_json
from moesim.published import SPLITS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WORST = 10
_HEADER = ("metric", "group", "cases", "median", "mean", "bias", "P95", "tau", "regret", "in P10-P90")
_REGIMES = ("regime", "cases", "median", "mean", "bias", "P95", "in P10-P90")
_BANDS = ("basis", "sources", "cases", "costs", "own", "own, one source left out", "in P10-P90", "mean over sources")


def text(result: dict[str, Any]) -> str:
    """Scores by metric and group, the worst cases, and what was not predicted or not scored."""
    lines = [f"published measurements: {result['status'].upper()}", ""]
    lines += _columns([_HEADER, *_score_rows(result)], 2)
    lines += ["", "by regime, errors of speed", *_columns([_REGIMES, *_regime_rows(result)], 1)]
    lines += ["", "bands, fitted to these rows", *_columns([_BANDS, *_band_rows(result)], 1)]
    lines += ["", "worst"]
    for case in _worst(result):
        lines.append(
            f"  {case['error']:+7.0%}  {case['id']:10} {case['metric']} {case['measured']:g}, predicted "
            f"{case['predicted']:.4g} ({case['low']:.4g} to {case['high']:.4g}): {case['system']}, {case['model']}; "
            f"limited by {case['bottleneck']}" + (f"; assumed: {case['assumed']}" if case["assumed"] else "")
        )
    lines += ["", *_remarks(result)]
    return "\n".join(lines)


def _columns(rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    """Cells below each other, the first `left` columns aligned to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _score_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for metric, summary in result["summary"].items():
        tolerance = result["tolerances"][metric]
        splits = [(name, summary[name.replace(" ", "_")]) for name in SPLITS if name.replace(" ", "_") in summary]
        for group, score in [("all", summary), *splits, *summary["groups"].items()]:
            error = score["median_points"] if metric == "hit_rate" else score["median_abs_error"]
            mark = "!" if error > tolerance and group in summary["groups"] else ""
            rows.append((
                metric if group == "all" else "", group, str(score["cases"]), f"{error:.1%}{mark}",
                f"{score['mean_abs_error']:.1%}", f"{score['signed_bias']:+.1%}", f"{score['p95']:.1%}",
                _or_dash(score["kendall_tau"], ".2f"), _or_dash(score["top1_regret"], ".1%"),
                _or_dash(score["coverage"], ".0%"),
            ))  # fmt: skip
    return rows


def _regime_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            regime, str(score["cases"]), f"{score['median_abs_error']:.1%}", f"{score['mean_abs_error']:.1%}",
            f"{score['signed_bias']:+.1%}", f"{score['p95']:.1%}", _or_dash(score["coverage"], ".0%"),
        )
        for regime, score in result["regimes"].items()
    ]  # fmt: skip


def _band_rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for basis, covered in result["covered"].items():
        fits = [band for band in result["bands"] if band["basis"] == basis]
        whole = next((f"{b['costs']:g}", f"{b['own']:g}") for b in fits if not b["without"]) if fits else ("", "")
        own = sorted(band["own"] for band in fits if band["without"])
        rows.append((
            basis, str(covered["sources"]), str(covered["cases"]), *whole,
            f"{own[0]:g} to {own[-1]:g}" if own else "", f"{covered['by_case']:.0%}", f"{covered['by_source']:.0%}",
        ))  # fmt: skip
    return rows


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _worst(result: dict[str, Any]) -> list[dict[str, Any]]:
    scored = [row for row in result["cases"] if "error" in row and row["trust"] != "low"]
    return sorted(scored, key=lambda row: -abs(row["error"]))[:WORST]


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['not_scored']} cases of low trust are predicted, not scored"] if result["not_scored"] else []
    for row in result["cases"]:
        if "error" not in row:
            lines.append(f"{row['id']}: not predicted: {row['status']}: {row['reason']}")
    lines.append("! over the tolerance; hit_rate in points; median, mean and P95 of absolute errors")
    lines.append("regret: how much worse than a source's best what is predicted best was measured to be, on average")
    lines.append(
        "P10-P90 of a source is fitted to all others; costs: share of the costs' band that counts, own: log of a factor"
    )
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/accuracy.md."""
    lines = [*_table(_HEADER, _score_rows(result), 2), ""]
    lines += [*_table(_REGIMES, _regime_rows(result), 1), "", *_table(_BANDS, _band_rows(result), 1)]
    lines += ["", "| case | system, model, machine | metric | measured | predicted | P10 to P90 | error |"]
    lines += ["|---|---|---|--:|--:|--:|--:|"]
    for row in result["cases"]:
        found = f"{row['status']} |  | "
        if "error" in row:
            found = f"{row['predicted']:.4g} | {row['low']:.4g} to {row['high']:.4g} | {row['error']:+.0%}"
        lines.append(
            f"| {row['id']}{' (low trust)' if row['trust'] == 'low' else ''} | {row['system']}, "
            f"{row['model'].rpartition('/')[2]}, {row['machine']} | {row['metric']} | {row['measured']:g} | {found} |"
        )
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int) -> list[str]:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * left + "--:|" * (len(header) - left)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def save(result: dict[str, Any], directory: Path) -> None:
    """published.json, published.md, the bands these rows would make (the format of moesim/data/model_error.csv) and,
    where plotly is installed, the page published.html."""
    write_text(directory / "published.json", to_json(result) + "\n")
    write_text(directory / "published.md", markdown(result) + "\n")
    bands = [f"{b['basis']},{b['without']},{b['costs']:g},{b['own']:g}" for b in result["bands"]]
    write_text(directory / "model_error.csv", "\n".join(["basis,without,costs,own", *bands]) + "\n")
    try:
        import plotly  # noqa: F401
    except ImportError:
        return
    from moesim.plots import write_page

    drawn = figures(result).values()
    write_page(directory / "published.html", "Published measurements", result["status"], drawn, text(result))


def figures(result: dict[str, Any]) -> dict[str, Figure]:
    """Predicted against measured, by metric; groups of cases apart."""
    from moesim.plots import predicted_against_measured

    drawn = {}
    for metric in result["summary"]:
        points: dict[str, list[tuple[float, float, str]]] = {}
        for row in result["cases"]:
            if "error" in row and row["metric"] == metric:
                points.setdefault(row["group"], []).append((row["measured"], row["predicted"], row["id"]))
        drawn[metric] = predicted_against_measured(metric, points, result["tolerances"][metric])
    return drawn
