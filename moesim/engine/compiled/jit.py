"""How functions are compiled."""

from __future__ import annotations

from typing import Any

from numba import njit

_OPTIONS: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "error_model": "numpy"}

# Called from compiled code only; its callers hold its machine code.
inner = njit(**_OPTIONS)
# The same, but its text becomes part of every caller's. A function of its own is compiled together with all that it
# calls, so those that reach far would be compiled over and over.
folded = njit(inline="always", **_OPTIONS)
