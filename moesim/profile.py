"""Profile: what was measured on one machine, under which conditions, and the curves fitted to it.

A profile is a directory: `meta.yaml` (conditions), `fit.json` (curves) and, where they may be passed on, the raw rows
in `kernels.parquet` and `links.parquet`. Numbers without their conditions are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moesim.costs.families import FAMILIES, family
from moesim.costs.fit import Curve
from moesim.errors import CalibrationError, nearest
from moesim.files import atomic, write_text
from moesim.machine import Machine, load_machine

SCHEMA_VERSION = 1
MAX_ROWS, MAX_META_BYTES, MAX_FIT_BYTES = 2_000_000, 1 << 16, 1 << 24
SHIPPED = Path(__file__).parent / "calibration"
TABLES = {"kernels": False, "links": True}  # table: holds links

# What must be said beside any number; a key may be null (no GPU, no drive), but not missing.
CONDITIONS = {
    "measured": (
        "gpu", "driver", "cuda", "torch", "clocks", "power_w", "pcie", "cpu", "numa", "memory", "nvme", "host",
        "cost_s",
    ),
    "imported": ("gpu", "source", "licence"),
}  # fmt: skip
ALWAYS = ("schema_version", "name", "machine", "provenance", "date", "moesim")

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Profile:
    """samples: rows of `family`, its columns, `seconds`, `mad_s`, `n`, `samples`; empty where only curves are kept."""

    name: str
    meta: Mapping[str, Any]
    samples: Sequence[Row] = ()
    curves: Sequence[Curve] = ()

    @property
    def label(self) -> str:
        """`measured profile my-box`."""
        return f"{self.meta['provenance']} profile {self.name}"

    def of_family(self, name: str) -> list[Curve]:
        """Curves of one family, those with most points first."""
        return sorted((c for c in self.curves if c.family == name), key=lambda c: -c.points)


def shipped() -> list[str]:
    """Names of the profiles that come with moesim."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/meta.yaml"))


def profile_path(spec: str | Path) -> Path | None:
    """The directory meant by a path or the name of a shipped profile; None where it is neither."""
    path = Path(spec)
    if (path / "meta.yaml").is_file():
        return path
    return SHIPPED / str(spec) if str(spec) in shipped() else None


def read_profile(spec: str | Path) -> Profile:
    """The profile in a directory, or a shipped one by name. Raises CalibrationError by file, rule and remedy."""
    path = profile_path(spec)
    if path is None:
        if Path(spec).is_dir():
            raise CalibrationError(f"{spec}: holds no meta.yaml; results without their conditions are refused")
        raise CalibrationError(f"profile '{spec}': neither a directory nor shipped{nearest(str(spec), shipped())}")
    meta = read_meta(path / "meta.yaml")
    samples = [row for table in TABLES for row in _read_rows(path / f"{table}.parquet")]
    curves = list(_read_fit(path / "fit.json"))
    if not samples and not curves:
        raise CalibrationError(f"{path}: holds neither samples nor curves; measure or import it again")
    return Profile(str(meta["name"]), meta, samples, curves)


def read_profile_meta(spec: str | Path) -> dict[str, Any]:
    """Only the conditions of a profile."""
    path = profile_path(spec)
    if path is None:
        raise CalibrationError(f"profile '{spec}': neither a directory nor shipped{nearest(str(spec), shipped())}")
    return read_meta(path / "meta.yaml")


def machine_of(directory: Path) -> Machine:
    """The catalogue machine a profile belongs to, with its costs from there. Raises CalibrationError without one."""
    name = read_meta(directory / "meta.yaml")["machine"]
    if not name:
        raise CalibrationError(
            f"{directory}: belongs to no machine of the catalogue; write the nearest as 'machine: NAME' into meta.yaml"
        )
    return replace(load_machine(str(name)), profile=str(directory))


