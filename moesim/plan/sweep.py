"""A sweep: every point answered once, each answer on disk as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from moesim.plan.jobs import Job, Resolver
from moesim.plan.results import FAILED, REFUSED, Results, failure
from moesim.plan.spec import Point
from moesim.plan.work import Executor

Progress = Callable[[int, int], None]  # points done in this session, and points it has to do


@dataclass(frozen=True)
class Tally:
    """points: what the sweep asks; before: of these, answered by earlier sessions; refused and failed: without an
    answer, of all; first: one reason."""

    points: int
    before: int
    refused: int
    failed: int
    first: str


def sweep(
    points: Sequence[Point],
    folder: Path,
    executor: Executor,
    retry: bool = False,
    on_progress: Progress = lambda done, total: None,
) -> Tally:
    """Answer every point that the data set in `folder` does not hold yet; the same call goes on after a kill.

    retry: also those recorded as failed. Raises MoesimError for a trace, model, machine or system nobody knows.
    """
    resolver = Resolver()
    jobs = resolver.jobs(points)
    with Results.open(folder) as results:
        if retry:
            results.forget_failures()
        todo = [job for job in jobs if job.id not in results.status]
        before = len(jobs) - len(todo)
        results.append([failure(job, REFUSED, job.refused) for job in todo if job.refused])
        first = next((job.refused for job in todo if job.refused), "")
        runs = [job for job in todo if not job.refused]
        done, total = len(todo) - len(runs), len(todo)
        on_progress(done, total)
        if runs:
            with closing(executor.run(runs, resolver.traces)) as finished:  # type: ignore[type-var]
                for rows in finished:
                    results.append(rows)
                    done += len(rows)
                    on_progress(done, total)
                    first = first or next((str(r["reason"]) for r in rows if r["status"] in (REFUSED, FAILED)), "")
        return _tally(jobs, results, before, first)


def _tally(jobs: Sequence[Job], results: Results, before: int, first: str) -> Tally:
    status = [results.status[job.id] for job in jobs]
    return Tally(len(jobs), before, status.count(REFUSED), status.count(FAILED), first)
