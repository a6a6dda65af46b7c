"""A profile as one HTML page: how well its curves predict, and what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.costs.families import Family, family
from moesim.errors import MoesimError
from moesim.plots import write_page as write_html

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from moesim.costs.fit import Curve
    from moesim.profile import Profile

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe & Ito
_GREY = "#6E6E6E"
_STEPS, _MOST = 60, 4
_COMPUTES = ("gemm", "sparse_gemm", "grouped", "attention_prefill", "mla_prefill", "host_expert")
_COUNTED = ("launch", "handoff", "together")  # whose bytes are no measure of the work


def write_page(profile: Profile, path: Path) -> None:
    """Errors on held-out shapes, then one figure per family."""
    names = list(dict.fromkeys(curve.family for curve in profile.curves))
    figures = [_errors(profile), *(_family_figure(profile, name) for name in names)]
    what = profile.meta.get("gpu") or profile.meta.get("cpu")
    lead = (
        f"{profile.label}, {what}. Errors are of shapes left out of the fit. Each curve is drawn along its first axis "
        "with the others held at the middle of what was measured; dots are measured medians, where the profile keeps "
        "them, at any value of the other axes."
    )
    write_html(path, f"Profile {profile.name}", lead, figures)


def _errors(profile: Profile) -> Figure:
    """Median and P90 of every curve, the largest families first."""
    curves = sorted(profile.curves, key=lambda c: (c.family, -c.points))
    curves = [c for c in curves if c.family != "collective"] or curves
    figure = _figure("Error on shapes left out of the fit", "absolute error (%)", "", 120 + 17 * len(curves))
    labels = [_short(c.name) for c in curves]
    for name, values, colour in (
        ("P90", [100 * c.p90 for c in curves], _GREY),
        ("median", [100 * c.holdout_median_error for c in curves], _COLOURS[0]),
    ):
        figure.add_scatter(
            x=values, y=labels, mode="markers", name=name, marker={"color": colour, "size": 8},
            hovertemplate="%{y}: %{x:.1f} %<extra></extra>",
        )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", dtick=1, tickfont={"size": 10})
    figure.update_xaxes(rangemode="tozero")
    return figure


def _family_figure(profile: Profile, name: str) -> Figure:
    """Rate, or time where bytes measure nothing, along the first axis of the family's largest curves."""
    fam = family(name)
    unit = "microseconds" if name in _COUNTED else "TFLOPS" if name in _COMPUTES else "GB/s"
    figure = _figure(f"{name}: {fam.what}", fam.axis_names[0], unit, 450)
    for curve, colour in zip(profile.of_family(name)[:_MOST], _COLOURS, strict=False):
        rows = [row for row in profile.samples if row["family"] == name and fam.key(row) == curve.variant]
        dots = [_dot(fam, curve, row, unit) for row in rows]
        if dots:
            figure.add_scatter(
                x=[x for x, _ in dots], y=[y for _, y in dots], mode="markers", showlegend=False,
                marker={"color": colour, "size": 5, "opacity": 0.45}, hoverinfo="skip",
            )  # fmt: skip
        line, label = _line(fam, curve, unit), _short(" ".join(map(str, curve.variant)) or name)
        figure.add_scatter(
            x=[x for x, _ in line], y=[y for _, y in line], mode="lines", name=label,
            line={"color": colour, "width": 2},
            hovertemplate=f"{label}<br>%{{x:.4g}}: %{{y:.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log", dtick=1)
    figure.update_yaxes(type="log", dtick=1)
    return figure


def _line(fam: Family, curve: Curve, unit: str) -> list[tuple[float, float]]:
    """Along the first axis, the others at the node in their middle."""
    low, high = curve.axes[0][0], curve.axes[0][-1]
    middle = [axis[len(axis) // 2] for axis in curve.axes[1:]]
    points = [[low + (high - low) * i / _STEPS, *middle] for i in range(_STEPS + 1)]
    return [(2 ** p[0], _value(*curve.work_at(p), seconds=math.exp(curve.at(p)[0]), unit=unit)) for p in points]


def _dot(fam: Family, curve: Curve, row: Any, unit: str) -> tuple[float, float]:
    values = fam.place(row) if fam.place else [fam.value(row, column) for column in fam.shape]
    full = {**fam.constant, **row}
    return values[0], _value(*fam.work(full), seconds=row["seconds"], unit=unit)


def _value(nbytes: float, flops: float, seconds: float, unit: str) -> float:
    if unit == "microseconds":
        return seconds * 1e6
    return flops / seconds / 1e12 if unit == "TFLOPS" else nbytes / seconds / 1e9


def _short(text: str) -> str:
    return text if len(text) <= 48 else f"{text[:34]}...{text[-11:]}"


def _figure(title: str, x: str, y: str, height: int) -> Figure:
    try:
        from plotly.graph_objects import Figure as PlotlyFigure
    except ImportError as error:
        raise MoesimError("plots need plotly, which is not installed; pip install 'moesim[plots]'") from error
    figure = PlotlyFigure()
    figure.update_layout(
        title={"text": title, "x": 0.02, "font": {"size": 14}}, template="plotly_white", height=height,
        font={"size": 13},
        margin={"l": 70, "r": 20, "t": 60, "b": 130}, legend={"orientation": "h", "y": -0.28, "yanchor": "top"},
    )  # fmt: skip
    figure.update_xaxes(title=x, showline=True, linecolor="#888", ticks="outside", automargin=True)
    figure.update_yaxes(title=y, showline=True, linecolor="#888", ticks="outside", automargin=True)
    return figure
