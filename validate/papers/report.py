"""The result in words, as the tables of docs/papers.md, and as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from moesim.files import write_text
from moesim.output import to_json
from validate.papers import hexa

PICTURE, CROSSING = "papers.svg", "hexa.svg"
SIDES = {  # of a main claim, where its name covers no other
    "SiDA": "middle left", "HEXA-MoE": "top left", "Samoyeds": "top right", "EEP": "bottom right",
    "SEER-MoE": "bottom right", "AdapMoE": "bottom left", "fMoE": "bottom left",
}  # fmt: skip


def text(result: dict[str, Any]) -> str:
    """Every claim on a line, targets, then what was not reproduced and why."""
    lines = [headline(result), "", f"{'':11}{'reported':>9} {'predicted':>9} {'ratio':>6}"]
    for row in result["claims"]:
        lines.append(
            f"{'*' if row['main'] else ' '} {row['system']:9}{_numbers(row)}  {row['status']:15} {row['claim']}"
        )
    lines += ["", "targets"]
    for row in result["targets"]:
        mark = "holds" if row["holds"] else "does not hold"
        lines.append(f"{row['number']:3} {row['what']}: {row['computed']} (reported {row['reported']}), {mark}")
    lines += ["", "not reproduced"]
    lines += [f"  {row['system']}, {row['claim']}: {row['reason']}" for row in result["claims"] if row["reason"]]
    lines += ["", "assumed"]
    lines += [
        f"  {line}"
        for line in dict.fromkeys(f"{r['system']}: {r['assumed']}" for r in result["claims"] if r["assumed"])
    ]
    return "\n".join(
        [*lines, "", "* the paper's main claim; every ratio is baseline over system, above 1 where it is better"]
    )


def headline(result: dict[str, Any]) -> str:
    s = result["summary"]
    return (
        f"papers: {result['status'].upper()}; {s['main_reproduced']} of {s['main']} main claims within a factor "
        f"{result['factor']:g} ({s['main_directions_wrong']} in the wrong direction); of all claims "
        f"{s['reproduced']} of {s['claims']} ({s['directions_wrong']} in the wrong direction), {s['not_set_up']} not "
        "set up"
    )


def _numbers(row: dict[str, Any]) -> str:
    if "predicted" not in row:
        return f"{row['reported']:9.2f} {'-':>9} {'-':>6}"
    return f"{row['reported']:9.2f} {row['predicted']:9.2f} {row['ratio']:6.2f}"


def markdown(result: dict[str, Any]) -> str:
    """The tables of docs/papers.md: main claims, targets, all claims."""
    s = result["summary"]
    kinds = ", ".join(f"{kind} {good} of {count}" for kind, (good, count) in s["by_kind"].items())
    lines = [f"**{s['main_reproduced']} of {s['main']}** main claims are within a factor {result['factor']:g}, "
             f"{s['main_directions_wrong']} of them in the wrong direction; of all claims {s['reproduced']} of "
             f"{s['claims']}, {s['directions_wrong']} in the wrong direction ({kinds}); {s['not_set_up']} are not "
             "set up.",
             "", "### Main claims", ""]  # fmt: skip
    lines += _table([row for row in result["claims"] if row["main"]], reasons=True)
    lines += ["", "### Targets", "", "| | target | reported | computed | holds | |", "|--:|---|---|---|---|---|"]
    lines += [
        f"| {r['number']} | {r['what']} | {r['reported']} | {r['computed']} | {'yes' if r['holds'] else '**no**'} | "
        f"{r['remark']} |"
        for r in result["targets"]
    ]
    lines += ["", "### Every claim", ""]
    lines += _table([row for row in result["claims"] if not row["main"]], reasons=False)
    lines += ["", "### Reasons", ""]
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in result["claims"]:
        if row["reason"]:
            grouped.setdefault((row["system"], row["reason"]), []).append(row["claim"])
    lines += [f"- **{system}** ({'; '.join(claims)}): {reason}." for (system, reason), claims in grouped.items()]
    lines += ["", "### Assumed", ""]
    told = dict.fromkeys((row["system"], row["assumed"]) for row in result["claims"] if row["assumed"])
    lines += [f"- **{system}**: {assumed}." for system, assumed in told]
    return "\n".join(lines)


def claim_line(row: dict[str, Any], reasons: bool = False) -> str:
    """One row of a table of claims."""
    predicted = f"{row['predicted']:.2f} | {row['ratio']:.2f}" if "predicted" in row else "- | -"
    cells = [row["system"], row["claim"], f"{row['reported']:.2f} | {predicted}", row["status"]]
    return f"| {' | '.join([*cells, row['reason']] if reasons else cells)} |"


def _table(rows: list[dict[str, Any]], reasons: bool) -> list[str]:
    head = "| system | claim | reported | predicted | ratio | |"
    line = "|---|---|--:|--:|--:|---|"
    return [
        head + (" why |" if reasons else ""),
        line + ("---|" if reasons else ""),
        *(claim_line(r, reasons) for r in rows),
    ]


def save(result: dict[str, Any], directory: Path) -> None:
    """papers.json, papers.md and, where plotly can draw them, papers.svg and hexa.svg (docs/several-gpus.md)."""
    write_text(directory / "papers.json", to_json(result) + "\n")
    write_text(directory / "papers.md", markdown(result) + "\n")
    try:
        picture(result).write_image(directory / PICTURE)
        if any(row["system"] == "HEXA-MoE" for row in result["claims"]):
            hexa.picture().write_image(directory / CROSSING)
    except (ImportError, ValueError, RuntimeError) as error:  # no plotly, kaleido or browser
        write_text(directory / "papers.txt", f"no picture: {error}\n")


def picture(result: dict[str, Any]) -> Any:
    """Predicted against reported ratios on log axes, by what became of them; main claims are larger and named."""
    import plotly.graph_objects as go

    from moesim.plots import BLUE, GREEN, GREY, ORANGE

    rows = [row for row in result["claims"] if "predicted" in row]
    ends = [0.2, 70.0]
    figure = go.Figure()
    for factor, name in (
        (1.0, "exact"),
        (result["factor"], f"a factor {result['factor']:g}"),
        (1 / result["factor"], ""),
    ):
        line = {"color": GREY, "width": 1, "dash": "solid" if factor == 1 else "dot"}
        figure.add_scatter(
            x=ends, y=[factor * end for end in ends], mode="lines", name=name, showlegend=bool(name), line=line
        )
    for status, colour in (("reproduced", GREEN), ("off", ORANGE), ("wrong direction", BLUE)):
        for main in (False, True):
            found = [row for row in rows if row["status"] == status and row["main"] == main]
            figure.add_scatter(
                x=[row["reported"] for row in found], y=[row["predicted"] for row in found],
                name=f"{status}{', main claims' if main else ''}", showlegend=bool(found),
                mode="markers+text" if main else "markers", text=[row["system"] for row in found] if main else None,
                textposition=[SIDES.get(row["system"], "middle right") for row in found], textfont={"size": 11},
                marker={"color": colour, "size": 12 if main else 6, "symbol": "diamond" if main else "circle",
                        "opacity": 1 if main else 0.6},
            )  # fmt: skip
    ticks = [0.2, 0.5, 1, 2, 5, 10, 20, 50]
    for axis, title in (("x", "reported"), ("y", "predicted")):
        span = [math.log10(end) for end in (ends if axis == "y" else [0.9, 8])]
        figure.update_layout({
            f"{axis}axis": {"type": "log", "range": span, "title": f"{title}: baseline over system", "tickvals": ticks},
        })  # fmt: skip
    figure.update_layout(
        title="Claims of twelve papers: predicted against reported", template="plotly_white", width=900, height=760
    )
    return figure
