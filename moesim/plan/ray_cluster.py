"""Points on an existing Ray cluster. Traces and predictions go into its object store once, for all that use them."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import SweepError
from moesim.plan.jobs import Job
from moesim.plan.results import Row
from moesim.plan.work import answer, believe, broken
from moesim.trace import Trace

AHEAD = 4  # points handed to the cluster per core, so that no core waits for the driver
HAND_OVER_S = 0.2


class RayCluster:
    """A cluster that runs already; address: as `ray.init`'s, None: RAY_ADDRESS or the one on this machine."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address

    def run(self, jobs: Sequence[Job], traces: Mapping[Path, Trace]) -> Iterator[list[Row]]:
        """As `Executor.run`. Every node needs moesim of the same version."""
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            self._connect(ray)
        try:
            yield from _run(ray, jobs, traces)
        finally:
            if ours:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        try:
            _reach(self._address)
            ray.init(address=self._address or "auto", logging_level="ERROR", log_to_driver=False)
        except (OSError, ValueError, RuntimeError) as error:
            where = self._address or "this machine or at RAY_ADDRESS"
            raise SweepError(
                f"no Ray cluster at {where} ({str(error).splitlines()[0]}); start one with 'ray start --head', or give "
                "--address HOST:6379"
            ) from error


def _reach(address: str | None) -> None:
    """Raise OSError at once where nobody answers at HOST:PORT; Ray would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdigit() and "://" not in host:
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise SweepError("--executor ray needs Ray, which is not installed; pip install 'moesim[cluster]'") from error
    return ray


def _run(ray: Any, jobs: Sequence[Job], traces: Mapping[Path, Trace]) -> Iterator[list[Row]]:
    answering, believing = ray.remote(answer), ray.remote(believe)
    placed = {path: ray.put(trace) for path, trace in traces.items()}
    beliefs: dict[str, Any] = {}
    left = deque(jobs)
    flying: dict[Any, Job] = {}
    while left or flying:
        most = AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        while left and len(flying) < most:
            job = left.popleft()
            trace = placed[job.point.trace]
            if job.belief and job.belief not in beliefs:
                beliefs[job.belief] = believing.remote(job, trace)
            known = beliefs[job.belief] if job.belief else ()
            flying[answering.remote(job, trace, known)] = job
        ray.wait(list(flying), num_returns=1)
        done, _ = ray.wait(list(flying), num_returns=len(flying), timeout=HAND_OVER_S)
        yield [_outcome(ray, ref, flying.pop(ref)) for ref in done]


def _outcome(ray: Any, ref: Any, job: Job) -> Row:
    """The row, or what Ray says in its place: an error while predicting, a node that died."""
    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return broken(job, error.cause or error)
    except ray.exceptions.RayError as error:
        return broken(job, error)
