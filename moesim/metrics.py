"""Numbers users see, computed from records. Names follow vLLM's benchmark; times in ms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.residency import Counts
from moesim.records import Records
from moesim.transforms.transform import KINDS, Shares, chain, overall

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
    steps = records.steps
    inputs, outputs = int(steps.column("prefill_tokens").sum()), int(r.column("output_tokens").sum())
    return {
        "completed": len(r),
        "duration_s": seconds,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(r) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
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


def routing_fidelity(counts: Counts, altered: Shares | None = None) -> dict[str, Any]:
    """Shares of routed weight: served as routed, at lower precision, by another expert, or not. Not quality.

    altered: what was done to model and trace before serving; then also the share that passes through merged experts,
    and `before_serving`: the altered shares of every MoE layer over the whole trace.
    """
    total = counts.routed or 1.0
    out = {"lower_precision": counts.lowered / total, "rerouted": counts.rerouted / total}
    out |= {"skipped": counts.skipped / total}
    if altered is None:
        return {"exact": 1 - sum(out.values())} | out
    served = {kind: np.array([out.get(kind, 0.0)]) for kind in KINDS}
    out = overall(chain({kind: np.array([share]) for kind, share in overall(altered).items()}, served))
    by_layer = {kind: shares.tolist() for kind, shares in altered.items()}
    return {"exact": 1 - sum(out.values())} | out | {"before_serving": by_layer}


CAUSES = {
    "mixer": "GPU: attention, router and dense parts",
    "experts": "GPU: routed experts",
    "step": "GPU: embedding, head and sampling",
    "pcie": "waiting for PCIe copies",
    "nvme": "waiting for NVMe reads",
    "host": "waiting for CPU experts",
    "predict": "waiting for the predictor",
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
