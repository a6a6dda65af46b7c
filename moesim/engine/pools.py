"""Prompts on some GPUs, outputs on others: two servers, one after the other, with KV caches travelling between them.

Nothing of the second pool reaches back to the first, so each is simulated by itself (docs/design.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from heapq import heapreplace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.costs.shard import shard
from moesim.engine.residency import Counts
from moesim.engine.simulate import Outcome, Setting, simulate
from moesim.records import Records, Table
from moesim.systems.system import System
from moesim.units import ns
from moesim.workload import Workload

I64 = NDArray[np.int64]


def prompts_of(workload: Workload) -> Workload:
    """What the first pool serves: every prompt, up to its first token."""
    return replace(workload, requests=tuple(replace(r, decode=r.decode[:0]) for r in workload.requests))


def outputs_of(workload: Workload) -> Workload:
    """What the second pool serves: the tokens after the first, of those that have any."""
    rest = tuple(replace(r, prefill=r.prefill[:0]) for r in workload.requests if len(r.decode))
    return replace(workload, requests=rest)


def simulate_pools(
    workload: Workload,
    prompts: Setting,
    outputs: Setting,
    system: System,
    on_tokens: Callable[[int], None] = lambda count: None,
    engine: str = "auto",
) -> Outcome:
    """Serve `prompts_of(workload)` on the GPUs of one setting, then `outputs_of(workload)` on those of the other.

    A KV cache goes over as soon as its prompt is done. `devices` says how much memory caches took in each pool at most
    (`kv_most_bytes`) and how much there was (`kv_room_bytes`): in a pool with less room than that, requests would have
    waited, and those here did not. Records have no layers, transfers and kernels.
    """
    first = simulate(prompts, system, on_tokens=on_tokens, engine=engine)
    done = _by_request(first.records.requests)
    going = np.flatnonzero([len(r.decode) for r in workload.requests])
    contexts = done["prompt_tokens"][going]
    took, channels, sizes = _transfers(prompts, outputs, system, contexts)
    began, landed = _in_turn(done["finished"][going], took, channels)

    order = np.argsort(landed, kind="stable")
    arriving = [replace(outputs.workload.requests[i], arrival_ns=int(landed[i])) for i in order.tolist()]
    outputs = replace(outputs, workload=replace(outputs.workload, requests=tuple(arriving)))
    second = simulate(outputs, system, on_tokens=on_tokens, engine=engine)
    made = {name: values[order.argsort()] for name, values in _by_request(second.records.requests).items()}

    left = done["finished"].copy()
    left[going] = landed
    held = [
        _most(done["admitted"], left, _kv_bytes(prompts, system, done["prompt_tokens"])),
        _most(began, made["finished"], _kv_bytes(outputs, system, contexts + made["output_tokens"])),
    ]
    outcome = _joined(_records(first.records, done, second.records, made, going), prompts, first, outputs, second)
    outcome.busy_ns["kv"] = int(took.sum()) // channels
    outcome.link_bytes["kv"] = int(sizes.sum())
    pools = [
        _pool(setting, one, outcome.elapsed_ns, most)
        for setting, one, most in zip((prompts, outputs), (first, second), held, strict=True)
    ]
    transfer = {"mean_ms": float((landed - done["finished"][going]).mean() / 1e6), "bytes": int(sizes.sum())}
    return replace(outcome, devices={"prefill": pools[0], "decode": pools[1], "kv_transfer": transfer})


def _by_request(requests: Table) -> dict[str, I64]:
    order = requests.column("request").argsort()
    return {name: requests.column(name)[order] for name in requests.columns}


# KV caches


def _kv_bytes(setting: Setting, system: System, contexts: I64) -> I64:
    """Of caches of so many tokens, in the memory that `setting.limits.kv_bytes` is about: one GPU's where all share
    every sequence, else all GPUs'."""
    model = shard(setting.table.model, setting.gpus, system.parallel.attention == "tensor", experts=False)
    known, place = np.unique(contexts, return_inverse=True)
    return np.array([model.kv_bytes(context) for context in known.tolist()], dtype=np.int64)[place]


