"""Typed look-ups in a config.json: every error names the file, the key and the value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from moesim.errors import ModelError

MAX_VALUE = 1 << 40


class Keys:
    """A parsed JSON object; keys that are absent or null count as not given."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def get(self, *names: str) -> Any:
        """The value of the first name given, or None."""
        return next((self.values[n] for n in names if self.values.get(n) is not None), None)

    def has(self, *names: str) -> bool:
        return self.get(*names) is not None

    def number(self, *names: str, default: int | None = None) -> int:
        """The first name given, a whole number of 0 or more; without a default, one must be given.

        A list stands for per-layer values and is read when they are all the same.
        """
        name = next((n for n in names if self.values.get(n) is not None), None)
        if name is None:
            if default is None:
                raise ModelError(f"{self.where}: needs {' or '.join(names)}")
            return default
        value = self.values[name]
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_VALUE:
            raise ModelError(f"{self.where}: {name} is {_short(value)}, but must be one whole number of 0 or more")
        return value

    def positive(self, *names: str, default: int | None = None) -> int:
        """`number`, but 0 is refused too."""
        value = self.number(*names, default=default)
        if value < 1:
            raise ModelError(f"{self.where}: {' or '.join(names)} is {value}, but must be at least 1")
        return value

    def text(self, *names: str) -> str:
        """The first name given as text; "" when none is."""
        value = self.get(*names)
        return value if isinstance(value, str) else ""

    def strings(self, *names: str) -> list[str]:
        """A list of texts; empty when not given."""
        value = self.get(*names)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ModelError(f"{self.where}: {names[0]} must be a list of names")
        return value

    def child(self, *names: str) -> Keys | None:
        """The first name given, when it is an object."""
        value = self.get(*names)
        return Keys(value, self.where) if isinstance(value, dict) else None

    def per_layer(self, name: str, layers: int) -> list[Any]:
        """A list with one entry per layer; entries for multi-token-prediction layers may follow and are cut."""
        value = self.values[name]
        if not isinstance(value, list) or len(value) < layers:
            raise ModelError(f"{self.where}: {name} must list all {layers} layers")
        return value[:layers]

    def layer_numbers(self, name: str, layers: int, first: int = 0) -> tuple[int, ...]:
        """A list of layer numbers counted from `first`, as ascending numbers from 0."""
        value = self.values[name]
        if not isinstance(value, list) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            raise ModelError(f"{self.where}: {name} must be a list of layer numbers")
        return tuple(sorted({v - first for v in value if v - first < layers}))


def fill_from_children(values: dict[str, Any], children: Iterable[str]) -> dict[str, Any]:
    """`values` with the keys of nested objects added where it does not have them."""
    merged = dict(values)
    for child in children:
        inner = values.get(child)
        if isinstance(inner, dict):
            merged.update({k: v for k, v in inner.items() if merged.get(k) is None})
    return merged


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
