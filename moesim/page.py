"""The pages `moesim replay` prints for people."""

from __future__ import annotations

from typing import Any

from moesim.question import ANCHORS, Run
from moesim.units import GIB, format_size


def format_run(run: Run) -> str:
    """The page `moesim replay` prints."""
    s = run.summary
    inputs, m = s["inputs"], s["metrics"]
    lines = [
        f"{inputs['system']['name']} serving {inputs['model']['name']} on {inputs['machine']['name']}: {s['status']}"
        + (f" ({s['status_reason']})" if s["status_reason"] else ""),
        f"trace {inputs['trace']['model']}, {inputs['trace']['provenance']} routing, "
        f"{inputs['workload']['requests']} requests {inputs['workload']['arrivals']}, "
        f"at most {inputs['workload']['max_concurrency']} at once; costs: {inputs['costs']}"
        + (f"; {s['engine']['used']} engine" if m else ""),
    ]
    if "devices" in s:
        lines += _pool_lines(s["devices"]) if "decode" in s["devices"] else [_device_line(s["devices"])]
    if m:
        lines += ["", *_speed_lines(s), *_cost_lines(s), "", *_expert_lines(s), "", *_limit_lines(s)]
    lines += ["", *_memory_lines(s["memory"])]
    lines += [f"note: {note}" for note in s["notes"]]
    return "\n".join(lines)


def _device_line(d: dict[str, Any]) -> str:
    placed = f", {d['placement']}, {d['experts_per_gpu']} a layer on each" if d["placement"] else ""
    return (
        f"{d['gpus']} GPUs: attention {d['attention']}-parallel, experts {d['experts']}-parallel{placed}; "
        f"balancedness {d['balancedness']:.3f}, imbalance ratio {d['imbalance_ratio']:.3f}"
    )


def _pool_lines(d: dict[str, Any]) -> list[str]:
    """Two pools of GPUs, and what goes from the one to the other."""
    lines = []
    for name in ("prefill", "decode"):
        pool = d[name]
        inside = _device_line(pool) if pool["gpus"] > 1 else "1 GPU"
        lines.append(
            f"{name:13} {inside}; busy {pool['busy_share']:.1%}, KV caches at most "
            f"{format_size(pool['kv_most_bytes'])} of {format_size(pool['kv_room_bytes'])}"
        )
    moved = d["kv_transfer"]
    return [*lines, f"KV transfer   {moved['bytes'] / GIB:.4g} GiB, {moved['mean_ms']:.3g} ms a request on average"]


def _speed_lines(s: dict[str, Any]) -> list[str]:
    m, band = s["metrics"], s.get("uncertainty", {})
    low_high = band.get("output_throughput")
    error = f"  ({low_high[0]:.4g} to {low_high[1]:.4g} over the cost band)" if low_high else ""
    lines = [
        f"output        {m['output_throughput']:.4g} tok/s{error}",
        f"served        {m['completed']} requests, {m['total_input_tokens']} prompt and {m['total_output_tokens']} "
        f"output tokens in {m['duration_s']:.4g} s",
        "latency, ms       mean       p50       p90       p99",
    ]
    for name in ("ttft", "tpot", "itl", "e2el"):
        if m[f"mean_{name}_ms"] is not None:
            values = (m[f"mean_{name}_ms"], *(m[f"p{p}_{name}_ms"] for p in (50, 90, 99)))
            lines.append(f"  {name.upper():8}" + "".join(f"{value:10.4g}" for value in values))
    if m.get("max_num_requests_waiting"):
        lines.append(
            f"queue         {m['mean_num_requests_waiting']:.4g} requests waiting on average, at most "
            f"{m['max_num_requests_waiting']}; {m['mean_num_requests_running']:.4g} running, at most "
            f"{m['max_num_requests_running']}"
        )
    if "slo_attainment" in m:
        kept = ", ".join(f"{name} {share:.1%}" for name, share in m["slo_attainment_by_slo"].items())
        lines.append(
            f"goodput       {m['request_goodput']:.4g} requests/s keep every SLO, {m['slo_attainment']:.1%} ({kept})"
        )
    return lines


