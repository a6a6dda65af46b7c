"""The copy thread: one expert, or one matrix of it, at a time; demand before prefetch, first come first served."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesim.engine.cache import Entry


@dataclass(eq=False)
class Job:
    """An expert on its way to a slot. wanted: (tick, tokens) of the layer that waits for it."""

    layer: int
    expert: int
    key: int
    nbytes: int
    parts: int
    demand: bool
    expires: int
    keep: bool
    promoted: bool = False
    flying: bool = False
    copied: int = 0  # parts that have come
    entry: Entry | None = None
    wanted: tuple[int, int] | None = None


@dataclass(frozen=True)
class Copied:
    """One transfer as it happened, in ns of time.perf_counter. woken: the thread slept until it could start."""

    layer: int
    expert: int
    start: int
    end: int
    demand: bool
    woken: bool


class Loader:
    """Copies jobs in a thread of its own. `lock` guards the residency; every method but `close` is called under it.

    reserve(job) finds a slot or says that none is free; passed(job) tells that its layer is over; copy(job) moves one
    part for real; landed(job) and dropped(job) report. pace_gbps: wait after each part until it took that long.
    """

    def __init__(
        self,
        lock: threading.Condition,
        reserve: Callable[[Job], bool],
        passed: Callable[[Job], bool],
        copy: Callable[[Job], None],
        landed: Callable[[Job], None],
        dropped: Callable[[Job], None],
        core: int | None,
        pace_gbps: float = 0.0,
    ) -> None:
        self._lock, self._reserve, self._passed = lock, reserve, passed
        self._copy, self._landed, self._dropped = copy, landed, dropped
        self._core, self._pace = core, pace_gbps
        self._demand: deque[Job] = deque()
        self._prefetch: deque[Job] = deque()
        self._closing = self._woken = False
        self.error: Exception | None = None
        self.log: list[Copied] = []
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        (self._demand if job.demand else self._prefetch).append(job)
        self._lock.notify_all()

    def promote(self, job: Job) -> None:
        """The router wants a queued prefetch."""
        job.demand = job.promoted = True
        if not job.flying:
            self._demand.append(job)
            self._lock.notify_all()

    def close(self) -> None:
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join()

    def _run(self) -> None:
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})  # of this thread alone
        try:
            while (job := self._take()) is not None:
                start = time.perf_counter_ns()
                self._copy(job)
                if self._pace:
                    _wait_until(start + job.nbytes / job.parts / self._pace)
                self._finish(job, start)
        except Exception as error:
            with self._lock:
                self.error = error
                self._lock.notify_all()

    def _take(self) -> Job | None:
        with self._lock:
            self._woken = False
            while not self._closing:
                if (job := self._next()) is not None:
                    job.flying = True
                    return job
                self._lock.wait()
                self._woken = True
        return None

    def _next(self) -> Job | None:
        if self._demand:
            if self._demand[0].entry is not None or self._reserve(self._demand[0]):
                return self._demand.popleft()
            return self._begun()
        while self._prefetch:
            job = self._prefetch[0]
            if job.demand:
                self._prefetch.popleft()  # promoted: it stands among the demands
            elif job.entry is None and self._passed(job):
                self._dropped(self._prefetch.popleft())
            elif job.entry is not None or self._reserve(job):
                return self._prefetch.popleft()
            else:
                return None
        return None

    def _begun(self) -> Job | None:
        """The first demand waits for a slot: an expert of which some matrices have come goes on, and frees its slot."""
        begun = next((job for job in self._demand if job.entry is not None), None)
        if begun is not None:
            self._demand.remove(begun)
        elif self._prefetch and self._prefetch[0].entry is not None and not self._prefetch[0].demand:
            begun = self._prefetch.popleft()
        return begun

    def _finish(self, job: Job, start: int) -> None:
        with self._lock:
            self.log.append(Copied(job.layer, job.expert, start, time.perf_counter_ns(), job.demand, self._woken))
            job.flying = False
            job.copied += 1
            if job.copied < job.parts:
                (self._demand if job.demand else self._prefetch).appendleft(job)
            else:
                self._landed(job)
            self._lock.notify_all()


def _wait_until(ns: float) -> None:
    while (left := ns - time.perf_counter_ns()) > 0:
        time.sleep(left / 1e9 if left > 200_000 else 0)
