"""Published systems and baselines by name. A new one is one file and one line below."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from moesim.costs.table import KERNELS
from moesim.errors import PolicyError, nearest
from moesim.policies import FCFS, GreedySLO
from moesim.prediction import (
    ExpertMaps,
    NoPrediction,
    Oracle,
    RequestCounts,
    StackedGates,
    Transitions,
    WholeLayer,
)
from moesim.systems import baselines
from moesim.systems.adapmoe import adapmoe
from moesim.systems.deepspeed import deepspeed
from moesim.systems.eep import eep
from moesim.systems.emoe import emoe
from moesim.systems.expertflow import expertflow
from moesim.systems.fmoe import fmoe
from moesim.systems.hexa_moe import hexa_moe
from moesim.systems.hobbit import hobbit
from moesim.systems.ktransformers import ktransformers
from moesim.systems.llamacpp import llamacpp
from moesim.systems.mc import mc
from moesim.systems.meo import meo
from moesim.systems.moe_infinity import moe_infinity
from moesim.systems.own_file import is_file_spec, load_own
from moesim.systems.pregated import pregated
from moesim.systems.promoe import promoe
from moesim.systems.samoyeds import samoyeds
from moesim.systems.seer import seer
from moesim.systems.settings import change
from moesim.systems.sida import sida
from moesim.systems.system import System
from moesim.systems.tsep import tsep

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
    "Belady-window": baselines.belady_window,
    "DeepSpeed": deepspeed,
    "Pre-gated": pregated,
    "MoE-Infinity": moe_infinity,
    "ProMoE": promoe,
    "KTransformers": ktransformers,
    "llama.cpp": llamacpp,
    "ExpertFlow": expertflow,
    "EPLB": baselines.eplb,
    "fMoE": fmoe,
    "HOBBIT": hobbit,
    "AdapMoE": adapmoe,
    "SiDA": sida,
    "Samoyeds": samoyeds,
    "HEXA-MoE": hexa_moe,
    "MC": mc,
    "EEP": eep,
    "SEER-MoE": seer,
    "MEO": meo,
    "TSEP": tsep,
}

PREDICTORS: dict[str, Callable[..., Any]] = {
    "none": NoPrediction,
    "transitions": Transitions,
    "oracle": Oracle,
    "expert-maps": ExpertMaps,
    "request-counts": RequestCounts,
    "stacked-gates": StackedGates,
    "whole-layer": WholeLayer,
}
SCHEDULERS: dict[str, Callable[..., Any]] = {"fcfs": FCFS, "greedy-slo": GreedySLO}
CHOICES = {"predictor": PREDICTORS, "scheduling": SCHEDULERS}  # parts that also have names of their own

__all__ = [
    "PREDICTORS",
    "SCHEDULERS",
    "SYSTEMS",
    "System",
    "load_system",
    "split_specs",
    "with_setting",
    "with_settings",
]


def load_system(spec: str) -> System:
    """`LRU`, `emoe`, `eMoE(variant='E', period=20)`: a name in any case, with keyword arguments if wanted.

    `my_policy.py:MyPolicy` executes that file and takes the policy it defines (docs/add-a-policy.md).
    """
    if is_file_spec(spec):
        return load_own(spec, load_system, _arguments)
    return _make("policy", spec, SYSTEMS)


def split_specs(text: str) -> list[str]:
    """At commas outside brackets, so that `eMoE(variant='E', period=1),LRU` is two."""
    names, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            names.append("")
        else:
            names[-1] += char
    return [name.strip() for name in names if name.strip()]


def with_settings(system: System, settings: Iterable[str]) -> System:
    """A composition with choices changed, all together: `eviction.scope=global` a field, `misses=Fiddler` a part of
    another system, `predictor=oracle(recall=0.8)`, `scheduling=greedy-slo` and `kernel=samoyeds` by name."""
    return change(system, settings, _take)


def with_setting(system: System, setting: str) -> System:
    """`with_settings` with one change."""
    return with_settings(system, [setting])


def _take(part: str, spec: str) -> Any:
    name = spec.partition("(")[0].strip().lower()
    if part == "kernel" and name in KERNELS:
        return name
    choices = {} if is_file_spec(spec) else CHOICES.get(part, {})
    if name in {known.lower() for known in choices}:
        return _make(part, spec, choices)
    if choices and name not in {known.lower() for known in SYSTEMS}:
        raise PolicyError(f"unknown {part} '{spec}'{nearest(name, [*choices, *SYSTEMS])}")
    return getattr(load_system(spec), part)


def _make(kind: str, spec: str, known: Mapping[str, Callable[..., Any]]) -> Any:
    name, bracket, rest = spec.strip().partition("(")
    make = {k.lower(): v for k, v in known.items()}.get(name.strip().lower())
    if make is None:
        raise PolicyError(f"unknown {kind} '{name}'{nearest(name, known)}")
    arguments = _arguments(spec, rest) if bracket else {}
    parameters = inspect.signature(make).parameters
    for key in arguments:
        if key not in parameters:
            hint = nearest(key, parameters) if parameters else "; it takes no arguments"
            raise PolicyError(f"{kind} {name} has no argument '{key}'{hint}")
    try:
        return make(**arguments)
    except (TypeError, ValueError) as error:
        raise PolicyError(
            f"{kind} '{spec}': an argument is of the wrong kind ({error}); 'moesim systems show'"
        ) from None


def _arguments(spec: str, rest: str) -> dict[str, Any]:
    """Keyword arguments written as Python literals; nothing is evaluated."""
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        pass
    raise PolicyError(f"'{spec}': write arguments as name=value pairs, such as eMoE(period=20)")
