"""Points with all they depend on resolved: what makes two of them the same, and what they can share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.errors import MoesimError
from moesim.machine import Machine, load_machine
from moesim.model import load_model
from moesim.plan.spec import Point
from moesim.policies.own import is_own
from moesim.prediction import NoPrediction
from moesim.profile import profile_path
from moesim.question import Question, compose
from moesim.systems import System, load_system
from moesim.systems.own_file import own_file
from moesim.systems.system import plain
from moesim.trace import Trace
from moesim.trace.io import read

# What a prediction can depend on besides trace, predictor and seed, where a workload file lays out the rows.
ROWS = ("workload", "num_prompts", "request_rate", "burstiness", "seed")


@dataclass(frozen=True)
class Job:
    """id: hash of everything the answer depends on; belief: hash of what its predictions depend on, "" without any;
    refused: why the point makes no sense, known before it runs."""

    id: str
    point: Point
    belief: str = ""
    refused: str = ""


class Resolver:
    """Reads every trace, model, machine and workload of a sweep once. Raises MoesimError for one that is unknown."""

    def __init__(self) -> None:
        self.traces: dict[Path, Trace] = {}
        self._model = cache(lambda name: _digest(asdict(load_model(name))))
        self._machine = cache(_machine_digest)
        self._file = cache(lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
        self._system = cache(_system)
        self._known = cache(load_system)

    def jobs(self, points: Sequence[Point]) -> list[Job]:
        """One job per different answer, in order."""
        jobs = [self._job(point) for point in points]
        return list({job.id: job for job in reversed(jobs)}.values())[::-1]

    def _job(self, point: Point) -> Job:
        trace = self.traces.get(point.trace) or self.traces.setdefault(point.trace, read(point.trace))
        self._known(point.policy)  # a name nobody knows stops the sweep before it begins
        system, refused = self._system(point.policy, point.settings)
        q = point.question
        facts = {
            "version": __version__,
            "trace": trace.content_hash,
            "model": self._model(q.model or trace.info.model),
            "machine": self._machine(q.machine),
            "system": [system.parts(), system.notes] if system else [point.policy, point.settings],
            "files": [self._file(file) for spec in (point.policy, *point.settings) if (file := own_file(spec))],
            "question": asdict(q) | {"model": None, "machine": None, "engine": None} | self._workload(q),
            "anchors": point.anchors,
        }
        shared = system and not isinstance(system.predictor, NoPrediction) and not is_own(system.predictor)
        belief = self._belief(facts, system, q) if system and shared else ""
        return Job(_digest(facts)[:32], point, belief, refused)

    def _workload(self, q: Question) -> dict[str, Any]:
        return {"workload": self._file(q.workload) if q.workload else None}

    def _belief(self, facts: dict[str, Any], system: System, q: Question) -> str:
        own = {"trace": facts["trace"], "predictor": plain(system.predictor), "seed": q.seed}
        if system.transforms:
            own |= {"model": facts["model"], "transforms": plain(system.transforms)}
        if q.workload:
            own |= {name: facts["question"][name] for name in ROWS}
        return _digest(own)


def _system(policy: str, settings: tuple[str, ...]) -> tuple[System | None, str]:
    try:
        return compose(policy, settings), ""
    except MoesimError as error:
        return None, str(error)


def _machine_digest(given: str | Machine) -> str:
    machine = given if isinstance(given, Machine) else load_machine(given)
    folder = profile_path(machine.profile) if machine.profile else None
    files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder else []
    return _digest([machine.to_dict(), *(hashlib.sha256(f.read_bytes()).hexdigest() for f in files)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