def _transfers(prompts: Setting, outputs: Setting, system: System, contexts: I64) -> tuple[I64, int, I64]:
    """(ns of each cache's way, how many go at once, bytes that arrive).

    A cache that has been split by heads goes over every link of the smaller pool at once; a whole one goes from one GPU
    to another, beside as many others as there are pairs. A link takes it at the rate of an all-gather of two GPUs, in
    which each sends half of what it has in the end.
    """
    sizes = _kv_bytes(outputs, system, contexts)
    if system.parallel.attention == "tensor":
        total = sizes * outputs.gpus
        one_link, channels = np.maximum(sizes, -(-total // prompts.gpus)), 1
    else:
        total, one_link, channels = sizes, sizes, min(prompts.gpus, outputs.gpus)
    known, place = np.unique(one_link, return_inverse=True)
    costs = prompts.table.costs
    took = np.array([ns(costs.exchange("all_gather", 2 * size, 2)) for size in known.tolist()], dtype=np.int64)
    return took[place], channels, total


def _in_turn(ready: I64, took: I64, channels: int) -> tuple[I64, I64]:
    """(begin, end) of each transfer: first come, first served by whichever of the channels is free first."""
    began, free = np.empty_like(ready), [0] * channels
    for i in np.argsort(ready, kind="stable").tolist():
        began[i] = max(int(ready[i]), free[0])
        heapreplace(free, int(began[i] + took[i]))
    return began, began + took


def _most(begin: I64, end: I64, sizes: I64) -> int:
    """The largest sum of `sizes` at any time; what ends makes room for what begins at the same time."""
    order = np.argsort(np.concatenate([end, begin]), kind="stable")
    return int(np.cumsum(np.concatenate([-sizes, sizes])[order]).max())


# Both pools as one


def _records(first: Records, done: dict[str, I64], second: Records, made: dict[str, I64], going: I64) -> Records:
    """Requests from the first pool's sending to the second pool's last token; steps of both by their start."""
    records = Records(False)
    steps = np.concatenate([first.steps.rows(), second.steps.rows()])
    records.steps.extend(steps[np.argsort(steps[:, records.steps.columns.index("start")], kind="stable")])
    whole = {name: values.copy() for name, values in done.items()}
    whole["finished"][going] = made["finished"]
    whole["output_tokens"][going] += made["output_tokens"]
    rows = np.stack([whole[name] for name in records.requests.columns], axis=1)
    records.requests.extend(rows[np.argsort(whole["finished"], kind="stable")])
    records.gaps.extend((made["first_token"] - done["first_token"][going]).tolist())
    records.gaps.extend(second.gaps)
    return records


def _joined(records: Records, prompts: Setting, first: Outcome, outputs: Setting, second: Outcome) -> Outcome:
    """Times are means over all GPUs, so that busy and idle make up the elapsed time; everything else is a sum."""
    gpus = prompts.gpus + outputs.gpus

    def mean(a: int, b: int) -> int:
        return (prompts.gpus * a + outputs.gpus * b) // gpus

    end = max(first.elapsed_ns, second.elapsed_ns)
    summed = {
        f.name: getattr(first.counts, f.name) + getattr(second.counts, f.name)
        for f in fields(Counts)
        if f.name != "spent"
    }
    counts = Counts(**summed)
    a, b = first.counts.spent, second.counts.spent
    counts.spent.update({cause: mean(a[cause], b[cause]) for cause in {*a, *b}})
    busy = [first.busy_ns, second.busy_ns]
    moved = [first.link_bytes, second.link_bytes]
    return Outcome(
        records=records,
        counts=counts,
        elapsed_ns=end,
        idle_ns=mean(first.idle_ns + end - first.elapsed_ns, second.idle_ns + end - second.elapsed_ns),
        busy_ns={name: mean(*(one.get(name, 0) for one in busy)) for name in sorted({*busy[0], *busy[1]})},
        link_bytes={name: sum(one.get(name, 0) for one in moved) for name in sorted({*moved[0], *moved[1]})},
        peak_resident_bytes=max(first.peak_resident_bytes, second.peak_resident_bytes),
        engine="pools",
        pools=(first, second),
    )


def _pool(setting: Setting, outcome: Outcome, end: int, most: int) -> dict[str, Any]:
    return {
        **(outcome.devices or {"gpus": 1}),
        "busy_share": (outcome.elapsed_ns - outcome.idle_ns) / end,
        "kv_most_bytes": most,
        "kv_room_bytes": setting.limits.kv_bytes,
    }
