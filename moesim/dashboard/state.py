"""What is asked on the dashboard, as URL parameters and as words of the command line."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from moesim.files import write_text

DRAWN = ""  # no trace: routing is drawn


@dataclass(frozen=True)
class Asked:
    """Every control of the dashboard. trace: a name that `Files` knows; None and "" mean: work it out."""

    trace: str = DRAWN
    model: str = ""
    machine: str = "rtx-4090"
    policy: str = "LRU"
    set: str = ""  # changes to the system, as --set has them, separated by semicolons
    slots: int | None = None
    users: int | None = None
    rate: float | None = None
    prompts: int | None = None
    input: int = 512
    output: int = 64
    ttft: float | None = None
    tpot: float | None = None
    prices: str = ""  # $ per hour by machine: `rtx-4090=0.5; l4=0.7`
    seed: int = 0


EXAMPLES = {
    "Real routing, half of the experts cached": Asked(
        trace="tiny-moe-8x16.parquet", policy="eMoE", slots=8, prompts=40
    ),
    "gpt-oss-20b on an RTX 4090": Asked(model="gpt-oss-20b", prompts=4, output=32, input=128),
    "Mixtral-8x7B on four H100": Asked(
        model="mixtral-8x7b", machine="4xh100-sxm", policy="EPLB", users=16, prompts=32, ttft=2000.0, tpot=50.0
    ),
}
_LEAST = {
    "slots": 1,
    "users": 1,
    "rate": 1e-6,
    "prompts": 1,
    "input": 1,
    "output": 2,
    "ttft": 1e-3,
    "tpot": 1e-3,
    "seed": 0,
}
_MOST = 1 << 20


def from_query(query: Mapping[str, str]) -> tuple[Asked, list[str]]:
    """What a URL asks, and a note for every value that makes no sense and was left at its default."""
    values: dict[str, Any] = {}
    notes = []
    for f in fields(Asked):
        if f.name not in query:
            continue
        text = query[f.name]
        kind = str(f.type).partition(" |")[0]
        try:
            if kind == "str":
                values[f.name] = text
                if f.name == "prices":
                    prices_of(text)
                continue
            number = int(text) if kind == "int" else float(text)
            if not _LEAST[f.name] <= number <= _MOST:
                raise ValueError
            values[f.name] = number
        except ValueError:
            values.pop(f.name, None)
            what = {"int": "whole number", "float": "number", "str": "price"}[kind]
            notes.append(f"{f.name}={text} in the address is no {what} it can be")
    return replace(Asked(), **values), notes


def to_query(asked: Asked) -> dict[str, str]:
    """URL parameters; defaults are left out."""
    default = Asked()
    changed = {f.name: getattr(asked, f.name) for f in fields(asked)}
    return {
        name: f"{value}" for name, value in changed.items() if value != getattr(default, name) and value is not None
    }


def prices_of(text: str) -> dict[str, float]:
    """$ per hour by machine. Raises ValueError."""
    found = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, _, price = part.partition("=")
        found[name.strip()] = float(price)
        if not 0 < found[name.strip()] <= _MOST:
            raise ValueError(part)
    return found


def settings_of(asked: Asked) -> list[str]:
    return [part.strip() for part in asked.set.split(";") if part.strip()]


def words(asked: Asked, files: Files, verb: str = "replay") -> list[str]:
    """The command `moesim VERB ...` that answers; the very one the dashboard runs."""
    out = [verb]
    if asked.trace:
        out.append(str(files.trace(asked.trace)))
    out += ["--policy", asked.policy, "--machine", files.known(asked.machine)]
    model = asked.model or (None if asked.trace else "gpt-oss-20b")
    options: dict[str, Any] = {"--model": model and files.known(model), "--slots-per-layer": asked.slots}
    if verb in ("replay", "compare", "whatif"):
        options |= {"--max-concurrency": asked.users, "--request-rate": asked.rate, "--num-prompts": asked.prompts}
    if verb == "replay" and not asked.trace:
        options |= {"--random-input-len": asked.input, "--random-output-len": asked.output}
    if verb in ("replay", "whatif", "capacity"):
        out += [word for setting in settings_of(asked) for word in ("--set", setting)]
    if verb in ("replay", "whatif"):
        options["--prices"] = files.prices(asked.prices)
    options["--seed"] = asked.seed or None
    for name, value in options.items():
        if value is not None:
            out += [name, f"{value}"]
    if verb in ("replay", "capacity"):
        out += [w for name in ("ttft", "tpot") if (ms := getattr(asked, name)) for w in ("--goodput", f"{name}:{ms:g}")]
    return out


MAX_BYTES = {".parquet": 200 << 20, ".json": 1 << 20, ".yaml": 1 << 20, ".zip": 64 << 20}
MAX_PROFILE = 256 << 20  # bytes of a profile's files together
PROFILE = ("meta.yaml", "fit.json", "kernels.parquet", "links.parquet")


class Files:
    """Traces, models and machines that may be named: those of a folder, and those uploaded into another.

    A name never leads out of the two folders, so an address cannot ask for other files of the server.
    """

    def __init__(self, traces: Path | None, uploads: Path) -> None:
        self._traces, self._uploads = traces, uploads

    def traces(self) -> list[str]:
        folders = [f for f in (self._traces, self._uploads) if f is not None]
        return sorted(path.name for folder in folders for path in folder.glob("*.parquet"))

    def uploaded(self, suffix: str) -> list[str]:
        return sorted(path.name for path in self._uploads.glob(f"*{suffix}"))

    def profiles(self) -> list[str]:
        """Uploaded ones, each a folder."""
        return sorted(path.parent.name for path in self._uploads.glob("*/meta.yaml"))

    def trace(self, name: str) -> Path:
        """Where the trace called `name` lies. Raises FileNotFoundError."""
        if name in self.traces():
            for folder in (self._uploads, self._traces):
                if folder is not None and (folder / name).is_file():
                    return _short(folder / name)
        raise FileNotFoundError(f"no trace is called '{name}'; choose one, or upload it again")

    def prices(self, text: str) -> Path | None:
        """A file that `--prices` takes, of what `prices_of` reads; None where that is nothing."""
        if not prices_of(text):
            return None
        path = self._uploads / f"prices-{hashlib.sha256(text.encode()).hexdigest()[:12]}.csv"
        if not path.is_file():
            self._uploads.mkdir(parents=True, exist_ok=True)
            table = io.StringIO()
            rows = [(name, price, date.today(), "entered on the dashboard") for name, price in prices_of(text).items()]
            csv.writer(table).writerows([("machine", "usd_per_hour", "date", "source"), *rows])
            write_text(path, table.getvalue())
        return path

    def known(self, name: str) -> str:
        """A model or machine: the path of an uploaded file, or a name of the catalogue as it is."""
        if name in (*self.uploaded(".json"), *self.uploaded(".yaml")) or name in self.profiles():
            return str(self._uploads / name)
        if "/" in name and Path(name).exists():
            raise FileNotFoundError(f"'{name}' is a file of this server; upload yours")
        return name

    def add(self, name: str, data: bytes) -> str:
        """Keep an upload under its own name. Raises ValueError where it is too large or of no known kind."""
        path = Path(Path(name).name)
        if path.suffix not in MAX_BYTES:
            raise ValueError(
                f"{path.name}: upload a trace (.parquet), a config.json, a machine (.yaml) or a profile (.zip)"
            )
        if len(data) > MAX_BYTES[path.suffix]:
            raise ValueError(f"{path.name}: {len(data)} bytes; a {path.suffix} file may have {MAX_BYTES[path.suffix]}")
        self._uploads.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            return _add_profile(self._uploads, path, data)
        _check(self._uploads, path, data)
        return path.name


def _short(path: Path) -> Path:
    """As one would type it: relative where it lies below the working directory."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _add_profile(folder: Path, path: Path, data: bytes) -> str:
    """Unpack the files of a profile, wherever in the archive they lie, if moesim can read them; its name.

    Raises ValueError where the archive holds anything else or too much, MoesimError as the command line would.
    """
    from moesim.machine import load_machine
    from moesim.profile import read_profile

    if not re.fullmatch(r"\w[\w.-]*", path.stem):  # it becomes a folder: ".." must not be one
        raise ValueError(
            f"{path.name}: name the archive with letters, digits, dots and dashes, a letter or digit first"
        )
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
            names = sorted(Path(member.filename).name for member in members)
            if not set(names) <= set(PROFILE) or len(set(names)) < len(names):
                raise ValueError(f"{path.name}: holds {', '.join(names[:5])}; a profile is {', '.join(PROFILE)}")
            if sum(member.file_size for member in members) > MAX_PROFILE:
                raise ValueError(f"{path.name}: more than {MAX_PROFILE} bytes when unpacked")
            with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as trial:
                for member in members:
                    Path(trial, Path(member.filename).name).write_bytes(archive.read(member))
                read_profile(trial)
                load_machine(trial)
                shutil.rmtree(folder / path.stem, ignore_errors=True)
                shutil.copytree(trial, folder / path.stem)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name}: no zip archive ({error})") from None
    return path.stem


def _check(folder: Path, path: Path, data: bytes) -> None:
    """Write the file if moesim can read it. Raises MoesimError as the command line would."""
    from moesim.files import atomic
    from moesim.machine import load_machine
    from moesim.model import load_model
    from moesim.trace.io import read

    reader: Any = {".parquet": read, ".json": lambda p: load_model(str(p)), ".yaml": load_machine}[path.suffix]
    trial = folder / f".new-{path.name}"
    try:
        trial.write_bytes(data)
        reader(trial)
        with atomic(folder / path.name) as temporary:
            temporary.write_bytes(data)
    finally:
        trial.unlink(missing_ok=True)
