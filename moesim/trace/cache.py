"""Arrays of traces read before, mapped from disk instead of decoded again. Losing this cache costs time only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moesim.trace.trace import Requests, Trace, TraceInfo

FORMAT = 1  # raise when the layout below or the rules of check.py change
SMALLEST_BYTES = 1 << 20  # below this, decoding is as fast
LIMIT_BYTES = 16 << 30  # of all entries together; the least recently used go first
_ARRAYS = ("experts", "request", "phase", "position", "weights", "probabilities")


def folder() -> Path:
    """Where entries lie: MOESIM_CACHE_DIR, else moesim/ in the user's cache directory."""
    if chosen := os.environ.get("MOESIM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesim"


def load(content_hash: str) -> Trace | None:
    """The trace read from a file of this hash before, or None; a damaged entry counts as none."""
    try:
        entry = _entry(content_hash)
        trace = _load(entry, content_hash)
        with contextlib.suppress(OSError):  # a cache shared read-only is as good
            os.utime(entry)
        return trace
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return None


def store(trace: Trace) -> None:
    """Keep `trace` for the next read; a full or read-only disk is no error."""
    arrays = arrays_of(trace)
    size = sum(array.nbytes for array in arrays.values())
    if not SMALLEST_BYTES <= size <= LIMIT_BYTES:
        return
    with contextlib.suppress(OSError, RuntimeError):
        entry = _entry(trace.content_hash)
        entry.parent.mkdir(parents=True, exist_ok=True)
        _make_room(entry.parent, size)
        temporary = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".new-"))
        try:
            _store(trace, arrays, temporary)
            shutil.rmtree(entry, ignore_errors=True)  # whatever was there could not be loaded
            temporary.rename(entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _entry(content_hash: str) -> Path:
    return folder() / "traces" / f"{FORMAT}-{content_hash}"


def arrays_of(trace: Trace) -> dict[str, np.ndarray]:
    """Every array of `trace` by name, those of its requests included."""
    arrays = {name: getattr(trace, name) for name in _ARRAYS}
    arrays |= {"prompt_tokens": trace.requests.prompt_tokens, "arrival_ns": trace.requests.arrival_ns}
    return {name: array for name, array in arrays.items() if array is not None}


def _seal(path: Path) -> list[int]:
    """Size and time of last change: what shows that an array file is not the one that was stored."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _store(trace: Trace, arrays: dict[str, np.ndarray], entry: Path) -> None:
    seals = {}
    for name, array in arrays.items():
        path = entry / f"{name}.npy"
        np.save(path, array, allow_pickle=False)
        seals[name] = _seal(path)
    requests = {"request_id": trace.requests.request_id, "task": trace.requests.task}
    text = json.dumps({"info": asdict(trace.info), "requests": requests, "seals": seals})
    (entry / "trace.json").write_text(f"{_digest(text)}\n{text}", encoding="utf-8")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _load(entry: Path, content_hash: str) -> Trace:
    digest, _, text = (entry / "trace.json").read_text(encoding="utf-8").partition("\n")
    if digest != _digest(text):
        raise ValueError(f"{entry} has changed")
    description: dict[str, Any] = json.loads(text)
    arrays = {}
    for name, seal in description["seals"].items():
        path = entry / f"{name}.npy"
        if _seal(path) != seal:
            raise ValueError(f"{path} has changed")
        arrays[name] = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    info, requests = description["info"], description["requests"]
    return Trace(
        info=TraceInfo(**{**info, "moe_layers": tuple(info["moe_layers"])}),
        requests=Requests(
            request_id=tuple(requests["request_id"]),
            task=tuple(requests["task"]),
            prompt_tokens=arrays["prompt_tokens"],
            arrival_ns=arrays.get("arrival_ns"),
        ),
        **{name: arrays.get(name) for name in _ARRAYS},  # type: ignore[arg-type]
        content_hash=content_hash,
    )


def _make_room(parent: Path, needed: int) -> None:
    entries = sorted((e for e in parent.iterdir() if e.is_dir()), key=lambda e: e.stat().st_mtime)
    sizes = [sum(file.stat().st_size for file in entry.iterdir()) for entry in entries]
    excess = sum(sizes) + needed - LIMIT_BYTES
    for entry, size in zip(entries, sizes, strict=True):
        if excess <= 0:
            return
        shutil.rmtree(entry, ignore_errors=True)
        excess -= size
