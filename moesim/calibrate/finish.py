"""From raw measurements to a profile: conditions, samples, fitted curves."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.calibrate.store import NAME, read_lines
from moesim.errors import CalibrationError
from moesim.hardware import machine_named

if TYPE_CHECKING:
    from moesim.costs.fit import Curve


def finish(directory: Path) -> dict[str, Any]:
    """Fit the rows in `directory`, write its profile, and say how well each family is predicted.

    Raises CalibrationError where nothing was measured or the file is not calibrate's.
    """
    from moesim.costs.fit import fit_rows
    from moesim.profile import Profile, write_profile

    path = directory / NAME
    lines = read_lines(path) if path.is_file() else []
    rows = [line["row"] for line in lines if "row" in line]
    if not rows:
        raise CalibrationError(f"{directory}: holds no measurements; run calibrate with a larger --budget")
    if find_spec("yaml") is None:
        raise CalibrationError(
            f"{directory}: {len(rows)} measurements are kept in {NAME}, but a profile needs pyyaml; "
            "install it, or copy the directory to where it is, and run calibrate --fit-only"
        )
    meta = _meta(directory.resolve().name, lines)
    curves = fit_rows(rows)
    write_profile(Profile(meta["name"], meta, rows, curves), directory)
    return {
        "profile": str(directory),
        "points": len(rows),
        "contaminated": meta["contaminated"],
        "cost_s": meta["cost_s"],
        "families": _report(rows, curves),
    }


def _meta(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Conditions of the first run; clocks, power and link from the last that read them; cost of all."""
    from moesim.profile import SCHEMA_VERSION

    conditions = {key: value for key, value in lines[0]["conditions"].items() if key != "schema"}
    meta = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "machine": conditions["gpu"] and machine_named(conditions["gpu"], None),
        "provenance": "measured",
        **conditions,
        **{"clocks": None, "power_w": None, "pcie": None},
    }
    sessions = [line["session"] for line in lines if "session" in line]
    for session in sessions:
        meta |= {key: value for key, value in session.items() if key != "cost_s"}
    contaminated = sum(line["row"].get("contaminated", 0) for line in lines if "row" in line)
    return meta | {"contaminated": contaminated, "cost_s": round(sum(session["cost_s"] for session in sessions), 1)}


def _report(rows: list[dict[str, Any]], curves: list[Curve]) -> dict[str, Any]:
    """Per family: points, and errors on shapes held out of the fit, averaged over its curves by their points."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["family"] for row in rows):
        own = [curve for curve in curves if curve.family == name]
        weight = sum(curve.points for curve in own)
        found[name] = {
            "points": sum(row["family"] == name for row in rows),
            "holdout_median_error": sum(c.points * c.holdout_median_error for c in own) / weight if own else None,
            "p90": sum(c.points * c.p90 for c in own) / weight if own else None,
            "curves": len(own),
        }
    return found
