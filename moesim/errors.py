"""Errors a user can cause; the command line prints them in one line and exits 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoesimError(Exception):
    """What went wrong, by value, rule and remedy, in one line whatever an untrusted file put into the value."""

    def __str__(self) -> str:
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in super().__str__())


class TraceError(MoesimError):
    """A routing trace breaks the schema in traces/README.md."""


class ModelError(MoesimError):
    """A model description is incomplete, unknown or contradicts itself."""


class MachineError(MoesimError):
    """A machine description is incomplete or unknown."""


class PolicyError(MoesimError):
    """A system or choice is unknown, or a combination makes no sense."""


class WorkloadError(MoesimError):
    """A request stream cannot be read or makes no sense."""


class MemoryBudgetError(MoesimError):
    """The memory asked for cannot hold what it must."""


class SweepError(MoesimError):
    """A sweep's specification or its results cannot be read or make no sense."""


class CalibrationError(MoesimError):
    """A measurement, a profile or a table to import is incomplete or cannot be."""


class ValidationError(MoesimError):
    """A validation cannot be run here, or its cases cannot be read."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the list of what is known: the remedy part of an unknown-name error."""
    names = sorted(known, key=str.lower)
    folded = {n.lower(): n for n in names}
    close = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    return f"; did you mean '{folded[close[0]]}'?" if close else f"; known: {', '.join(names)}"
