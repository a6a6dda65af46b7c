"""Simulated time: whole nanoseconds since the replay began."""

from __future__ import annotations

from typing import TYPE_CHECKING

import simpy


class Clock(simpy.Environment):
    """SimPy's environment with a time that is an int, as every delay put into it is."""

    if TYPE_CHECKING:

        @property
        def now(self) -> int: ...
