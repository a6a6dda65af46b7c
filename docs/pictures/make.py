"""Draws docs/pictures/slots.svg: `python docs/pictures/make.py TRACE.parquet` (plotly, kaleido and a Chrome needed)."""

from __future__ import annotations

import sys
from pathlib import Path

import plotly.graph_objects as go

from moesim.question import Question, run
from moesim.trace.cut import cut
from moesim.trace.io import read

POLICIES = {
    "oracle": ("oracle with prefetch", "#999999", "dot"),
    "Belady": ("Belady (looks ahead)", "#999999", "dash"),
    "eMoE": ("eMoE (reroutes: outputs change)", "#0072b2", "solid"),
    "LRU": ("LRU", "#d55e00", "solid"),
    "Fiddler": ("Fiddler", "#009e73", "solid"),
    "static": ("static", "#cc79a7", "solid"),
}
SLOTS = (4, 8, 12, 16, 20, 24, 28, 32)


def main(path: str) -> None:
    """Decode speed of every policy against expert slots per layer, on the first eight requests of a trace."""
    trace = cut(read(path), requests=8)
    figure = go.Figure()
    for policy, (label, colour, dash) in POLICIES.items():
        speed = [
            run(trace, policy, Question(slots_per_layer=slots), anchors=False).summary["metrics"]["output_throughput"]
            for slots in SLOTS
        ]
        figure.add_scatter(x=SLOTS, y=speed, name=label, mode="lines+markers", line={"color": colour, "dash": dash})
    figure.update_layout(
        title=f"{trace.info.model} on one RTX 4090: decode speed by expert cache",
        xaxis_title=f"expert slots per layer (of {trace.info.experts})",
        yaxis_title="output tokens per second, one user",
        yaxis_rangemode="tozero",
        template="plotly_white",
        width=860,
        height=470,
        legend={"orientation": "h", "y": -0.2},
    )
    figure.write_image(Path(__file__).parent / "slots.svg")


if __name__ == "__main__":
    main(sys.argv[1])
