"""A user's own policy, `my_policy.py:MyPolicy`: its file is executed, because they asked for that by naming it."""

from __future__ import annotations

import hashlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from moesim.errors import MoesimError, PolicyError, nearest
from moesim.policies.own import METHODS
from moesim.systems.settings import check_heard
from moesim.systems.system import System

_SPEC = re.compile(r"(?P<path>.+\.py)(:(?P<name>\w*)\s*(\((?P<rest>.*))?)?$", re.DOTALL)


def is_file_spec(spec: str) -> bool:
    return _SPEC.match(spec.strip()) is not None


def own_file(spec: str) -> Path | None:
    """The file named by `FILE.py:NAME`, or by a setting `part=FILE.py:NAME`; None where none is."""
    match = _SPEC.match(spec.partition("=")[2].strip()) or _SPEC.match(spec.strip())
    return Path(match["path"]) if match else None


def load_own(spec: str, load: Callable[[str], System], arguments: Callable[[str, str], dict[str, Any]]) -> System:
    """The system that `FILE.py:NAME` or `FILE.py:NAME(argument=value)` stands for.

    NAME is a System, an object with the methods of docs/add-a-policy.md, or a class or function that returns one or
    the other. Raises PolicyError where the file, the name or what it stands for makes no sense.
    """
    match = _SPEC.match(spec.strip())
    assert match
    path, name = Path(match["path"]), match["name"] or ""
    module, digest = _execute(path)
    known = _offered(module)
    if name not in vars(module) or not name:
        what = f"has no '{name}'" if name else "is a file: name the class in it"
        raise PolicyError(f"{path} {what}{nearest(name, known) if known else '; it defines nothing to use'}")
    thing = vars(module)[name]
    if callable(thing) and not isinstance(thing, System) and not _methods(thing, instance=True):
        thing = _called(path, name, thing, arguments(spec, match["rest"]) if match["rest"] is not None else {})
    system = thing if isinstance(thing, System) else _composed(path, name, thing, load)
    note = f"policy from {path.name}:{name} (sha256 {digest[:12]})"
    return replace(system, source=system.source or str(path), notes=(*system.notes, note))


def _execute(path: Path) -> tuple[ModuleType, str]:
    """Run the file as a module of its own; files beside it can be imported, as for a script."""
    if not path.is_file():
        raise PolicyError(f"{path}: no such file; write the policy as FILE.py:CLASS")
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    module = ModuleType(f"moesim_own_{path.stem}_{digest[:12]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickling look it up there
    sys.path.insert(0, str(path.resolve().parent))
    try:
        exec(compile(source, str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise PolicyError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return module, digest


def _place(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"{path}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _offered(module: ModuleType) -> list[str]:
    """Names in the file that could be a policy: what it defines itself, and systems."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (isinstance(value, System) or (callable(value) and getattr(value, "__module__", "") == module.__name__))
    ]


def _called(path: Path, name: str, make: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return make(**arguments)
    except MoesimError:
        raise
    except Exception as error:
        raise PolicyError(f"{_place(path, error)}: {name}: {type(error).__name__}: {error}") from error


def _methods(thing: Any, instance: bool = False) -> list[str]:
    """The methods that decide something. instance: none for a class, which must be made first."""
    if instance and isinstance(thing, type):
        return []
    return [method for method in METHODS if callable(getattr(thing, method, None))]


def _composed(path: Path, name: str, thing: Any, load: Callable[[str], System]) -> System:
    """`thing` beside the other choices of its `base`, the name of a system or a System; LRU where it names none."""
    methods = _methods(thing)
    if not methods:
        raise PolicyError(
            f"{path}:{name} gives a {type(thing).__name__} without any of the methods {', '.join(METHODS)}; return a "
            "System or an object that has at least one (docs/add-a-policy.md)"
        )
    base = getattr(thing, "base", "LRU")
    base = load(base) if isinstance(base, str) else base
    if not isinstance(base, System):
        raise PolicyError(f"{path}:{name}: base {base!r} must be a System or the name of one, such as 'LRU'")
    changes: dict[str, Any] = {}
    for method in methods:
        part = METHODS[method][0]
        choice = getattr(base, part)
        if part == "transforms":
            changes[part] = (*choice, thing)
        elif part == "misses":
            changes[part] = replace(choice, own=thing, rule="fetch", low_bits=None)
        else:
            changes[part] = replace(choice, own=thing) if hasattr(choice, "own") else thing
    system = replace(base, name=getattr(thing, "name", name), source="", notes=(), quality=None, **changes)
    check_heard(replace(system, name=base.name), changes)
    return system
