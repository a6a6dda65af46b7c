"""Compositions changed from the command line: `--set part.field=value`, `--set part=SYSTEM`, several at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from moesim.errors import PolicyError, nearest
from moesim.prediction import NoPrediction
from moesim.systems.system import System

Take = Callable[[str, str], Any]  # (part, name): that part of the system or choice that is called so
OUTPUTS = ("misses", "transforms", "expert_bits")  # parts that decide what a model answers
FIXED = ("name", "source", "quality", "notes")


def change(system: System, settings: Iterable[str], take: Take) -> System:
    """`system` with all of `settings` changed together, so that their order and what lies between do not matter."""
    wholes: dict[str, Any] = {}
    inner: dict[str, dict[str, str]] = {}
    known = {f.name: str(f.type) for f in fields(system) if f.name not in FIXED}
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not text:
            raise PolicyError(f"--set {setting}: write part.field=value or part=SYSTEM, such as eviction.scope=global")
        part, dot, name = path.partition(".")
        if part not in known:
            raise PolicyError(f"--set {setting}: a system has no '{part}'{nearest(part, known)}")
        if dot:
            inner.setdefault(part, {})[name] = text
        else:
            wholes[part] = _whole(part, known[part], text, setting, take)
            inner.pop(part, None)
    for part, texts in inner.items():
        wholes[part] = _with_fields(system.name, part, wholes.get(part, getattr(system, part)), texts)
    changed = replace(system, **wholes)
    moved = [part for part in wholes if getattr(changed, part) != getattr(system, part)]
    check_heard(changed, moved)
    if any(part in OUTPUTS for part in moved):  # what was published is of another system
        changed = replace(changed, quality=None)
    return changed


def _whole(part: str, kind: str, text: str, setting: str, take: Take) -> Any:
    """A plain value where the part is one and `text` reads as one, else what the system of that name has."""
    if text.lower() == "none" and part in ("transforms", "refresh"):
        return () if part == "transforms" else None
    if kind in ("bool", "float | None"):
        try:
            return read_value(kind, text, setting)
        except PolicyError:
            if text[0].isdigit() or text[0] in "+-.":
                raise
    return take(part, text)


def _with_fields(system: str, part: str, choice: Any, texts: dict[str, str]) -> Any:
    one = f"--set {part}.{next(iter(texts))}"
    if choice is None:
        raise PolicyError(f"{one}: {system} has no {part}; take one from another system: {part}=NAME")
    if not hasattr(choice, "__dataclass_fields__"):
        raise PolicyError(f"{one}: {part} has no fields to set; take it from another system: {part}=NAME")
    kinds = {f.name: str(f.type) for f in fields(choice)}
    values = {}
    for name, text in texts.items():
        setting = f"{part}.{name}={text}"
        if name not in kinds:
            hint = nearest(name, kinds) if kinds else f"; {type(choice).__name__} has none, set {part}=NAME instead"
            raise PolicyError(f"--set {setting}: {part} has no '{name}'{hint}")
        if getattr(choice, "own", None) is not None and name in ("score", "combine", "window", "rule", "start"):
            own = type(choice.own).__name__
            raise PolicyError(f"--set {setting}: {part} is decided by {own}; set {part}=SYSTEM first to replace it")
        values[name] = read_value(kinds[name], text, setting)
    if "score" in values and "combine" not in values:  # weights mean a sum, whatever the score they replace was
        values["combine"] = "sum"
    try:
        return replace(choice, **values)
    except (TypeError, ValueError) as error:
        raise PolicyError(f"{one}: '{' '.join(texts.values())}' is of the wrong kind ({error})") from None


def read_value(kind: str, text: str, setting: str) -> Any:
    """`text` as the kind of value a field is declared to hold; scores are written `lru:0.5,lfu:0.5`."""
    kind, optional, _ = kind.partition(" | None")
    if optional and text.lower() == "none":
        return None
    try:
        return _READERS[kind](text)
    except KeyError:
        raise PolicyError(f"--set {setting}: this cannot be written on the command line; set it in Python") from None
    except ValueError:
        word = "true or false" if kind == "bool" else _EXAMPLES.get(kind, "a number")
        raise PolicyError(f"--set {setting}: '{text}' does not fit; write {word}") from None


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise ValueError
    return text.lower() in ("true", "yes", "1")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _score(text: str) -> tuple[tuple[str, float], ...]:
    pairs = [item.partition(":") for item in text.split(",")]
    return tuple((feature.strip(), _finite(weight) if colon else 1.0) for feature, colon, weight in pairs)


def _several(read: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(read(item.strip()) for item in text.split(",") if item.strip())


def _two(text: str) -> tuple[float, ...]:
    values = _several(_finite)(text)
    if len(values) != 2:
        raise ValueError
    return values


_READERS: dict[str, Callable[[str], Any]] = {
    "bool": _flag,
    "int": int,
    "float": _finite,
    "str": str,
    "tuple[tuple[str, float], ...]": _score,
    "tuple[float, float]": _two,
    "tuple[float, ...]": _several(_finite),
    "tuple[str, ...]": _several(str),
}
_EXAMPLES = {
    "int": "a whole number",
    "tuple[tuple[str, float], ...]": "features and weights, such as lru:0.5,lfu:0.5",
    "tuple[float, float]": "two numbers, such as 0.6,0.9",
    "tuple[float, ...]": "numbers, such as 0.9,0.8",
}


def check_heard(system: System, moved: Iterable[str]) -> None:
    """Refuse to change what is never asked: the answer would be the old one under a new name."""
    cached = ("eviction", "capacity", "misses", "predictor", "prefetch", "transfer", "refresh")
    for part in moved:
        if system.all_resident and part in cached:
            other = f"--policy LRU --set transforms={system.name}" if system.transforms else "--policy LRU"
            raise PolicyError(
                f"{part}: {system.name} keeps every expert on the device, so {part} has no effect; "
                f"start from a system with a cache ({other}), or set all_resident=false and placement=LRU as well"
            )
        if part == "eviction" and not system.cache:
            raise PolicyError(f"eviction: {system.name} has no cache to evict from; start from LRU instead")
        if part == "eviction" and system.placement.pinned and not system.misses.keep:
            raise PolicyError(
                f"eviction: what {system.name} keeps is pinned and never leaves; set placement=LRU and "
                "misses.keep=true as well"
            )
        if part == "prefetch" and isinstance(system.predictor, NoPrediction):
            raise PolicyError(
                f"prefetch: {system.name} predicts nothing, so nothing is prefetched; set a predictor as well, "
                "such as predictor=transitions"
            )
        if part == "capacity" and system.eviction.scope == "global":
            raise PolicyError(
                "capacity: with eviction.scope=global all layers share one cache; set eviction.scope=layer"
            )
