"""Measured tables of other projects as profiles: curves are fitted, the rows themselves stay where they are.

One module per format with `SOURCE`, `LICENCE` and `read(path)`, which gives an `Import`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import CalibrationError, nearest

if TYPE_CHECKING:
    from moesim.profile import Profile

FORMATS = ("aiconfigurator", "llmservingsim", "vidur", "freetoken")
MAX_BYTES, MAX_FILES, MAX_ROWS = 256 << 20, 2000, 2_000_000


@dataclass
class Import:
    """gpu: the device's name as the tables spell it; engine: what ran the kernels; rows: of families, table by table;
    notes: what was left out, filled while `rows` is read."""

    gpu: str
    engine: str
    rows: Iterator[list[dict[str, Any]]]
    notes: list[str] = field(default_factory=list)


def import_profile(
    form: str,
    path: Path,
    name: str,
    machine: str | None,
    source: str | None = None,
    licence: str | None = None,
    engines: tuple[str, ...] = (),
) -> Profile:
    """The profile of the tables at `path`; its meta lists what was left out. Raises CalibrationError by file and rule.

    machine: the catalogue machine whose specification sheet stands for whatever the tables do not hold; engines: keep
    only their kernels (and all collectives).
    """
    from datetime import UTC, datetime

    from moesim import __version__
    from moesim.costs.fit import fit_rows
    from moesim.profile import SCHEMA_VERSION, Profile

    if form not in FORMATS:
        raise CalibrationError(f"format '{form}': unknown{nearest(form, FORMATS)}")
    if not path.exists():
        raise CalibrationError(f"{path}: does not exist")
    module = importlib.import_module(f"moesim.profile_import.{form}")
    found: Import = module.read(path)
    curves = [curve for rows in found.rows for curve in fit_rows(_of_engines(rows, engines), trees=True)]
    if not curves:
        raise CalibrationError(f"{path}: no table that a curve could be fitted to; is it the {form} format?")
    meta = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "machine": machine,
        "provenance": "imported",
        "gpu": found.gpu,
        "engine": ", ".join(e for e in found.engine.split(", ") if not engines or e.startswith((*engines, "nccl"))),
        "source": source or module.SOURCE,
        "licence": licence or module.LICENCE,
        "date": datetime.now(UTC).date().isoformat(),
        "moesim": __version__,
        "left_out": found.notes,
    }
    return Profile(name, meta, (), curves)


def _of_engines(rows: list[dict[str, Any]], engines: tuple[str, ...]) -> list[dict[str, Any]]:
    if not engines:
        return rows
    return [r for r in rows if r["family"] == "collective" or str(r.get("kernel", "")).startswith(engines)]


def bounded(path: Path) -> Path:
    """`path`, or CalibrationError where the file is too large to be such a table."""
    if path.stat().st_size > MAX_BYTES:
        raise CalibrationError(f"{path}: larger than {MAX_BYTES >> 20} MiB; give a smaller table")
    return path


def files(path: Path, pattern: str) -> list[Path]:
    """`path` itself, or the files below it that match, in order; CalibrationError where there are none or too many."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob(pattern) if p.is_file())
    if not found:
        raise CalibrationError(f"{path}: holds no {pattern}")
    if len(found) > MAX_FILES:
        raise CalibrationError(f"{path}: {len(found)} files, more than {MAX_FILES}; give the folder of one machine")
    return [bounded(p) for p in found]


def read_csv(path: Path, needed: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a CSV file that must have the columns `needed`."""
    import csv

    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [column for column in needed if column not in (reader.fieldnames or ())]
            if missing:
                raise CalibrationError(f"{path}: lacks the column {missing[0]}; it has {reader.fieldnames}")
            rows = [row for row, _ in zip(reader, range(MAX_ROWS + 1), strict=False)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path}: not a CSV file ({error})") from error
    if len(rows) > MAX_ROWS:
        raise CalibrationError(f"{path}: more than {MAX_ROWS} rows")
    return rows


def number(row: dict[str, str], column: str, where: str) -> float:
    """A number of a CSV row, finite and not below 0."""
    import math

    try:
        value = float(row[column])
    except (TypeError, ValueError) as error:
        raise CalibrationError(f"{where}: {column} {row[column]!r} is not a number") from error
    if not math.isfinite(value) or value < 0:
        raise CalibrationError(f"{where}: {column} {value} is not a number of 0 or more")
    return value
