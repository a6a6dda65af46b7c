"""Figures from plain data: one function, one idea. plotly is loaded when a figure is drawn."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import MoesimError
from moesim.files import write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Floats = NDArray[np.float64]

# Okabe & Ito's palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
_SERIES = (BLUE, ORANGE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_LIGHT_BLUE = "rgba(0,114,178,0.18)"


def popularity_heatmap(popularity: Floats, moe_layers: Sequence[int]) -> Figure:
    """Share of each layer's choices that every expert receives, [layers, experts], as a multiple of the fair share."""
    times = popularity * popularity.shape[1]
    figure = _figure("How popular each expert is", "expert", "MoE layer")
    figure.add_heatmap(
        z=times, y=[str(n) for n in moe_layers], colorscale="Viridis", zmin=0, zmax=times.max(),
        colorbar={"title": {"text": "times the<br>fair share"}},
        hovertemplate="layer %{y}, expert %{x}: %{z:.2f} times the fair share<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", nticks=12)
    return figure


def miss_ratio_curve(
    capacities: NDArray[np.int64], lru: Floats, belady: Floats, static: Floats, random: Floats
) -> Figure:
    """Misses by cache size: LRU [layers, capacities] with its layers' range, Belady's cache, fixed sets."""
    figure = _figure("Misses by cache size", "experts cached per layer", "choices missed (%)")
    _add_range(figure, capacities, 100 * lru, "LRU, mean over layers", "layers, lowest to highest")
    lines = (
        ("Belady's, which looks ahead", belady.mean(0), GREEN, "solid"),
        ("best fixed set, in hindsight", static.mean(0), ORANGE, "dash"),
        ("random set", random, GREY, "dot"),
    )
    for name, values, colour, dash in lines:
        figure.add_scatter(
            x=capacities, y=100 * values, name=name, mode="lines", line={"color": colour, "width": 2, "dash": dash}
        )
    figure.update_yaxes(range=[0, 100])
    figure.update_xaxes(range=[0, capacities[-1]])
    return figure


def reuse_curve(within: Mapping[int, Floats], chance: Mapping[int, Floats]) -> Figure:
    """Choices whose expert the request used in the previous w tokens, by w; each value [layers]."""
    figure = _figure("How soon a request uses an expert again", "tokens looked back", "choices found (%)")
    windows = np.array(list(within))
    _add_range(
        figure,
        windows,
        100 * np.stack(list(within.values()), axis=1),
        "measured, mean over layers",
        "layers, lowest to highest",
    )
    independent = 100 * np.array([share.mean() for share in chance.values()])
    figure.add_scatter(
        x=windows, y=independent, name="independent tokens", mode="lines+markers",
        line={"color": GREY, "width": 2, "dash": "dot"},
    )  # fmt: skip
    _doubling(figure, windows)
    figure.update_yaxes(range=[0, 100])
    return figure


def distance_curve(distances: NDArray[np.int64]) -> Figure:
    """Cumulative share of choices by stack distance, from a histogram [layers, experts + 1] that ends in first uses."""
    share = 100 * np.cumsum(distances, axis=1)[:, :-1] / distances.sum(1, keepdims=True)
    figure = _figure("Reuse distance", "other experts used at the layer since the last use", "choices, cumulative (%)")
    _add_range(figure, np.arange(share.shape[1]), share, "mean over layers", "layers, lowest to highest")
    figure.update_yaxes(range=[0, 100])
    return figure


def unique_experts(batches: NDArray[np.int64], measured: Floats, independent: Floats, experts: int) -> Figure:
    """Distinct experts one step needs at a layer by batch size, both [layers, batches]."""
    figure = _figure("Experts one decode step needs", "requests stepped together", "distinct experts per layer")
    _add_range(figure, batches, measured, "measured, mean over layers", "layers, lowest to highest")
    figure.add_scatter(
        x=batches, y=independent.mean(0), name="independent tokens", mode="lines",
        line={"color": GREY, "width": 2, "dash": "dot"},
    )  # fmt: skip
    figure.add_hline(y=experts, line={"color": ORANGE, "dash": "dash", "width": 1})
    figure.add_annotation(
        x=0, xref="paper", y=experts, text=f"all {experts}", showarrow=False, yanchor="bottom", xanchor="left"
    )
    _doubling(figure, batches)
    figure.update_yaxes(range=[0, 1.12 * experts])
    return figure


