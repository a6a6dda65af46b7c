"""Published systems and baselines by name. A new one is one file and one line below."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from typing import Any

from moesim.errors import PolicyError, nearest
from moesim.systems import baselines
from moesim.systems.emoe import emoe
from moesim.systems.system import System, with_setting

SYSTEMS: dict[str, Callable[..., System]] = {
    "all-resident": baselines.all_resident,
    "on-demand": baselines.on_demand,
    "static": baselines.static,
    "LRU": baselines.lru,
    "LFU": baselines.lfu,
    "FIFO": baselines.fifo,
    "random": baselines.random,
    "Belady": baselines.belady,
    "oracle": baselines.oracle,
    "Mixtral-Offloading": baselines.mixtral_offloading,
    "Fiddler": baselines.fiddler,
    "eMoE": emoe,
}

__all__ = ["SYSTEMS", "System", "load_system", "with_setting"]


def load_system(spec: str) -> System:
    """`LRU`, `emoe`, `eMoE(variant='E', period=20)`: a name in any case, with keyword arguments if wanted."""
    name, bracket, rest = spec.strip().partition("(")
    folded = {known.lower(): make for known, make in SYSTEMS.items()}
    make = folded.get(name.strip().lower())
    if make is None:
        raise PolicyError(f"unknown policy '{name}'{nearest(name, SYSTEMS)}")
    arguments = _arguments(spec, rest) if bracket else {}
    known = inspect.signature(make).parameters
    for key in arguments:
        if key not in known:
            hint = nearest(key, known) if known else "; it takes no arguments"
            raise PolicyError(f"policy {name} has no argument '{key}'{hint}")
    return make(**arguments)


def _arguments(spec: str, rest: str) -> dict[str, Any]:
    """Keyword arguments written as Python literals; nothing is evaluated."""
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise PolicyError(f"policy '{spec}': write arguments as name=value pairs, such as eMoE(period=20)")
