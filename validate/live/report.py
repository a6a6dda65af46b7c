"""A live validation in words: what was measured, what was predicted, and how far apart they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moesim.files import write_text
from moesim.output import to_json

EXPERTS_ON = {"disk": "on disk", "memory": "in memory"}


def save(result: dict[str, Any], directory: Path) -> None:
    """live.json, live.txt and, where plotly is installed and times were measured, the page live.html."""
    write_text(directory / "live.json", to_json(result) + "\n")
    write_text(directory / "live.txt", text(result) + "\n")
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in result["cases"]:
        if "real_ms" in row:
            points.setdefault(row["group"], []).append((row["real_ms"], row["simulated_ms"], row["case"]))
    try:
        import plotly  # noqa: F401
    except ImportError:
        return
    from moesim.plots import predicted_against_measured, write_page

    figures = [predicted_against_measured("ms per run", points, result["tolerances"]["total_error"])] if points else []
    write_page(
        directory / "live.html", "Live validation", f"{result['status']} on {result['device']}", figures, text(result)
    )


def text(result: dict[str, Any]) -> str:
    """The summary, a line per case, and the costs the predictions were made with."""
    c = result["conditions"]
    where = (
        f"{c['gpu'] or c['cpu']}, {c['cores']} cores, torch {c['torch']}; experts {EXPERTS_ON[result['experts_on']]}"
    )
    lines = [
        f"live validation on {result['device']}: {result['status'].upper()}",
        where + (f", copies paced to {result['pace_gbps']:g} GB/s" if result["pace_gbps"] else ""),
        "",
        _decisions(result),
        *_times(result),
        "",
        f"{'case':56}{'runs':>5}{'decisions':>12}{'real ms':>9}{'error':>8}{'layer':>7}{'noise':>8}{'deciding':>10}",
    ]
    group = None
    for row in result["cases"]:
        if row["group"] != group:
            group = row["group"]
            lines.append(group)
        lines.append(_case(row))
    lines += ["", *_costs(result), *_remarks(result)]
    return "\n".join(lines)


def _decisions(result: dict[str, Any]) -> str:
    exact = [row["identical"] for row in result["cases"] if "identical" in row]
    return (
        f"{'decisions':16}{sum(exact)} of {len(exact)} cases without prefetch identical in every run: "
        "hits, misses, copies, victims"
    )


def _times(result: dict[str, Any]) -> list[str]:
    if result["total_error"] is None:
        return [f"{'times':16}no case had enough undisturbed runs"]
    limits, wrong = result["tolerances"], result["pairs_in_wrong_order"]
    lines = [
        f"{'totals':16}worst {result['total_error']:.1%}, median {result['total_error_median']:.1%} "
        f"(tolerance {limits['total_error']:.0%})",
        f"{'noise':16}worst {result['noise']:.1%}, median {result['noise_median']:.1%}: half the range of real totals",
        f"{'order':16}{result['pairs_compared'] - len(wrong)} of {result['pairs_compared']} pairs that differ by more "
        "than their noise are in the right order",
    ]
    if result["policy_ratio_error"] is not None:
        worst, median = result["policy_ratio_error"], result["policy_ratio_error_median"]
        limit = f"(tolerance {limits['policy_ratio_error']:.0%})"
        lines.insert(1, f"{'policy ratios':16}worst {worst:.1%}, median {median:.1%} {limit}")
    return lines + [f"{'wrong order':16}{pair}" for pair in wrong]


def _case(row: dict[str, Any]) -> str:
    name = f"  {row['case']}, {row['slots']} slots"
    decided = ("identical" if row["identical"] else "DIFFER") if "identical" in row else f"{row['agreement']:.1%}"
    if "real_ms" not in row:
        cells = f"{'disturbed':>11}"
    else:
        errors = f"{row['error']:>+8.1%}{row['layer_error']:>7.1%}{row['noise']:>8.1%}"
        cells = f"{row['real_ms']:>9.1f}{errors}{row['deciding_us']:>7.0f} us"
    return f"{name:56}{row['clean_runs']:>5}{decided:>12}{cells}"


def _costs(result: dict[str, Any]) -> list[str]:
    lines = []
    for name, costs in result["costs_us"].items():
        apart, host = result["interference"][name], costs["host_expert_1_token"]
        on_host = f"on the host {host:.0f} us, " if host is not None else ""
        lines.append(
            f"{name:8}copy {costs['copy']:.0f} us (of which {costs['wake_loader']:.0f} waking its thread), expert "
            f"{costs['expert_1_token']:.0f} us, {on_host}"
            f"mixer {costs['mixer_1_row']:.0f} us; side by side, copies take "
            f"x{apart['copies']:.2f} and kernels x{apart['kernels']:.2f}"
        )
    return lines


def _remarks(result: dict[str, Any]) -> list[str]:
    if result["status"] != "inconclusive":
        return []
    disturbed = sum(row["disturbed_runs"] for row in result["cases"])
    return [
        f"{disturbed} runs were disturbed by other programs, so {result['inconclusive_cases']} of "
        f"{len(result['cases'])} cases say nothing of times; run it again on a quiet machine"
    ]
