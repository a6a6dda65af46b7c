"""A run as a timeline for Perfetto (ui.perfetto.dev) or chrome://tracing: Chrome's JSON trace event format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.files import atomic
from moesim.metrics import QUEUE, queue_depth
from moesim.records import KERNELS, KINDS, LINKS, Records

TRACKS = ("GPU", "copy to GPU", "copy to host", "NVMe reads", "CPU experts", "requests")


def write_timeline(records: Records, path: Path) -> None:
    """One track per resource, counters for batch size, KV cache and queue, one slice per request."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for i, event in enumerate(_events(records)):
            file.write(("" if i == 0 else ",\n") + json.dumps(event, separators=(",", ":")))
        file.write("\n]}\n")


def _events(records: Records) -> Iterator[dict[str, Any]]:
    for track, name in enumerate(TRACKS):
        yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": track, "args": {"name": name}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": track, "args": {"sort_index": track}}
    kernels = records.kernels
    for start, end, layer, what in _rows(kernels, "start", "end", "layer", "what"):
        if end > start:
            yield _slice(0, KERNELS[what], start, end, {"layer": layer} if layer >= 0 else {})
    names = ("link", "start", "end", "layer", "expert", "bytes", "kind")
    for link, start, end, layer, expert, size, kind in _rows(records.transfers, *names):
        args = {"layer": layer, "expert": expert, "bytes": size, "kind": KINDS[kind]}
        yield _slice(1 + link, f"L{layer} E{expert}", start, end, args)
    for request, admitted, finished in _rows(records.requests, "request", "admitted", "finished"):
        for phase, at in (("b", admitted), ("e", finished)):
            yield {"ph": phase, "cat": "request", "name": f"request {request}", "id": request, "pid": 1,
                   "tid": len(TRACKS) - 1, "ts": at / 1e3}  # fmt: skip
    for at, waiting, running in _queue(records):
        args = {"waiting": waiting, "running": running}
        yield {"ph": "C", "name": "requests", "pid": 1, "ts": at / 1e3, "args": args}
    for start, sequences, kv in _rows(records.steps, "start", "sequences", "kv_bytes"):
        yield {"ph": "C", "name": "sequences", "pid": 1, "ts": start / 1e3, "args": {"batch": sequences}}
        yield {"ph": "C", "name": "KV cache", "pid": 1, "ts": start / 1e3, "args": {"bytes": kv}}


def _queue(records: Records) -> Iterator[tuple[int, ...]]:
    """Requests waiting and running as each step starts."""
    times = {name: records.requests.column(name) for name in QUEUE}
    at = records.steps.column("start")
    return zip(at.tolist(), *(depth.tolist() for depth in queue_depth(times, at)), strict=True)


def _rows(table: Any, *names: str) -> Iterator[tuple[int, ...]]:
    return zip(*(table.column(name).tolist() for name in names), strict=True)


def _slice(track: int, name: str, start: int, end: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "X", "name": name, "pid": 1, "tid": track, "ts": start / 1e3, "dur": (end - start) / 1e3,
            "args": args}  # fmt: skip


assert TRACKS[1 : 1 + len(LINKS)] == ("copy to GPU", "copy to host", "NVMe reads", "CPU experts")
