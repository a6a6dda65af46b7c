"""What a worker does with one point, wherever the worker is."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from moesim.errors import MoesimError
from moesim.plan.jobs import Job
from moesim.plan.results import FAILED, REFUSED, Row, failure, row
from moesim.prediction import Beliefs
from moesim.question import compose, predict, run
from moesim.trace import Trace


class Executor(Protocol):
    """Runs points somewhere, predicting once what several of them believe."""

    def run(self, jobs: Sequence[Job], traces: Mapping[Path, Trace]) -> Iterator[list[Row]]:
        """Rows as they finish, in any order, some at a time; every job gives one row, whatever befalls it."""
        ...


def believe(job: Job, trace: Trace) -> tuple[Beliefs, ...]:
    """The predictions of a point, which every other with the same `belief` can use."""
    return predict(trace, compose(job.point.policy, job.point.settings), job.point.question)


def answer(job: Job, trace: Trace, beliefs: tuple[Beliefs, ...]) -> Row:
    """Run one point; an error becomes its row."""
    p = job.point
    try:
        known = beliefs if job.belief else None
        done = run(trace, p.policy, p.question, p.settings, p.anchors, beliefs=known, shown=False)
        return row(job, done.summary)
    except Exception as error:  # whatever it is, the other points go on
        return broken(job, error)


def broken(job: Job, error: BaseException) -> Row:
    """The row of a point that ended in `error`."""
    if isinstance(error, MoesimError):
        return failure(job, REFUSED, str(error))
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return failure(job, FAILED, f"{type(error).__name__}: {error}{where}")
