"""The raw measurements on disk: a file that is only appended to, one JSON object a line, its conditions first.

A line is written in one call, so whatever ends the program leaves whole lines and at most one torn one, which the
next run cuts off.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError

NAME = "raw.jsonl"
_MAX_BYTES = 1 << 30
# What must be as it was for rows to be comparable; the rest (memory that grows, the date) is only written down.
_SAME = ("schema", "gpu", "driver", "cuda", "torch", "cpu", "cores", "host", "moesim")


class Store:
    """Rows measured so far, in `directory`; one program at a time writes them."""

    def __init__(self, directory: Path, conditions: dict[str, Any]) -> None:
        """Opens what is there. Raises CalibrationError where conditions differ, or the file is not calibrate's."""
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / NAME).exists() and (directory / "meta.yaml").exists():
            raise CalibrationError(
                f"{directory}: holds a profile without its {NAME}, so nothing can be added; choose -o"
            )
        self._path = directory / NAME
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._cut_torn_line()
            lines = read_lines(self._path)
            if lines:
                _same(self._path, lines[0]["conditions"], conditions)
            else:
                self._append({"conditions": conditions})
        except BaseException:
            os.close(self._handle)
            raise
        self.rows: list[dict[str, Any]] = [line["row"] for line in lines if "row" in line]

    def add(self, row: dict[str, Any]) -> None:
        """One measured point: family, features, seconds, mad_s, n and samples."""
        self.rows.append(row)
        self._append({"row": row})

    def close(self, session: dict[str, Any]) -> None:
        """What this run cost and saw: clocks under load, what could not run."""
        try:
            self._append({"session": session})
        finally:
            os.close(self._handle)

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._handle, json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CalibrationError(
                f"{self._path}: another calibrate is writing it; wait for it, or choose -o"
            ) from None

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._handle).st_size
        if size > _MAX_BYTES:
            raise CalibrationError(f"{self._path}: {size} bytes, larger than any calibration; choose another -o")
        text = os.pread(self._handle, size, 0)
        os.ftruncate(self._handle, text.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every line, conditions first. Raises CalibrationError naming a line that is none of ours."""
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CalibrationError(f"{path}: not text; calibrate writes JSON lines, so choose another -o") from None
    for number, line in enumerate(text.splitlines(), 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            value = None
        expected = {"conditions"} if number == 1 else {"row", "session"}
        if not isinstance(value, dict) or not isinstance(next(iter(value.values()), None), dict):
            raise CalibrationError(f"{path}, line {number}: not a line of calibrate's; remove the line, or choose -o")
        if not value.keys() <= expected:
            rule = "measurements without their conditions" if number == 1 else f"unknown entry {', '.join(value)}"
            raise CalibrationError(f"{path}, line {number}: {rule}; remove the file, or choose another -o")
        found.append(value)
    return found


def _same(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Rows of different conditions are not mixed."""
    differing = [key for key in _SAME if before.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        more = f" (and {', '.join(differing[1:])})" if differing[1:] else ""
        raise CalibrationError(
            f"{path}: measured with {key} {before.get(key)}, here it is {now.get(key)}{more}; "
            "choose another -o, or remove the file to start again"
        )
