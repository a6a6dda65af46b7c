"""Numbers users see, computed from records. Names follow vLLM's benchmark; times in ms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.residency import Counts
from moesim.machine import Machine
from moesim.records import Records
from moesim.trace import Trace
from moesim.transforms.transform import KINDS, Shares, chain, nothing
from moesim.workload import Workload

PERCENTILES = (50, 90, 95, 99)


def latency_metrics(records: Records) -> dict[str, Any]:
    """TTFT, TPOT (without the first token), ITL (per gap) and E2EL over completed requests, from when each was sent."""
    r = records.requests
    sent, first, last = r.column("sent"), r.column("first_token"), r.column("finished")
    outputs = r.column("output_tokens")
    many = outputs > 1
    tpot = (last - first)[many] / (outputs[many] - 1)
    gaps = np.frombuffer(records.gaps, dtype=np.int64) if records.gaps else np.empty(0)
    out: dict[str, Any] = {}
    for name, values in (("ttft", first - sent), ("tpot", tpot), ("itl", gaps), ("e2el", last - sent)):
        out |= _spread(name, np.asarray(values) / 1e6)
    return out


def _spread(name: str, ms: NDArray[np.float64]) -> dict[str, Any]:
    if not len(ms):
        return dict.fromkeys([f"mean_{name}_ms", f"std_{name}_ms", *(f"p{p}_{name}_ms" for p in PERCENTILES)])
    spread = {f"mean_{name}_ms": float(ms.mean()), f"median_{name}_ms": float(np.median(ms))}
    spread |= {f"std_{name}_ms": float(ms.std())}
    return spread | {f"p{p}_{name}_ms": float(np.percentile(ms, p)) for p in PERCENTILES}


def throughput_metrics(records: Records) -> dict[str, Any]:
    """Completed work over the time from the first arrival to the last token."""
    r = records.requests
    start, end = int(r.column("arrival").min()), int(r.column("finished").max())
    seconds = max(end - start, 1) / 1e9
    outputs = int(r.column("output_tokens").sum())
    again, kept = int(r.column("recomputed_tokens").sum()), int(r.column("cached_tokens").sum())
    inputs = int(records.steps.column("prefill_tokens").sum()) - again + kept
    return {
        "completed": len(r),
        "duration_s": seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(r) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
    }


def kv_metrics(records: Records, prefixes: bool, preempts: bool) -> dict[str, Any]:
    """What became of KV caches: tokens of prompts that began as an earlier one, and of those prefilled again."""
    r, found = records.requests, dict[str, Any]()
    if prefixes:
        cached = int(r.column("cached_tokens").sum())
        found |= {
            "cached_tokens": cached,
            "prefix_cache_hit_rate": cached / max(int(r.column("prompt_tokens").sum()), 1),
        }
    if preempts:
        found |= {
            "num_preemptions": int(r.column("preemptions").sum()),
            "recomputed_tokens": int(r.column("recomputed_tokens").sum()),
            "preempted_s": float(r.column("preempted_ns").sum() / 1e9),
        }
    return found


def queue_depth(requests: Mapping[str, NDArray[np.int64]], at: NDArray[np.int64]) -> tuple[Any, Any]:
    """Requests sent and not yet admitted, and admitted and not yet finished, at each of the times `at` (ns); one that
    was preempted counts among the latter.

    requests: columns `sent`, `admitted` and `finished`.
    """
    sent, admitted, finished = (np.searchsorted(np.sort(requests[name]), at, side="right") for name in QUEUE)
    return sent - admitted, admitted - finished


QUEUE = ("sent", "admitted", "finished")


def queue_metrics(records: Records) -> dict[str, Any]:
    """Requests waiting and running by vLLM's names: the mean over the time from the first arrival to the last token,
    and the most at any time."""
    times = {name: records.requests.column(name) for name in QUEUE}
    duration = max(int(times["finished"].max()) - int(records.requests.column("arrival").min()), 1)
    found: dict[str, Any] = {}
    for i, (what, begins, ends) in enumerate((("waiting", "sent", "admitted"), ("running", "admitted", "finished"))):
        found[f"mean_num_requests_{what}"] = float((times[ends] - times[begins]).sum() / duration)
        found[f"max_num_requests_{what}"] = int(queue_depth(times, times[begins])[i].max())  # it grows only there
    return found


GOODPUT = ("ttft", "tpot", "e2el")


def goodput_metrics(records: Records, slos_ms: Mapping[str, float], tasks: Sequence[str]) -> dict[str, Any]:
    """Requests per second that keep every SLO, as vLLM's --goodput counts them, and their share by task.

    slos_ms: of `ttft`, `tpot` and `e2el`; a request of one token keeps any TPOT. tasks: by request number.
    """
    r = records.requests
    sent, first, last = r.column("sent"), r.column("first_token"), r.column("finished")
    tpot = (last - first) / np.maximum(r.column("output_tokens") - 1, 1)
    took = {"ttft": first - sent, "tpot": tpot, "e2el": last - sent}
    good = np.ones(len(r), dtype=bool)
    for name, limit in slos_ms.items():
        good &= took[name] <= limit * 1e6
    labels = np.array([tasks[i] for i in r.column("request").tolist()])
    return {
        "request_goodput": float(good.sum()) * 1e9 / max(int(last.max()) - int(r.column("arrival").min()), 1),
        "slo_attainment": float(good.mean()),
        "slo_attainment_by_slo": {n: float((took[n] <= ms * 1e6).mean()) for n, ms in slos_ms.items()},
        "slo_attainment_by_task": {t: float(good[labels == t].mean()) for t in sorted(set(labels.tolist()))},
    }


def cache_metrics(counts: Counts, h2d_bytes: int, d2h_bytes: int, nvme_bytes: int, tokens: int) -> dict[str, Any]:
    """Lookups are the unique experts of each layer and step. Stall is time the GPU waits for experts."""
    looked = max(counts.lookups, 1)
    stall = sum(counts.spent[k] for k in ("pcie", "nvme", "host"))
    prefetched = counts.prefetched_bytes
    return {
        "lookups": counts.lookups,
        "hits": counts.hits,
        "lates": counts.lates,
        "misses": counts.misses,
        "hit_rate": counts.hits / looked,
        "late_rate": counts.lates / looked,
        "miss_rate": counts.misses / looked,
        "evictions": counts.evictions,
        "host_experts": counts.hosted,
        "h2d_bytes": h2d_bytes,
        "d2h_bytes": d2h_bytes,
        "nvme_bytes": nvme_bytes,
        "prefetch_bytes": prefetched,
        "prefetch_useful_bytes": counts.prefetch_used_bytes,
        "prefetch_wasted_bytes": prefetched - counts.prefetch_used_bytes,
        "prefetch_precision": counts.prefetch_used_bytes / prefetched if prefetched else None,
        "h2d_bytes_per_token": h2d_bytes / max(tokens, 1),
        "stall_ms_per_token": stall / 1e6 / max(tokens, 1),
    }


def cost_metrics(machine: Machine, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """$ per million tokens at the machine's price per hour, from the first arrival to the last token; None where no
    price is known. numbers: what `throughput_metrics` returned."""
    per_second = None if machine.usd_per_hour is None else machine.usd_per_hour / 3600
    return {
        f"usd_per_million_{what}tokens": per_second and 1e6 * per_second / numbers[rate]
        for what, rate in (("output_", "output_throughput"), ("", "total_token_throughput"))
    }


ENERGY = "(TDP of all GPUs x seconds computing + their idle power x the other seconds) / output tokens"


def busy_share_energy(machine: Machine, busy_ns: int, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """ENERGY: joules of the GPUs per output token by the TDP of the specification; no host, no cooling.

    TDP is the most a GPU draws in the long run, so an upper estimate of its computing; idle power that is not known
    counts as 0, a lower one of its waiting. None where no TDP is known.
    """
    seconds, gpus = numbers["duration_s"], [one.gpu for one in machine.each]
    busy = min(busy_ns / 1e9, seconds)
    tdp = [gpu.tdp_w for gpu in gpus if gpu.tdp_w is not None]
    joules = None
    if len(tdp) == len(gpus):
        joules = sum(tdp) * busy + sum(gpu.idle_w or 0.0 for gpu in gpus) * (seconds - busy)
        joules /= max(numbers["total_output_tokens"], 1)
    return {
        "joules_per_output_token": joules,
        "formula": ENERGY,
        "tdp_w": sum(tdp) if len(tdp) == len(gpus) else None,
        "idle_w": None if any(gpu.idle_w is None for gpu in gpus) else sum(gpu.idle_w or 0.0 for gpu in gpus),
        "busy_share": busy / seconds,
    }


SERVING = ("lower_precision", "rerouted", "skipped")  # what the rows of Counts.altered are


def routing_fidelity(
    given: Trace, served: Trace, workload: Workload, counts: Counts, altered: Shares | None = None
) -> dict[str, Any]:
    """Shares of routed weight served exactly as chosen, at lower precision, rerouted, merged or skipped. Not quality.

    given: the trace as it comes; served: as the system's transforms left it; altered: their shares, None without any.
    Returns `overall`, `by_layer` (in the order of the trace's MoE layers) and `by_task` (where requests have labels);
    each layer and task weighs as much as the gate weight its tokens gave to experts.
    """
    shares = nothing(given) if altered is None else altered
    weight = np.ones((given.layers, len(given.tasks)))
    if altered is not None or counts.altered.any():
        rows = np.concatenate([np.r_[r.prefill, r.decode] for r in workload.requests]).astype(np.int64)
        weight, total = _routed(given, rows), _routed(served, rows)
        then = dict(zip(SERVING, counts.altered / np.maximum(total, 1), strict=True))
        shares = chain(shares, nothing(given) | then)
    tasks = sorted({r.task for r in workload.requests if r.task})
    number = {task: i for i, task in enumerate(given.tasks)}
    return {
        "overall": {kind: float(share) for kind, share in _averaged(shares, weight, (0, 1)).items()},
        "by_layer": {kind: share.tolist() for kind, share in _averaged(shares, weight, 1).items()},
        "by_task": {
            task: {kind: float(share[number[task]]) for kind, share in _averaged(shares, weight, 0).items()}
            for task in tasks
        },
    }


def _routed(trace: Trace, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Routed weight of `rows` in parts of 1 / WEIGHT_ONE: [layers, tasks]."""
    tasks = trace.task_of_row[rows]
    weights = (trace.routed_weight(layer, rows).sum(axis=1) for layer in range(trace.layers))
    return np.stack([np.bincount(tasks, own, minlength=len(trace.tasks)) for own in weights])


def _averaged(shares: Shares, weight: NDArray[np.float64], axis: int | tuple[int, int]) -> Shares:
    """Shares over layers (axis 0), tasks (1) or both, with the rest as `exact`; all of it where nothing is routed."""
    total = weight.sum(axis=axis)
    means = {kind: (shares[kind] * weight).sum(axis=axis) / np.where(total > 0, total, 1.0) for kind in KINDS}
    return {"exact": 1 - sum(means.values())} | means


CAUSES = {
    "mixer": "GPU: attention, router and dense parts",
    "experts": "GPU: routed experts",
    "step": "GPU: embedding, head and sampling",
    "pcie": "waiting for PCIe copies",
    "nvme": "waiting for NVMe reads",
    "host": "waiting for CPU experts",
    "predict": "waiting for the predictor",
    "exchange": "exchanging tokens between GPUs",
    "idle": "no request to serve",
}


def bottleneck(counts: Counts, idle_ns: int, busy_ns: dict[str, int], elapsed_ns: int) -> dict[str, Any]:
    """Shares of the critical path, which one is largest, and how busy each resource was."""
    spent = {cause: counts.spent[cause] for cause in CAUSES} | {"idle": idle_ns}
    serving = max(sum(spent.values()) - idle_ns, 1)
    shares = {cause: ns / serving for cause, ns in spent.items() if cause != "idle"}
    limit = max(shares, key=lambda cause: shares[cause])
    return {
        "limited_by": limit,
        "explanation": CAUSES[limit],
        "critical_path": shares,
        "idle_share": idle_ns / max(elapsed_ns, 1),
        "utilisation": {name: ns / max(elapsed_ns, 1) for name, ns in busy_ns.items()},
    }
