"""Workload: which requests arrive when, and which rows of a trace say how their tokens are routed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesim.errors import WorkloadError
from moesim.trace import Requests, Trace
from moesim.workload_files import CHARACTERS, MAX_SECONDS, read_rows


@dataclass(frozen=True)
class Request:
    """One request. `prefill` and `decode` are rows of the trace; a decode-only trace has no prefill rows.

    blocks: a hash for every full moesim.workload_files.PREFIX_BLOCK of the prompt, of all tokens up to the block's end.
    """

    request_id: str
    task: str
    arrival_ns: int
    prompt_tokens: int
    prefill: NDArray[np.int64]
    decode: NDArray[np.int64]
    slo_ns: int = 0
    blocks: tuple[int, ...] = ()

    @property
    def output_tokens(self) -> int:
        """The prompt's last token yields the first output, every decode row one more."""
        return len(self.decode) + (1 if len(self.prefill) else 0)


@dataclass(frozen=True)
class Workload:
    """Requests by arrival. `routing` says whether their routing is the trace's own or drawn from it."""

    requests: tuple[Request, ...]
    arrivals: str
    routing: str = "as recorded"


def from_trace(trace: Trace) -> Workload:
    """The trace's own requests, at its own arrival times; all at once where it has none."""
    order = np.arange(len(trace.requests))
    arrivals = trace.requests.arrival_ns
    if arrivals is not None:
        order = np.argsort(arrivals, kind="stable")
    requests = []
    for i in order.tolist():
        start, split, end = int(trace.first_row[i]), int(trace.decode_start[i]), int(trace.first_row[i + 1])
        requests.append(
            Request(
                request_id=trace.requests.request_id[i],
                task=trace.requests.task[i],
                arrival_ns=int(arrivals[i]) if arrivals is not None else 0,
                prompt_tokens=int(trace.requests.prompt_tokens[i]),
                prefill=np.arange(start, split),
                decode=np.arange(split, end),
            )
        )
    return Workload(tuple(requests), "as recorded" if arrivals is not None else "all at time 0")


def with_arrivals(workload: Workload, rate: float, burstiness: float, seed: int) -> Workload:
    """Arrivals drawn anew: gamma gaps of mean 1/rate s and shape `burstiness` (1 = Poisson); inf = all at once.

    The meaning of `--request-rate` and `--burstiness` is vLLM's.
    """
    if not rate > 0:
        raise WorkloadError(f"request rate {rate} must be above 0 requests/s; use inf to send all at once")
    if not burstiness > 0 or math.isinf(burstiness):
        raise WorkloadError(f"burstiness {burstiness} must be a number above 0; 1 is Poisson")
    if math.isinf(rate):
        return replace(_at(workload, np.zeros(len(workload.requests))), arrivals="all at time 0")
    rng = np.random.default_rng([seed, 0xA551])
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), len(workload.requests))
    if gaps.sum() > MAX_SECONDS:
        raise WorkloadError(f"request rate {rate:g}: the last request would arrive after {gaps.sum():.3g} s; raise it")
    return replace(_at(workload, np.cumsum(gaps)), arrivals=f"{rate:g} requests/s, burstiness {burstiness:g}")


def _at(workload: Workload, seconds: NDArray[np.float64]) -> Workload:
    moved = [replace(r, arrival_ns=int(s * 1e9)) for r, s in zip(workload.requests, seconds, strict=True)]
    return replace(workload, requests=tuple(moved))


def first(workload: Workload, count: int) -> Workload:
    """Its first `count` requests."""
    if count < 1:
        raise WorkloadError(f"number of prompts {count} must be at least 1")
    return replace(workload, requests=workload.requests[:count])


def with_slo(workload: Workload, slo_ms: float) -> Workload:
    """Promise every request the same time (ms); what an SLO-aware scheduler goes by."""
    if not 0 < slo_ms < math.inf:
        raise WorkloadError(f"SLO {slo_ms} ms must be a number above 0")
    return replace(workload, requests=tuple(replace(r, slo_ns=int(slo_ms * 1e6)) for r in workload.requests))


