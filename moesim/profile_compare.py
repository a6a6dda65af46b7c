"""Two profiles side by side, and a profile against the machine this runs on."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim import hardware
from moesim.errors import MoesimError
from moesim.profile import Profile, read_profile_meta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.costs.fit import Curve

MAX_PROFILES = 50
_SAMPLES = 400


def compare(first: Profile, second: Profile) -> list[dict[str, Any]]:
    """Per curve of both: quantiles of time(second) / time(first) over shapes that both cover.

    A kernel that the second does not have is held beside those that do the same there: same family, precision and rest.
    """
    rows = []
    for curve in first.curves:
        for other in _partners(curve, second.curves):
            ratios = sorted(_ratios(curve, other))
            if ratios:
                at = [ratios[min(int(q * len(ratios)), len(ratios) - 1)] for q in (0.1, 0.5, 0.9)]
                row = {"curve": curve.name, "shapes": len(ratios), "median": at[1], "p10": at[0], "p90": at[2]}
                rows.append(row | {"beside": other.name})
    return rows


def _partners(curve: Curve, others: Sequence[Curve]) -> list[Curve]:
    mine = [other for other in others if other.family == curve.family]
    same = [other for other in mine if other.variant == curve.variant]
    return same or [other for other in mine if _without_kernel(other) == _without_kernel(curve) is not None]


def _without_kernel(curve: Curve) -> tuple[str, ...] | None:
    """Variants of kernels are (precision, kernel, ...); those of links are numbers from the second on, or shorter."""
    variant = tuple(str(part) for part in curve.variant)
    if len(variant) < 2 or variant[1].isdigit():
        return None
    return (variant[0], *variant[2:])


def _ratios(first: Curve, second: Curve) -> list[float]:
    """At random points of the box both span, where neither extrapolates."""
    import numpy as np

    boxes = [(max(a[0], b[0]), min(a[-1], b[-1])) for a, b in zip(first.axes, second.axes, strict=True)]
    if any(start > end for start, end in boxes):
        return []
    low, high = np.array(boxes).T
    draws = np.random.default_rng(0).uniform(low, high, size=(_SAMPLES, len(boxes)))
    ratios = []
    for point in draws.tolist():
        (a, beyond_a), (b, beyond_b) = first.at(point), second.at(point)
        if not beyond_a and not beyond_b:
            ratios.append(math.exp(b - a))
    return ratios


def changed(profile: Profile, now: dict[str, str | None] | None = None) -> list[str]:
    """One line per condition that is not what it was, `now` or here; nothing for imported profiles."""
    if profile.meta["provenance"] == "imported":
        return []
    now = conditions_here() if now is None else now
    return [
        f"{name}: measured with {profile.meta[name]}, now {here}; measure again with `moesim calibrate`"
        for name, here in now.items()
        if profile.meta.get(name) is not None and _plain(profile.meta[name]) != _plain(here)
    ]


def _plain(version: Any) -> str:
    """`2.13.0` of torch's `2.13.0+cu128`: packages do not tell the rest."""
    return str(version).partition("+")[0]


def conditions_here(gpus: Sequence[dict[str, Any]] | None = None) -> dict[str, str | None]:
    """First GPU, driver, torch and CPU of this machine, without loading torch. gpus: where they are known already."""
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    first = next(iter(hardware.gpus() if gpus is None else gpus), {"name": None, "driver": None})
    return {"gpu": first["name"], "driver": first["driver"], "torch": torch, "cpu": hardware.cpu_name()}


def profiles_in(directory: Path, now: dict[str, str | None]) -> list[dict[str, Any]]:
    """Profiles in `directory` and one level below it, and whether the machine is still what it was, being as `now`."""
    paths = sorted([*directory.glob("meta.yaml"), *directory.glob("*/meta.yaml")])[:MAX_PROFILES]
    found = []
    for path in paths:
        row: dict[str, Any] = {"path": str(path.parent)}
        try:
            meta = read_profile_meta(path.parent)
        except MoesimError as error:
            found.append(row | {"error": str(error)})
            continue
        changes = changed(Profile(str(meta["name"]), meta), now)
        measured = meta["provenance"] == "measured"
        row |= {"name": str(meta["name"]), "machine": meta["machine"], "provenance": meta["provenance"]}
        row |= {"gpu": meta["gpu"], "date": str(meta["date"])}
        found.append(row | {"fresh": measured and not changes, "changes": changes})
    return found