def predictability(moe_layers: Sequence[int], from_layer: Floats, from_popularity: Floats) -> Figure:
    """Share of each layer's experts that a guess finds, [layers - 1]; moe_layers are all layers."""
    figure = _figure("How well a layer's experts can be guessed", "MoE layer guessed", "experts found (%)")
    lines = (("from the layer before", from_layer, BLUE, "solid"), ("from popularity", from_popularity, GREY, "dot"))
    for name, values, colour, dash in lines:
        figure.add_scatter(
            x=list(moe_layers)[1:], y=100 * values, name=name, mode="lines+markers",
            line={"color": colour, "width": 2, "dash": dash},
        )  # fmt: skip
    figure.update_yaxes(range=[0, 100])
    return figure


def task_distances(names: Sequence[str], distance: Floats, noise: Floats) -> Figure:
    """Total variation between tasks' popularities [tasks, tasks]; the diagonal shows the noise within a task."""
    labels = [name or "(none)" for name in names]
    values = distance.copy()
    np.fill_diagonal(values, noise)
    figure = _figure("How much tasks differ", "", "")
    figure.add_heatmap(
        z=values, x=labels, y=labels, colorscale="Blues", zmin=0, zmax=np.nanmax(values),
        texttemplate="%{z:.2f}" if len(labels) <= 12 else None,
        colorbar={"title": {"text": "total<br>variation"}},
        hovertemplate="%{y} and %{x}: %{z:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(type="category", title="task (diagonal: two halves of one task)")
    figure.update_yaxes(type="category", title="task", autorange="reversed")
    return figure


def sweep_lines(
    x: str, metric: str, series: str | None, points: Mapping[str, Sequence[tuple[Any, float, str]]],
    order: Sequence[str] | None, scattered: bool, higher: bool,
) -> Figure:  # fmt: skip
    """Every point as (value of x, metric, its other choices) by series; a line joins the best at each x.

    order: the values of x where they are names; scattered: whether several points share an x in a series.
    """
    figure = _figure(f"{metric} by {x}", x, metric)
    for (name, found), colour in zip(points.items(), itertools.cycle(_SERIES)):
        best: dict[Any, float] = {}
        for at, value, _ in found:
            best[at] = value if at not in best else (max if higher else min)(best[at], value)
        at_x = [at for at in order if at in best] if order else sorted(best)
        if scattered:
            figure.add_scatter(
                x=[p[0] for p in found], y=[p[1] for p in found], text=[p[2] for p in found], name=name,
                mode="markers", marker={"color": colour, "size": 6, "opacity": 0.4}, showlegend=False,
                legendgroup=name, hovertemplate="%{text}<br>%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
        figure.add_scatter(
            x=at_x, y=[best[at] for at in at_x], name=name, mode="lines+markers", legendgroup=name,
            line={"color": colour, "width": 2}, hovertemplate="%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    if order:
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(order))
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(legend={"title": {"text": series or ""}})
    return figure


def sweep_ranking(metric: str, best: Sequence[tuple[str, float]]) -> Figure:
    """The best points, (label, metric), as bars from the top."""
    figure = _figure(f"The best {len(best)} points" if len(best) > 1 else "The one point", metric, "")
    labels = [f"{rank}. {label}" for rank, (label, _) in enumerate(best, start=1)]
    figure.add_bar(
        x=[value for _, value in best], y=labels, orientation="h", marker={"color": BLUE},
        text=[f"{value:.4g}" for _, value in best], hovertemplate="%{y}: %{x:.6g}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", ticks="")
    figure.update_layout(height=max(420, 140 + 22 * len(best)))
    return figure


def predicted_against_measured(
    what: str, points: Mapping[str, Sequence[tuple[float, float, str]]], band: float = 0.2
) -> Figure:
    """(measured, predicted, label) by group on log axes, with the diagonal and a band of +- `band` around it."""
    figure = _figure(f"Predicted against measured: {what}", "measured", "predicted")
    values = [value for found in points.values() for measured, predicted, _ in found for value in (measured, predicted)]
    ends = np.array([0.7 * min(values, default=1.0), 1.4 * max(values, default=1.0)])
    for factor, name, colour, dash in (
        (1.0, "exact", GREY, "solid"), (1 + band, f"+- {band:.0%}", GREY, "dot"), (1 - band, "", GREY, "dot"),
    ):  # fmt: skip
        figure.add_scatter(
            x=ends, y=factor * ends, mode="lines", name=name, showlegend=bool(name), hoverinfo="skip",
            line={"color": colour, "width": 1, "dash": dash},
        )  # fmt: skip
    for (name, found), colour in zip(points.items(), itertools.cycle(_SERIES)):
        figure.add_scatter(
            x=[p[0] for p in found], y=[p[1] for p in found], text=[p[2] for p in found], name=name, mode="markers",
            marker={"color": colour, "size": 9}, hovertemplate="%{text}<br>%{x:.4g} measured, %{y:.4g} predicted",
        )  # fmt: skip
    figure.update_xaxes(type="log", range=list(np.log10(ends)))
    figure.update_yaxes(type="log", range=list(np.log10(ends)))
    return figure


def value_bars(title: str, what: str, values: Mapping[str, float]) -> Figure:
    """One bar per name, from the top."""
    figure = _figure(title, what, "")
    figure.add_bar(
        x=list(values.values()), y=list(values), orientation="h", marker={"color": BLUE},
        text=[f"{value:.4g}" for value in values.values()], hovertemplate="%{y}: %{x:.6g}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", ticks="")
    figure.update_xaxes(rangemode="tozero")
    return figure


def tornado(metric: str, gains: Sequence[tuple[str, float, float, float]]) -> Figure:
    """(change, gain, P10, P90), each gain a share, as bars with their range, in the order given from the top."""
    figure = _figure(f"What would help most: gain in {metric}", "gain (%), P10 to P90", "")
    labels, middle, low, high = zip(*gains, strict=True) if gains else ((), (), (), ())
    figure.add_bar(
        x=[100 * x for x in middle], y=labels, orientation="h",
        marker={"color": [BLUE if x >= 0 else ORANGE for x in middle]},
        error_x={
            "type": "data", "symmetric": False, "color": GREY,
            "array": [100 * (b - a) for a, b in zip(middle, high, strict=True)],
            "arrayminus": [100 * (a - b) for a, b in zip(middle, low, strict=True)],
        },
        hovertemplate="%{y}: %{x:+.2f} %<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", type="category", ticks="")
    figure.update_layout(height=160 + 32 * len(gains))
    return figure


def speed_for_each_user(points: Mapping[str, Sequence[tuple[float, float, str]]]) -> Figure:
    """(tok/s of one user, tok/s of all on log axes, label) by group, such as what no other beats and the rest."""
    figure = _figure("Speed of one user against that of all", "output tok/s of one user", "output tok/s of all")
    for (name, found), colour in zip(points.items(), itertools.cycle(_SERIES)):
        figure.add_scatter(
            x=[p[0] for p in found], y=[p[1] for p in found], text=[p[2] for p in found], name=name, mode="markers",
            marker={"color": colour, "size": 11}, hovertemplate="%{text}<br>%{x:.4g} for one, %{y:.4g} for all",
        )  # fmt: skip
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return figure


def stacked_memory(tiers: Mapping[str, Mapping[str, int]]) -> Figure:
    """Every tier's memory as shares of the whole, entry by entry, in bytes."""
    figure = _figure("Where every byte goes", "share of the tier (%)", "")
    colours = itertools.cycle(_SERIES)
    for tier, entries in tiers.items():
        whole = max(sum(entries.values()), 1)
        for name, size in entries.items():
            colour = "#DDDDDD" if name.startswith("free") else next(colours)
            figure.add_bar(
                x=[100 * size / whole], y=[tier], orientation="h", marker={"color": colour}, name=f"{tier}: {name}",
                text=[name], textposition="inside", showlegend=False,
                hovertemplate=f"{html.escape(name)}: {size / 2**30:.4g} GiB<extra></extra>",
            )  # fmt: skip
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed", type="category", ticks="")
    figure.update_xaxes(range=[0, 100])
    return figure


def latency_distribution(sorted_ms: Mapping[str, Floats]) -> Figure:
    """Share of requests at or below each latency, ms."""
    figure = _figure("Latency of requests", "ms", "requests at or below (%)")
    for (name, values), colour in zip(sorted_ms.items(), itertools.cycle(_SERIES)):
        figure.add_scatter(
            x=values, y=100 * np.arange(1, len(values) + 1) / len(values), name=name, mode="lines",
            line={"color": colour, "width": 2, "shape": "hv"}, hovertemplate="%{x:.4g} ms: %{y:.1f} %<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(type="log")
    figure.update_yaxes(range=[0, 101])
    return figure


def steps_over_time(at: Floats, low: Floats, middle: Floats, high: Floats) -> Figure:
    """Duration of steps, ms, over the time they start, s: median, lowest and highest of each stretch."""
    figure = _figure("Steps over time", "simulated time (s)", "step (ms)")
    figure.add_scatter(
        x=np.r_[at, at[::-1]], y=np.r_[low, high[::-1]], name="lowest to highest", mode="lines", fill="toself",
        fillcolor=_LIGHT_BLUE, line={"width": 0}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(x=at, y=middle, name="median", mode="lines", line={"color": BLUE, "width": 2})
    figure.update_yaxes(rangemode="tozero")
    return figure


def queue_over_time(at: Floats, waiting: Floats, running: Floats) -> Figure:
    """Requests waiting to be admitted, and in service, over the time steps start, s: the most of each stretch."""
    figure = _figure("Requests over time", "simulated time (s)", "requests")
    for name, values, colour in (("waiting", waiting, ORANGE), ("running", running, BLUE)):
        figure.add_scatter(x=at, y=values, name=name, mode="lines", line={"color": colour, "width": 2, "shape": "hv"})
    figure.update_yaxes(rangemode="tozero")
    return figure


def shares_of_layers(shares: Mapping[str, Floats]) -> Figure:
    """What became of each layer's lookups, % [layers] by kind."""
    figure = _figure("Lookups by MoE layer", "MoE layer, in order", "lookups (%)")
    for (name, values), colour in zip(shares.items(), (BLUE, "#E69F00", ORANGE), strict=False):
        figure.add_bar(x=np.arange(len(values)), y=values, name=name, marker={"color": colour})
    figure.update_layout(barmode="stack")
    figure.update_yaxes(range=[0, 100])
    return figure


def write_page(path: Path, title: str, lead: str, figures: Iterable[Figure], details: str = "") -> None:
    """One self-contained HTML page: the lead, the figures with plotly.js embedded once, the details as plain text."""
    from plotly.io import to_html
    from plotly.offline import get_plotlyjs

    config = {"displaylogo": False, "responsive": True}
    drawn = (to_html(f, include_plotlyjs=False, full_html=False, config=config) for f in figures)
    body = "\n".join(f"<section>{one}</section>" for one in drawn)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>{html.escape(lead)}</p>\n<main>\n{body}\n</main>\n<pre>{html.escape(details)}</pre>\n</body>\n</html>\n",
    )


_STYLE = """
body { font-family: system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff; }
p { max-width: 60rem; line-height: 1.45; }
main { display: grid; grid-template-columns: minmax(0, 1fr); gap: 1rem; }
@media (min-width: 64rem) { main { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
section { border: 1px solid #ddd; border-radius: 4px; }
pre { overflow-x: auto; font-size: 0.85rem; line-height: 1.35; }
"""


def _figure(title: str, x: str, y: str) -> Figure:
    try:
        from plotly.graph_objects import Figure as PlotlyFigure
    except ImportError as error:
        raise MoesimError("plots need plotly, which is not installed; pip install 'moesim[plots]'") from error
    figure = PlotlyFigure()
    figure.update_layout(
        title={"text": title, "x": 0.02}, template="plotly_white", height=420, font={"size": 13},
        margin={"l": 70, "r": 20, "t": 60, "b": 110}, legend={"orientation": "h", "y": -0.28, "yanchor": "top"},
        hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(title=x, showline=True, linecolor="#888", ticks="outside", automargin=True)
    figure.update_yaxes(title=y, showline=True, linecolor="#888", ticks="outside", automargin=True)
    return figure


def _add_range(figure: Figure, x: NDArray[Any], values: Floats, mean: str, band: str) -> None:
    """The mean over layers of values [layers, x] as a line, from the lowest to the highest layer as a band."""
    known = ~np.isnan(values).any(axis=0)
    x, values = x[known], values[:, known]
    low, high = values.min(0), values.max(0)
    figure.add_scatter(
        x=np.r_[x, x[::-1]], y=np.r_[low, high[::-1]], name=band, mode="lines", fill="toself", fillcolor=_LIGHT_BLUE,
        line={"width": 0}, hoverinfo="skip",
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=values.mean(0), name=mean, mode="lines+markers" if x.size <= 16 else "lines",
        line={"color": BLUE, "width": 3},
    )  # fmt: skip


def _doubling(figure: Figure, ticks: NDArray[np.int64]) -> None:
    """A logarithmic x axis labelled at its data points, which double."""
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