def _cost_lines(s: dict[str, Any]) -> list[str]:
    """$ and joules per token, with what they rest on; also of summaries that older versions wrote."""
    if "price" not in s:
        return []
    m, price, energy = s["metrics"], s["price"], s["energy"]
    if price["usd_per_hour"] is None:
        lines = [f"price         none: {price['source']}"]
    else:
        read = f", {price['date']}" if price["date"] else ""
        lines = [
            f"price         ${m['usd_per_million_output_tokens']:.3g} per million output tokens, "
            f"${m['usd_per_million_tokens']:.3g} per million of all, at ${price['usd_per_hour']:.4g} per hour "
            f"({price['source']}{read})"
        ]
    if m["joules_per_output_token"] is not None:
        idle = "idle power not known, taken as 0" if energy["idle_w"] is None else f"{energy['idle_w']:g} W else"
        lines.append(
            f"energy        {m['joules_per_output_token']:.3g} J per output token: {energy['tdp_w']:g} W (TDP by "
            f"specification) while GPUs compute, {energy['busy_share']:.1%} of the time; {idle}; without the host"
        )
    return lines


def _expert_lines(s: dict[str, Any]) -> list[str]:
    m = s["metrics"]
    lines = [
        f"experts       {m['lookups']} lookups: {m['hit_rate']:.1%} hit, {m['late_rate']:.1%} late, "
        f"{m['miss_rate']:.1%} missed",
        f"moved         {m['h2d_bytes'] / GIB:.4g} GiB to the GPU ({m['prefetch_useful_bytes'] / GIB:.3g} prefetched "
        f"and used, {m['prefetch_wasted_bytes'] / GIB:.3g} in vain), {m['d2h_bytes'] / GIB:.3g} back, "
        f"{m['nvme_bytes'] / GIB:.3g} from NVMe",
        f"stall         {m['stall_ms_per_token']:.4g} ms per token",
    ]
    return lines + _fidelity_lines(s["routing_fidelity"], s["published_quality"])


FIDELITY = ("exact", "lower_precision", "rerouted", "merged", "skipped")
TASKS_SHOWN = 12


def _fidelity_lines(fidelity: dict[str, Any], published: dict[str, str] | None) -> list[str]:
    """What became of the routed weight, over all and by task, and what the authors say that does to quality."""
    lines = []
    if fidelity["overall"]["exact"] < 1:
        tasks = list(fidelity["by_task"].items())
        rows = [("all", fidelity["overall"]), *((_label(task), row) for task, row in tasks[:TASKS_SHOWN])]
        kinds = [kind for kind in FIDELITY if kind == "exact" or any(row[kind] for _, row in rows)]
        width = max(len(name) for name, _ in rows)
        titles = "".join(f"{kind.replace('_', ' '):>17}" for kind in kinds)
        lines.append(f"routed weight {'':{width}}{titles}")
        lines += [f"  {name:{width + 12}}" + "".join(f"{row[kind]:17.1%}" for kind in kinds) for name, row in rows]
        if len(tasks) > TASKS_SHOWN:
            lines.append(f"  and {len(tasks) - TASKS_SHOWN} tasks more, see --json")
    if published:
        lines.append(f"quality       not predicted; published: {published['reported']} ({published['source']})")
    return lines


def _label(task: str) -> str:
    """A task's name, which may come from anywhere, fit for one cell."""
    shown = task if task.isprintable() else ascii(task)
    return shown if len(shown) <= 32 else shown[:31] + "…"


def _limit_lines(s: dict[str, Any]) -> list[str]:
    b = s["bottleneck"]
    shares = sorted(b["critical_path"].items(), key=lambda item: -item[1])
    lines = [
        f"limited by    {b['explanation']}",
        "critical path " + ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005),
    ]
    if "ceiling" in s:
        c = s["ceiling"]
        lines.append(
            f"ceiling       {c['output_throughput']:.4g} tok/s; {c['reached']:.1%} of it reached ({c['basis']})"
        )
        sample = s["anchors"]["of_sample"]
        lines.append(f"anchors, tok/s on the first {sample['requests']} requests:")
        rows = [("this policy", sample["policy"]), *((name, s["anchors"][name]) for name in ANCHORS)]
        for name, row in rows:
            if "error" in row:
                lines.append(f"  {name:13} {row['error']}")
                continue
            fits = "" if row.get("fits", True) else "  (does not fit this machine)"
            lines.append(f"  {name:13} {row['output_throughput']:9.4g}   hit rate {row['hit_rate']:.1%}{fits}")
    return lines


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    lines = []
    for tier, name in (("gpu_bytes", "GPU memory"), ("host_bytes", "host memory"), ("nvme_bytes", "NVMe")):
        if memory[tier]:
            entries = ", ".join(f"{what} {format_size(size)}" for what, size in memory[tier].items())
            lines.append(f"{name:13} {entries}")
    return lines
