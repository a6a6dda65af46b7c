"""Sizes and rates as people write them. Memory is binary (GiB), bandwidth decimal (GB/s), time int64 ns."""

from __future__ import annotations

import math
import re
from typing import Any

from moesim.errors import MoesimError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {
    "": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB, "t": GIB << 10, "tib": GIB << 10,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(text: str, what: str = "size") -> int:
    """Bytes of `24GiB`, `500 MB`, `1.5g` or a bare number of bytes; raises MoesimError naming `what`."""
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise MoesimError(f"{what} '{text}': not a size; write a number with a unit, such as 8GiB or 500MB")
    return int(float(match[1]) * unit)


def format_size(n: float) -> str:
    """`5.25 GiB`: three significant digits, binary units."""
    for unit, name in ((GIB << 10, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(n) >= unit:
            return f"{n / unit:.3g} {name}" if n / unit < 1000 else f"{n / unit:.0f} {name}"
    return f"{n:.0f} B"


def ns(seconds: float) -> int:
    """Whole nanoseconds, rounded half up: the one place where a cost becomes simulated time."""
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError(f"a duration must be finite and not negative, not {seconds}")
    return int(seconds * 1e9 + 0.5)


def many_ns(seconds: Any) -> Any:
    """`ns` of an array of durations that are known to be such."""
    return (seconds * 1e9 + 0.5).astype("int64")
