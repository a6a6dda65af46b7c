"""Traces from other tools' files. A new format is one module with a `read` function and one line in FORMATS."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import TraceError, nearest
from moesim.trace.check import RoutedModel, check
from moesim.trace.importers import layer_counts, long_csv, numpy_arrays
from moesim.trace.trace import Trace

FORMATS: dict[str, Callable[..., Trace]] = {
    "numpy": numpy_arrays.read,
    "csv": long_csv.read,
    "counts": layer_counts.read,
}


def import_trace(format_name: str, path: Path | str, model: RoutedModel, **options: Any) -> Trace:
    """The trace in a file of another format, checked; options are those of the format's `read`. Raises TraceError."""
    if format_name not in FORMATS:
        raise TraceError(f"unknown trace format '{format_name}'{nearest(format_name, FORMATS)}")
    read = FORMATS[format_name]
    takes = {p.name: p for p in inspect.signature(read).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in takes:
            used = ", ".join(map(_flag, takes))
            raise TraceError(f"format {format_name} does not use {_flag(name)}; it takes {used}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in options:
            raise TraceError(f"format {format_name} needs {_flag(name)}; traces/README.md says what it means")
    trace = read(Path(path), model, **options)
    check(trace, str(path))
    return trace


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
