"""FreeToken's `benchbw.json`: memory and PCIe rates, and expert rates per number format, of one machine.

Rates become times at the size of one expert; a rate says nothing of fixed costs, so the curves have none worth the
name, and only shapes near that size are not extrapolated.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError
from moesim.profile_import import Import, bounded
from moesim.units import MIB

SOURCE = "FreeToken benchbw.json"
LICENCE = "measurements of the user's own machine"
VERSIONS = (4,)
MAX_BYTES = 1 << 20
_FALLBACK_BYTES = 16 * MIB  # of an expert, where the file gives none

Row = dict[str, Any]


def read(path: Path) -> Import:
    """The file, or the `benchbw.json` in a directory."""
    path = path / "benchbw.json" if path.is_dir() else path
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    if bounded(path).stat().st_size > MAX_BYTES:
        raise CalibrationError(f"{path}: larger than {MAX_BYTES} bytes, so it is no benchbw.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("ceilings"), dict):
        raise CalibrationError(f"{path}: holds no 'ceilings'; this is no benchbw.json")
    version = data.get("version", 4)
    if version not in VERSIONS:
        raise CalibrationError(f"{path}: version {version!r}, but moesim reads {', '.join(map(str, VERSIONS))}")
    notes = ["experts on the CPU: a rate without shapes; put it into a machine file as host.dram_gbps"]
    return Import(str(data.get("gpu") or "unknown"), "FreeToken", _rows(data, path), notes)


def _rows(data: Row, path: Path) -> Iterator[list[Row]]:
    """Copies at expert size and four times around it, at the linear rate, or the gather rate of scattered experts."""
    formats = {k: v for k, v in (data.get("dtypes") or data).items() if isinstance(v, dict) and "expert_bytes" in v}
    sizes = sorted({int(_rate(v, "expert_bytes", path)) for v in formats.values()}) or [_FALLBACK_BYTES]
    rows = []
    for direction in ("h2d", "d2h"):
        rate = _rate(data["ceilings"], f"pcie_linear_{direction}_gbs", path)
        for size in {s * 4**i for s in sizes for i in (-1, 0, 1)}:
            rows.append({
                "family": "copy", "direction": direction, "pinned": 1, "nbytes": size, "seconds": size / rate / 1e9,
            })  # fmt: skip
    yield rows
    yield [row for form in formats.values() for row in _shared(form, path)]


def _shared(form: Row, path: Path) -> Iterator[Row]:
    """Copies and CPU experts of one number format alone and beside each other, where the file has all four rates.

    What they get together is what host memory holds; rates measured alone promise both at once.
    """
    rates = {"h2d": ("pcie_gather_gbs", "pcie_gather_overlap_gbs"), "host": ("cpu_moe_gbs", "cpu_moe_overlap_gbs")}
    if not all(name in form for names in rates.values() for name in names):
        return
    for what, names in rates.items():
        for both, name in enumerate(names):
            rate = _rate(form, name, path)
            beside = {"h2d": int(both or what == "h2d"), "host": int(both or what == "host"), "disk": 0, "gpu": 0}
            for size in (int(_rate(form, "expert_bytes", path) * 4.0**i) for i in (-1, 0, 1)):
                yield {"family": "together", "what": what, "nbytes": size, **beside, "seconds": size / rate / 1e9}


def _rate(values: Row, name: str, path: Path) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise CalibrationError(f"{path}: {name} {value!r} is not a number above 0")
    return float(value)
