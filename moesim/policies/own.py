"""Choices made by a plain Python object of the user's: which method answers what, and whose line a mistake is on."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from moesim.errors import MoesimError, PolicyError

# method: (the part of a system it decides, what it must return)
METHODS = {
    "score": ("eviction", "a number, the larger the more the expert is worth keeping"),
    "victim": ("eviction", "one of the experts it was given, the one that leaves"),
    "on_miss": ("misses", "'fetch', 'host' or 'skip'"),
    "predict": ("predictor", "Beliefs, several in a tuple, or expert ids as an integer array [tokens, layers, any]"),
    "prefetch": ("prefetch", "the experts of that layer to copy, in order"),
    "split": ("capacity", "bytes for each layer, together at most `total`"),
    "admit": ("scheduling", "the place of a waiting request in the list it was given, or None"),
    "start": ("placement", "(layer, expert) pairs, in the order they are to be placed"),
    "apply": ("transforms", "Transformed: the model and trace to serve, and the shares of routed weight altered"),
}


def is_own(thing: Any) -> bool:
    """Whether `thing` is the user's and not moesim's."""
    return thing is not None and type(thing).__module__.partition(".")[0] != "moesim"


def ask(thing: Any, method: str, *arguments: Any) -> Any:
    """What `thing` answers. An exception in a user's code becomes a PolicyError that names their line."""
    if not is_own(thing):
        return getattr(thing, method)(*arguments)
    try:
        return getattr(thing, method)(*arguments)
    except MoesimError:
        raise
    except Exception as error:
        raise PolicyError(
            f"{_line(error)}{_name(thing, method)} raised {type(error).__name__}: {error}; it must return "
            f"{METHODS[method][1]}"
        ) from error


def refused(thing: Any, method: str, answer: Any, about: str = "") -> PolicyError:
    """The error for an answer that makes no sense."""
    shown = repr(answer) if len(repr(answer)) <= 80 else repr(answer)[:80] + "…"
    return PolicyError(f"{_name(thing, method)} returned {shown}{about}; it must return {METHODS[method][1]}")


def _name(thing: Any, method: str) -> str:
    return f"{type(thing).__name__}.{method}"


def _line(error: Exception) -> str:
    """`my_policy.py, line 12: `, the innermost line in the file that was called; nothing where no call began."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    lines = [frame.lineno for frame in frames if frame.filename == frames[0].filename]
    return f"{Path(frames[0].filename).name}, line {lines[-1]}: " if lines else ""
