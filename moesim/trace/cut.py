"""A part of a trace, as a trace of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.trace.trace import PHASES, Requests, Trace


def cut(
    trace: Trace,
    *,
    task: str | None = None,
    request_ids: Sequence[str] = (),
    phase: str | None = None,
    requests: int | None = None,
    first_tokens: int | None = None,
) -> Trace:
    """The rows that meet every condition given: a task, named requests, a phase; of those, the first requests, then
    the first tokens of the whole. Raises TraceError if a condition is unknown or nothing is left."""
    of_request = np.ones(len(trace.requests), bool)
    if task is not None:
        of_request &= _named(task, trace.requests.task, "task")
    if request_ids:
        of_request &= np.logical_or.reduce([_named(i, trace.requests.request_id, "request id") for i in request_ids])
    rows = of_request[trace.request]
    if phase is not None:
        if phase not in PHASES:
            raise TraceError(f"phase '{phase}'{nearest(phase, PHASES)}")
        rows &= trace.phase == PHASES.index(phase)
    if requests is not None:
        kept = np.unique(trace.request[rows])[: _at_least_one(requests, "requests")]
        rows &= np.isin(trace.request, kept)
    if first_tokens is not None:
        rows &= np.cumsum(rows) <= _at_least_one(first_tokens, "first tokens")
    if not rows.any():
        raise TraceError("no row of the trace meets all of these conditions; relax one")
    given = {
        "task": task, "request_ids": list(request_ids), "phase": phase, "requests": requests,
        "first_tokens": first_tokens,
    }  # fmt: skip
    done = {name: value for name, value in given.items() if value not in (None, [])}
    return _take(trace, rows, {"from": trace.content_hash, **done})


def _at_least_one(number: int, what: str) -> int:
    if number < 1:
        raise TraceError(f"{number} {what}; must be 1 or more")
    return number


def _named(name: str, names: Sequence[str], what: str) -> NDArray[np.bool_]:
    found = np.array([n == name for n in names])
    if not found.any():
        known = {n for n in names if n}
        remedy = nearest(name, known) if known else f"; the trace has no {what} column"
        raise TraceError(f"unknown {what} '{name}'{remedy}")
    return found


def _take(trace: Trace, rows: NDArray[np.bool_], how: dict[str, Any]) -> Trace:
    kept, request = np.unique(trace.request[rows], return_inverse=True)
    old = trace.requests
    history = [*trace.info.extra.get("cut", []), how]
    return Trace(
        info=replace(trace.info, extra={**trace.info.extra, "cut": history}),
        requests=Requests(
            request_id=tuple(old.request_id[i] for i in kept),
            task=tuple(old.task[i] for i in kept),
            prompt_tokens=old.prompt_tokens[kept],
            arrival_ns=None if old.arrival_ns is None else old.arrival_ns[kept],
        ),
        experts=trace.experts[rows],
        request=request.astype(np.int32),
        phase=trace.phase[rows],
        position=trace.position[rows],
        weights=None if trace.weights is None else trace.weights[rows],
        probabilities=None if trace.probabilities is None else trace.probabilities[rows],
    )
