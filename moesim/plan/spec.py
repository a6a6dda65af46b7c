"""What a sweep asks: a grid of axes, a list of runs, or both, as YAML or `key=a,b,c`, turned into points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from moesim.errors import MoesimError, SweepError, nearest
from moesim.machine import THIS, Machine, load_machine
from moesim.question import Question
from moesim.systems import System, split_specs
from moesim.units import parse_size

MAX_BYTES = 1 << 20
MAX_POINTS = 100_000
PARTS = ("base", "grid", "runs", "anchors")
ALIASES = {
    "system": "policy", "memory": "expert_memory", "batch": "max_concurrency", "precision": "expert_bits",
    "slo": "slo_ms",
}  # fmt: skip
NO_AXES = ("goodput", "disaggregate")
ASKED = {f.name: str(f.type) for f in fields(Question) if f.name not in NO_AXES}  # what of a question may be an axis
CHANGED = [f.name for f in fields(System) if f.name not in ("name", "source", "quality", "notes")]


@dataclass(frozen=True)
class Point:
    """One run of a sweep: the arguments of `question.run`, as they were given."""

    trace: Path
    policy: str
    settings: tuple[str, ...]
    question: Question
    anchors: bool = False


def read_spec(path: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. Raises SweepError where it is none or too large."""
    import yaml

    with path.open("rb") as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise SweepError(f"{path}: larger than {MAX_BYTES} bytes; say a grid instead of listing its runs")
    try:
        spec = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SweepError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(spec, dict):
        raise SweepError(f"{path}: must be a mapping with {', '.join(PARTS[:-1])}; docs/sweep.md shows one")
    return spec


def with_axes(spec: Mapping[str, Any], axes: Iterable[str]) -> dict[str, Any]:
    """`spec` with axes of its grid given or replaced as `key=a,b,c`; commas inside brackets separate nothing."""
    given: dict[str, list[str]] = {}
    for axis in axes:
        key, equals, values = axis.partition("=")
        if not equals or not values:
            raise SweepError(f"--set {axis}: write key=a,b,c, such as slots_per_layer=2,4,8")
        if canonical(key) in given:
            raise SweepError(f"--set {axis}: {key} is given twice; write its values behind one key")
        given[canonical(key)] = split_specs(values)
    grid = _mapping(spec.get("grid"), "grid")
    return {**spec, "grid": {k: v for k, v in grid.items() if canonical(k) not in given} | given}


def points_of(spec: Mapping[str, Any], where: str = "sweep") -> list[Point]:
    """Every run of the grid and of the list, each over `base`, in the order written and without repetitions.

    Raises SweepError naming `where` for unknown keys, values of the wrong kind, no run at all or too many.
    """
    try:
        for part in spec:
            if part not in PARTS:
                raise SweepError(f"unknown part '{part}'{nearest(str(part), PARTS)}")
        anchors = spec.get("anchors", False)
        if not isinstance(anchors, bool):
            raise SweepError(f"anchors: {anchors!r} must be true or false")
        base = _run(spec.get("base"), "base")
        points = [_point(base | run, anchors) for run in _runs(spec)]
    except MoesimError as error:
        raise SweepError(f"{where}: {error}") from error
    return list(dict.fromkeys(points))


def canonical(key: Any) -> str:
    """The one name of an axis: a question's field, `trace`, `policy`, or a part of the composition."""
    name = str(key).strip().removeprefix("--")
    name = name if "." in name else name.replace("-", "_")
    name = ALIASES.get(name, name)
    if name in ("trace", "policy", *ASKED) or name.partition(".")[0] in CHANGED:
        return name
    raise SweepError(f"unknown key '{key}'{nearest(str(key), ['trace', 'policy', *ASKED, *ALIASES, *CHANGED])}")


def _runs(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    listed = spec.get("runs") or []
    if not isinstance(listed, list):
        raise SweepError("runs: must be a list of mappings such as '- {policy: LRU, slots_per_layer: 4}'")
    runs = [_run(run, f"runs, item {n}") for n, run in enumerate(listed, start=1)]
    grid = {}
    for key, values in _mapping(spec.get("grid"), "grid").items():
        if values == []:
            raise SweepError(f"grid: {key} has no values; give at least one, or leave it out")
        if canonical(key) in grid:
            raise SweepError(f"grid: {key} is given twice; keep one")
        grid[canonical(key)] = [
            _scalar(value, f"grid: {key}") for value in (values if isinstance(values, list) else [values])
        ]
    count = len(runs) + (math.prod(map(len, grid.values())) if grid or not runs else 0)
    if count > MAX_POINTS:
        raise SweepError(f"{count} points, at most {MAX_POINTS} make one sweep; shorten an axis")
    if grid or not runs:
        runs += [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return runs


def _mapping(value: Any, where: str) -> dict[Any, Any]:
    if value is not None and not isinstance(value, dict):
        raise SweepError(f"{where}: must be a mapping such as 'policy: LRU'")
    return value or {}


def _run(value: Any, where: str) -> dict[str, Any]:
    run: dict[str, Any] = {}
    for key, item in _mapping(value, where).items():
        if canonical(key) in run:
            raise SweepError(f"{where}: {key} is given twice; keep one")
        run[canonical(key)] = _scalar(item, f"{where}: {key}")
    return run


def _scalar(value: Any, where: str) -> Any:
    if value is not None and not isinstance(value, (str, int, float)):
        hint = "; lists belong under 'grid'" if isinstance(value, list) else ""
        raise SweepError(f"{where}: {str(value)[:60]!r} must be one plain value{hint}")
    return value


def _point(run: Mapping[str, Any], anchors: bool) -> Point:
    if not run.get("trace"):
        raise SweepError("no trace; write 'trace: FILE.parquet' under base or grid, or name it on the command line")
    asked = {name: _value(name, value) for name, value in run.items() if name in ASKED}
    settings = [f"{n}={_text(v)}" for n, v in run.items() if n not in ASKED and n not in ("trace", "policy")]
    return Point(
        trace=Path(str(run["trace"])),
        policy=str(run.get("policy") or "LRU"),
        settings=tuple(sorted(settings)),  # they are applied together, so their order means nothing
        question=Question(**asked),
        anchors=anchors,
    )


@cache
def _here() -> Machine:
    """The machine that asks, wherever the points run; looked at once."""
    return load_machine(THIS)


def _text(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _flag(text: str) -> bool:
    """`true` or `false`; ValueError otherwise."""
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _value(name: str, value: Any) -> Any:
    """`value` as the kind a question's field is declared to hold."""
    kind, *others = ASKED[name].split(" | ")  # of several kinds the first is the one that can be written
    optional = "None" in others
    if value is None or str(value).lower() == "none":
        if optional:
            return None
        raise SweepError(f"{name}: cannot be none; leave it out for the default")
    if name == "expert_memory":
        return parse_size(str(value), name)
    if name == "machine" and value == THIS:
        return _here()
    readers: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "Path": Path, "bool": _flag}
    text = str(value)
    try:
        if isinstance(value, bool) != (kind == "bool") and not isinstance(value, str):
            raise ValueError
        return readers[kind](text)
    except ValueError:
        what = {"int": "a whole number", "float": "a number", "bool": "true or false"}[kind]
        raise SweepError(f"{name}: '{text}' must be {what}") from None
