"""Points on the cores of this machine: one spawned process each, told what to do over a pipe.

Only the parent writes results, so a worker may die at any moment: its point is recorded as failed and another worker
takes its place. Workers end when the parent does, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import SweepError
from moesim.plan.jobs import Job
from moesim.plan.results import FAILED, Row, failure
from moesim.plan.work import answer, believe, broken
from moesim.prediction import Beliefs
from moesim.trace import Trace
from moesim.trace.io import read

HAND_OVER_S = 0.2  # rows that finish within this time are handed over, and written, together
KEPT = 4  # traces, and sets of beliefs, a worker holds at once


@dataclass(frozen=True)
class Task:
    """Answer a point, or (predicts) make the predictions that it and others use and put them into `folder`."""

    job: Job
    folder: Path | None
    predicts: bool = False


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    started: bool = False
    task: Task | None = None


class Processes:
    """`count` worker processes. scratch: where predictions lie while they are needed."""

    def __init__(self, count: int, scratch: Path | None = None) -> None:
        self._count, self._scratch = count, scratch
        self._spawn = multiprocessing.get_context("spawn")

    def run(self, jobs: Sequence[Job], traces: Mapping[Path, Trace]) -> Iterator[list[Row]]:
        """As `Executor.run`. Workers read the traces themselves: mapped files are shared, copies are not."""
        folder = Path(tempfile.mkdtemp(prefix=".predictions-", dir=self._scratch))
        queue = _Queue(jobs, folder)
        workers = [self._start() for _ in range(min(self._count, len(jobs)))]
        try:
            yield from self._serve(workers, queue)
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join()
                worker.pipe.close()
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self) -> _Worker:
        ours, theirs = self._spawn.Pipe()
        process = self._spawn.Process(target=_work, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that its death ends the pipe
        return _Worker(process, ours)

    def _serve(self, workers: list[_Worker], queue: _Queue) -> Iterator[list[Row]]:
        rows: list[Row] = []
        handed = time.monotonic()
        while queue or any(w.task for w in workers):
            pending = max(0.0, handed + HAND_OVER_S - time.monotonic()) if rows else None
            ready = wait([w.pipe for w in workers], pending)
            for worker in [w for w in workers if w.pipe in ready]:
                rows += self._hear(worker, workers, queue)
            for worker in workers:
                if worker.started and worker.task is None and (task := queue.take()):
                    worker.task = task
                    worker.pipe.send(task)
            if rows and time.monotonic() >= handed + HAND_OVER_S:
                yield rows
                rows, handed = [], time.monotonic()
        if rows:
            yield rows

    def _hear(self, worker: _Worker, workers: list[_Worker], queue: _Queue) -> list[Row]:
        """Take in what a worker says: that it is ready, an answer, an error, or by silence that it died."""
        try:
            said = worker.pipe.recv()
        except (EOFError, OSError):
            return self._bury(worker, workers, queue)
        if not worker.started:
            worker.started = True
            return []
        task, worker.task = worker.task, None
        assert task is not None
        if not task.predicts:
            return [said]
        if isinstance(said, Exception):
            return [broken(job, said) for job in queue.release(task.job.belief, runs=False)]
        queue.release(task.job.belief)
        return []

    def _bury(self, worker: _Worker, workers: list[_Worker], queue: _Queue) -> list[Row]:
        worker.process.join()
        worker.pipe.close()
        workers.remove(worker)
        if not worker.started:
            raise SweepError(
                f"a worker process ended before it began (exit code {worker.process.exitcode}); a script that sweeps "
                "must do so under if __name__ == '__main__'"
            )
        workers.append(self._start())
        code = worker.process.exitcode or 0
        how = f"killed by signal {-code}, as the system does when memory runs out" if code < 0 else f"exit code {code}"
        task = worker.task
        lost = queue.release(task.job.belief, runs=False) if task and task.predicts else [task.job] if task else []
        return [failure(job, FAILED, f"its worker process died ({how})") for job in lost]


class _Queue:
    """Tasks in order; a point waits until its predictions are there."""

    def __init__(self, jobs: Sequence[Job], folder: Path) -> None:
        self._folder = folder
        self._ready: deque[Task] = deque()
        self._held: dict[str, list[Job]] = {}
        for job in jobs:
            if job.belief and job.belief not in self._held:
                self._held[job.belief] = []
                self._ready.append(Task(job, folder / job.belief, predicts=True))
            if job.belief:
                self._held[job.belief].append(job)
        self._ready += [Task(job, None) for job in jobs if not job.belief]

    def __bool__(self) -> bool:
        return bool(self._ready or self._held)

    def take(self) -> Task | None:
        return self._ready.popleft() if self._ready else None

    def release(self, belief: str, runs: bool = True) -> list[Job]:
        """The points that waited for these predictions: ready now, or, without them, never."""
        jobs = self._held.pop(belief)
        if runs:
            self._ready += [Task(job, self._folder / belief) for job in jobs]
        return jobs


def _work(pipe: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    pipe.send("ready")
    traces: dict[Path, Trace] = {}
    held: dict[Path, tuple[Beliefs, ...]] = {}
    while True:
        try:
            task: Task = pipe.recv()
        except (EOFError, OSError):
            return
        pipe.send(_do(task, traces, held))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _do(task: Task, traces: dict[Path, Trace], held: dict[Path, tuple[Beliefs, ...]]) -> Any:
    job, path = task.job, task.job.point.trace
    try:
        trace = _remember(traces, path, read)
        if task.predicts:
            assert task.folder is not None
            save_beliefs(believe(job, trace), task.folder)
            return None
        beliefs = _remember(held, task.folder, load_beliefs) if task.folder else ()
    except Exception as error:
        return error if task.predicts else broken(job, error)
    return answer(job, trace, beliefs)


def _remember(known: dict[Any, Any], key: Any, make: Any) -> Any:
    """`make(key)`, kept with the last few others."""
    if key not in known:
        if len(known) >= KEPT:
            del known[next(iter(known))]
        known[key] = make(key)
    return known[key]


def save_beliefs(beliefs: tuple[Beliefs, ...], folder: Path) -> None:
    """As plain arrays, which every process can map."""
    folder.mkdir()
    for n, one in enumerate(beliefs):
        np.save(folder / f"{n}-facts.npy", np.array([one.distance, one.wraps], dtype=np.int64))
        np.save(folder / f"{n}-experts.npy", one.experts)
        if one.map is not None:
            np.save(folder / f"{n}-map.npy", one.map)


def load_beliefs(folder: Path) -> tuple[Beliefs, ...]:
    found = []
    for n in range(len(list(folder.glob("*-facts.npy")))):
        distance, wraps = np.load(folder / f"{n}-facts.npy").tolist()
        chances = folder / f"{n}-map.npy"
        found.append(
            Beliefs(
                experts=np.load(folder / f"{n}-experts.npy", mmap_mode="r"),
                distance=distance,
                wraps=bool(wraps),
                map=np.load(chances, mmap_mode="r") if chances.exists() else None,
            )
        )
    return tuple(found)
