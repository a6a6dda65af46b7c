"""The families of measurements, one idea per module; a new one is a `Family` in this list."""

from __future__ import annotations

from dataclasses import replace

from moesim.calibrate.families.attention import DECODE, MLA_DECODE, MLA_PREFILL, PREFILL
from moesim.calibrate.families.collectives import COLLECTIVE
from moesim.calibrate.families.copies import COPY, HANDOFF
from moesim.calibrate.families.experts import GROUPED, HOST_EXPERT
from moesim.calibrate.families.gemm import GEMM
from moesim.calibrate.families.reads import READ
from moesim.calibrate.families.small import LAUNCH, SMALL
from moesim.calibrate.families.sparse import SPARSE_GEMM
from moesim.calibrate.families.together import TOGETHER
from moesim.calibrate.family import Family
from moesim.errors import CalibrationError, nearest

FAMILIES = [
    GEMM, SPARSE_GEMM, GROUPED, PREFILL, DECODE, MLA_PREFILL, MLA_DECODE, SMALL, LAUNCH,
    COPY, READ, HOST_EXPERT, HANDOFF, TOGETHER, COLLECTIVE,
]  # fmt: skip


def select(only: str | None) -> list[Family]:
    """Families named, or those of a group named, in `gemm,link`; all of them for None. Raises CalibrationError."""
    if only is None:
        return FAMILIES
    known = {family.name for family in FAMILIES} | {family.group for family in FAMILIES}
    names = [name.strip() for name in only.split(",") if name.strip()]
    if not names:
        raise CalibrationError(f"--only '{only}': names no family; known: {', '.join(sorted(known))}")
    for name in names:
        if name not in known:
            raise CalibrationError(f"--only '{name}': not a family or group{nearest(name, known)}")
    found = [family for family in FAMILIES if family.name in names or family.group in names]
    if SPARSE_GEMM in found and GEMM not in found:
        found.append(replace(GEMM, share=0.0))  # no time of its own: only what is measured beside the sparse products
    return found
