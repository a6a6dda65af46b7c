"""Several policies on one trace: paired differences, request by request."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError
from moesim.question import Question, Run, run
from moesim.systems import load_system
from moesim.trace import Trace

METRICS = ("tpot", "ttft", "e2el")


def compare(trace: Trace, policies: list[str], question: Question) -> dict[str, Any]:
    """Each policy's summary, and how every other differs from the first, with a 95 % interval over requests."""
    if len(policies) < 2:
        raise PolicyError(f"--policies {','.join(policies)}: name at least two, such as LRU,eMoE")
    if len(set(policies)) < len(policies):
        raise PolicyError(f"--policies {','.join(policies)}: a policy is named twice; name each once")
    for policy in policies:
        load_system(policy)  # a misspelt name is refused before the first replay
    runs: dict[str, Run] = {}
    for policy in policies:
        runs[policy] = run(trace, policy, question, anchors=not runs)
    base = runs[policies[0]]
    return {
        "base": policies[0],
        "inputs": base.summary["inputs"],
        "anchors": base.summary.get("anchors"),
        "policies": {name: _outline(r) for name, r in runs.items()},
        "differences": {
            name: _differences(base, r)
            for name, r in runs.items()
            if r is not base and base.request_ids and r.request_ids
        },
    }


def _outline(run: Run) -> dict[str, Any]:
    s = run.summary
    return {
        key: s.get(key)
        for key in (
            "status",
            "status_reason",
            "metrics",
            "routing_fidelity",
            "published_quality",
            "bottleneck",
            "notes",
        )
    }


def _per_request(run: Run) -> dict[str, NDArray[np.float64]]:
    """ms per request, in the workload's order."""
    r = run.records.requests
    order = np.argsort(r.column("request"))
    sent, first, last = (r.column(name)[order] / 1e6 for name in ("sent", "first_token", "finished"))
    outputs = r.column("output_tokens")[order]
    tpot = np.full(len(outputs), np.nan)
    many = outputs > 1
    tpot[many] = (last - first)[many] / (outputs[many] - 1)
    return {"tpot": tpot, "ttft": first - sent, "e2el": last - sent}


def _differences(base: Run, other: Run) -> dict[str, Any]:
    """Mean of (other - base) per request in ms, its 95 % interval, and the ratio of means.

    The interval is the normal one of a mean of paired differences; it says nothing where requests are few.
    """
    before, after = _per_request(base), _per_request(other)
    out: dict[str, Any] = {}
    for name in METRICS:
        paired = (after[name] - before[name])[~np.isnan(before[name])]
        if not len(paired):
            continue
        mean = float(paired.mean())
        half = 1.96 * float(paired.std(ddof=1)) / math.sqrt(len(paired)) if len(paired) > 1 else math.inf
        reference = float(np.nanmean(before[name]))
        out[name] = {
            "difference_ms": mean,
            "interval_ms": [mean - half, mean + half],
            "ratio": 1 + mean / reference if reference else None,
            "requests": len(paired),
            "significant": abs(mean) > half,
        }
    return out


def format_comparison(result: dict[str, Any]) -> str:
    """A table, and one plain sentence for each policy against the first."""
    width = max(24, *(len(name) for name in result["policies"]))
    lines = [f"{'policy':{width}} {'status':12} {'tok/s':>9} {'TPOT ms':>9} {'TTFT ms':>9} {'hit':>7} {'exact':>7}"]
    for name, row in result["policies"].items():
        m = row["metrics"]
        if not m:
            lines.append(f"{name:{width}} {row['status']:12} {row['status_reason']}")
            continue
        tpot = "-" if m["mean_tpot_ms"] is None else f"{m['mean_tpot_ms']:.4g}"
        lines.append(
            f"{name:{width}} {row['status']:12} {m['output_throughput']:9.4g} {tpot:>9} {m['mean_ttft_ms']:9.4g} "
            f"{m['hit_rate']:7.1%} {row['routing_fidelity']['overall']['exact']:7.1%}"
        )
    for name, row in (result["anchors"] or {}).items():
        if "output_throughput" in row:
            lines.append(f"{'anchor ' + name:{width}} {'':12} {row['output_throughput']:9.4g}")
    lines.append("")
    lines += [_sentence(name, result["base"], row) for name, row in result["differences"].items()]
    return "\n".join(lines)


def _sentence(name: str, base: str, differences: dict[str, Any]) -> str:
    d = differences.get("tpot") or differences["e2el"]
    what = "TPOT" if "tpot" in differences else "E2EL"
    low, high = d["interval_ms"]
    interval = f"{d['difference_ms']:+.3g} ms, 95 % {low:+.3g} to {high:+.3g}, {d['requests']} requests"
    if not d["significant"]:
        return f"{name} against {base}: no difference to be sure of in {what} ({interval})"
    verdict = "faster" if d["difference_ms"] < 0 else "slower"
    share = f"{abs(d['ratio'] - 1):.1%} " if d["ratio"] else ""
    return f"{name} against {base}: {share}{verdict} in {what} ({interval})"
