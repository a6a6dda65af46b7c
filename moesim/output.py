"""What the command line prints: results on stdout, progress and remarks on stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesim.files import write_text


def to_json(value: Any) -> str:
    """Stable JSON: keys in the order given, non-finite numbers as null, numpy scalars as numbers."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def emit(result: Any, text: str, as_json: bool, output: Path | None = None) -> None:
    """Print `result` as JSON or its `text`; with `output`, write there instead, whole or not at all."""
    body = to_json(result) if as_json else text.rstrip()
    if output is None:
        sys.stdout.write(body + "\n")
    else:
        write_text(output, body + "\n")


def remark(message: str) -> None:
    """A line for the person watching, never part of the result."""
    sys.stderr.write(message + "\n")


@contextmanager
def told_if_slow(message: str, seconds: float = 2.0) -> Iterator[None]:
    """A remark on what takes so long, if it does."""
    timer = threading.Timer(seconds, remark, [message])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def progress(what: str, total: int, shown: bool = True) -> Iterator[Any]:
    """Yield `advance(n)`: a bar with the time left on stderr for people, nothing where stderr is no terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda n=1: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n=1: bar.advance(task, n)