def read_workload(path: Path, trace: Trace, seed: int) -> Workload:
    """Requests from a file that `moesim.workload_files.read_rows` knows.

    A row whose request_id is in the trace is routed as that request was; any other takes its routing from trace
    requests of its task, drawn with `seed` and joined end to end, and the workload says so.
    """
    own = from_trace(trace).requests
    by_name = {r.request_id: r for r in own}
    rng = np.random.default_rng([seed, 0x10B])
    requests, drawn, counted = [], 0, True
    pools: dict[str, tuple[_Pieces, _Pieces]] = {}
    for row in read_rows(path):
        counted &= row.counted
        name = row.request_id or f"{path.stem}-{row.line}"
        if name in by_name:
            prefill, decode = _recorded(path, row.line, by_name[name], row.prompt, row.output)
        else:
            drawn += 1
            if row.task not in pools:
                pools[row.task] = _pool(path, row.line, own, row.task)
            prefill, decode = _draw(*pools[row.task], row.prompt, row.output, rng)
        requests.append(
            Request(name, row.task, int(row.arrival_s * 1e9), row.prompt, prefill, decode, blocks=row.blocks)
        )
    requests.sort(key=lambda r: r.arrival_ns)
    names = [r.request_id for r in requests]
    if len(set(names)) < len(names):
        again = next(name for i, name in enumerate(names) if name in names[:i])
        raise WorkloadError(f"{path}: request_id '{again}' appears twice; ids must be unique")
    routing = f"{drawn} of {len(requests)} requests drawn from the trace" if drawn else "as recorded"
    if not counted:
        routing += f"; lengths estimated: a token for every {CHARACTERS} characters"
    return Workload(tuple(requests), f"from {path.name}", routing)


def unroll(trace: Trace, workload: Workload) -> tuple[Trace, Workload]:
    """The trace that `workload` really serves: a row of its own for every token, also where rows are drawn twice.

    Predictors and lookahead go by rows, so a row must stand for one token of one request.
    """
    rows = [np.concatenate([r.prefill, r.decode]) for r in workload.requests]
    ends = np.cumsum([len(r) for r in rows])
    moved = []
    for request, end, own in zip(workload.requests, ends.tolist(), rows, strict=True):
        split = end - len(own) + len(request.prefill)
        moved.append(replace(request, prefill=np.arange(end - len(own), split), decode=np.arange(split, end)))
    flat = np.concatenate(rows)
    position = [np.r_[np.arange(len(r.prefill)), r.prompt_tokens + np.arange(len(r.decode))] for r in workload.requests]
    requests = Requests(
        tuple(r.request_id for r in workload.requests),
        tuple(r.task for r in workload.requests),
        np.array([r.prompt_tokens for r in workload.requests], dtype=np.int32),
        np.array([r.arrival_ns for r in workload.requests], dtype=np.int64),
    )
    index = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
    served = replace(
        trace,
        requests=requests,
        request=index,
        position=np.concatenate(position).astype(np.int32),
        phase=trace.phase[flat],
        experts=trace.experts[flat],
        weights=None if trace.weights is None else trace.weights[flat],
        probabilities=None if trace.probabilities is None else trace.probabilities[flat],
    )
    return served, replace(workload, requests=tuple(moved))


def _recorded(
    path: Path, line: int, own: Request, prompt: int, output: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a request the trace knows, cut to the lengths asked for."""
    prompt_rows = prompt if len(own.prefill) else 0
    decode_rows = output - (1 if len(own.prefill) else 0)
    if prompt_rows > len(own.prefill) or decode_rows > len(own.decode):
        raise WorkloadError(
            f"{path}, line {line}: {prompt} prompt and {output} output tokens, but the trace has {own.prompt_tokens} "
            f"and {own.output_tokens} of request '{own.request_id}'; shorten it or leave its request_id out"
        )
    return own.prefill[:prompt_rows], own.decode[:decode_rows]


class _Pieces:
    """Runs of trace rows that requests are joined from. same: all have one length, so many are drawn at once."""

    def __init__(self, runs: list[NDArray[np.int64]]) -> None:
        self.runs = [run for run in runs if len(run)]
        self.same = np.stack(self.runs) if len({len(run) for run in self.runs}) == 1 else None

    def joined(self, length: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """`length` rows: whole pieces drawn with replacement, the last one cut."""
        if length > 0 and not self.runs:
            raise WorkloadError("the trace has no decode rows to draw from; use a trace with generated tokens")
        if self.same is not None and length > 0:  # NOTE: the same draws as below, twenty times as fast
            count = -(-length // self.same.shape[1])
            return self.same[rng.integers(len(self.same), size=count)].ravel()[:length]
        out: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        have = 0
        while have < length:
            out.append(self.runs[int(rng.integers(len(self.runs)))])
            have += len(out[-1])
        return np.concatenate(out)[:length]


def _pool(path: Path, line: int, own: tuple[Request, ...], task: str) -> tuple[_Pieces, _Pieces]:
    """Prompts and outputs that a request of this task may be joined from."""
    pool = [r for r in own if r.task == task] if task else list(own)
    if not pool:
        tasks = ", ".join(sorted({r.task for r in own if r.task})) or "none"
        raise WorkloadError(f"{path}, line {line}: task '{task}' is not in the trace; it has: {tasks}")
    return _Pieces([r.prefill for r in pool]), _Pieces([r.decode for r in pool])


def _draw(
    prompts: _Pieces, outputs: _Pieces, prompt: int, output: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of a request; its first token comes from its prompt, where the trace has prompts."""
    has_prefill = bool(prompts.runs)
    prefill = prompts.joined(prompt if has_prefill else 0, rng)
    return prefill, outputs.joined(output - 1 if has_prefill else output, rng)