def write_profile(profile: Profile, directory: Path | str) -> None:
    """Write `profile`, each file whole or not at all. Raises CalibrationError where its conditions are not stated."""
    import yaml

    directory = Path(directory)
    check_meta(profile.meta, profile.name)
    for table, links in TABLES.items():
        rows = [row for row in profile.samples if family(row["family"]).link == links]
        _write_rows(rows, directory / f"{table}.parquet")
    write_text(directory / "fit.json", _fit_text(profile.curves))
    text = yaml.safe_dump(dict(profile.meta), sort_keys=False, allow_unicode=True)
    write_text(directory / "meta.yaml", text)  # last: a directory without it is no profile


def check_meta(meta: Mapping[str, Any], where: str) -> None:
    """Raise CalibrationError unless every condition of a result is stated."""
    provenance = meta.get("provenance")
    if provenance not in CONDITIONS:
        raise CalibrationError(f"{where}: provenance {provenance!r} must be {' or '.join(CONDITIONS)}")
    missing = [key for key in (*ALWAYS, *CONDITIONS[str(provenance)]) if key not in meta]
    if missing:
        raise CalibrationError(f"{where}: without {', '.join(missing)}; results without their conditions are refused")
    if meta["schema_version"] != SCHEMA_VERSION:
        raise CalibrationError(
            f"{where}: schema_version {meta['schema_version']!r}, but this moesim reads {SCHEMA_VERSION}"
        )
    empty = [key for key in ("name", "date", "moesim") if not meta[key]]
    if empty:
        raise CalibrationError(f"{where}: {', '.join(empty)} is empty; results without their conditions are refused")


def read_meta(path: Path) -> dict[str, Any]:
    """Conditions of a profile, checked."""
    import yaml

    text = _read_text(path, MAX_META_BYTES)
    try:
        meta = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise CalibrationError(f"{path}: not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(meta, dict):
        raise CalibrationError(f"{path}: must be a mapping such as 'gpu: NVIDIA H200'")
    check_meta(meta, str(path))
    return meta


def _read_text(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from error
    if len(text) > limit:
        raise CalibrationError(f"{path}: larger than {limit} bytes, so it is no profile of moesim")
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text") from error


def _read_fit(path: Path) -> tuple[Curve, ...]:
    """The curves of a file; read once as long as it stays what it is, since a band asks for them a dozen times."""
    if not path.exists():
        return ()
    found = path.stat()
    return _curves(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _curves(path: Path, changed_ns: int, size: int) -> tuple[Curve, ...]:
    try:
        data = json.loads(_read_text(path, MAX_FIT_BYTES))
        return tuple(Curve.from_dict(entry) for entry in data["curves"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CalibrationError(f"{path}: not a fit of moesim ({error}); fit or import it again") from error


def _fit_text(curves: Sequence[Curve]) -> str:
    """One line per curve: small, and a change shows in a diff."""
    lines = ",\n".join(json.dumps(curve.to_dict(), separators=(",", ":"), allow_nan=False) for curve in curves)
    return f'{{"schema_version":{SCHEMA_VERSION},"curves":[\n{lines}\n]}}\n'


def _write_rows(rows: Sequence[Row], path: Path) -> None:
    """Flat rows as Parquet: the union of their columns, nulls where a family lacks one."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns})
    with atomic(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if file.metadata.num_rows > MAX_ROWS:
            raise CalibrationError(f"{path}: {file.metadata.num_rows} rows, more than {MAX_ROWS}")
        rows = file.read().to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    kept = [{name: value for name, value in row.items() if value is not None} for row in rows]
    for number, row in enumerate(kept):
        _check_row(row, f"{path}, row {number}")
    return kept


def _check_row(row: Row, where: str) -> None:
    seconds = row.get("seconds")
    if row.get("family") not in FAMILIES:
        raise CalibrationError(f"{where}: family {row.get('family')!r} is unknown; known: {', '.join(FAMILIES)}")
    if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds <= 0:
        raise CalibrationError(f"{where}: seconds {seconds!r} is not a time above 0")
