"""Commands that run beside the dashboard: started once, looked at, stopped; results are kept by what was asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.machine import THIS

KEPT = 50  # results; older ones go
ANSWERED = (0, 3, 4)  # exit codes that come with a result: fine, infeasible, over a tolerance


@dataclass
class Job:
    """One command. folder: where its result lies when it is done: `answer.json`, and what `-o` wrote."""

    words: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    since: float = field(default_factory=time.monotonic)

    @property
    def answer(self) -> dict[str, Any] | None:
        """Its JSON, once there is one."""
        path = self.folder / "answer.json"
        return json.loads(path.read_text()) if path.is_file() else None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.since

    @property
    def error(self) -> str:
        """Why there is no answer; "" while there may be one."""
        if self.running or self.answer is not None:
            return ""
        path = self.folder / "error.txt"
        text = path.read_text(errors="replace").strip() if path.is_file() else ""
        return text.splitlines()[-1].removeprefix("error: ") if text else "stopped"

    def cancel(self) -> None:
        if self.process is not None and self.running:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait()


def start(words: list[str], folder: Path, saved: bool = False) -> Job:
    """Run `moesim WORDS --json`, or find that it ran before. saved: with `-o`, so that records are kept too."""
    key = hashlib.sha256(json.dumps([__version__, words, saved, stamps(words)]).encode()).hexdigest()[:16]
    job = Job(words, folder / key)
    if job.answer is not None:
        return job
    _make_room(folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    more = ["-o", str(job.folder / "run")] if saved else []
    # The answer takes its name only when the command has ended well.
    code = (
        "import os, subprocess, sys; folder, *words = sys.argv[1:]; part = os.path.join(folder, 'part')\n"
        "with open(part, 'wb') as out, open(os.path.join(folder, 'error.txt'), 'wb') as err:\n"
        "    code = subprocess.call([sys.executable, '-c', 'from moesim.cli import main; main()', *words], "
        "stdout=out, stderr=err)\n"
        f"if code in {ANSWERED}: os.replace(part, os.path.join(folder, 'answer.json'))\n"
    )
    arguments = [sys.executable, "-c", code, str(job.folder), *words, *more, "--json"]
    job.process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
    return job


def stamps(words: list[str]) -> list[tuple[str, int, int]]:
    """Files that are named, and those of this machine's profiles where it is: an answer about older ones is none."""
    paths = [word for word in words if Path(word).is_file()]
    if any(THIS in word.split(",") for word in words):
        paths += sorted(str(path) for pattern in ("meta.yaml", "*/meta.yaml") for path in Path().glob(pattern))
    found = [(path, Path(path).stat()) for path in paths]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _make_room(folder: Path) -> None:
    if folder.is_dir():
        by_age = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
        for old in by_age[: max(0, len(by_age) - KEPT)]:
            shutil.rmtree(old, ignore_errors=True)
