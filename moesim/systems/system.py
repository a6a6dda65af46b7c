"""System: one way of serving, as a composition of orthogonal choices."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from moesim.costs.table import KERNELS
from moesim.errors import PolicyError, nearest
from moesim.policies import (
    FCFS,
    LRU,
    Capacity,
    Even,
    Eviction,
    Misses,
    Parallel,
    Placement,
    Prefetch,
    Refresh,
    Scheduling,
    Transfer,
    WholeLayers,
)
from moesim.policies.own import is_own
from moesim.prediction import NoPrediction, Predictor
from moesim.transforms import Transform

ADOPTING: dict[str, type] = {"eviction": Eviction, "misses": Misses, "prefetch": Prefetch, "placement": Placement}
CHOICES = (*ADOPTING, "capacity", "predictor", "scheduling")  # parts a plain object may decide, transforms apart


@dataclass(frozen=True)
class Quality:
    """What a system's authors measured of its outputs, as reported; moesim predicts none. source: where it is said."""

    reported: str
    source: str


@dataclass(frozen=True)
class System:
    """`cache=False`: nothing stays after its layer. `all_resident`: every expert lives on the device."""

    name: str
    eviction: Eviction = LRU
    capacity: Capacity = field(default_factory=Even)
    misses: Misses = field(default_factory=Misses)
    predictor: Predictor = field(default_factory=NoPrediction)
    prefetch: Prefetch = field(default_factory=Prefetch)
    placement: Placement = field(default_factory=Placement)
    transfer: Transfer = field(default_factory=Transfer)
    parallel: Parallel = field(default_factory=Parallel)
    scheduling: Scheduling = field(default_factory=FCFS)
    refresh: Refresh | None = None
    cache: bool = True
    all_resident: bool = False
    expert_bits: float | None = None  # None = as the model comes
    transforms: tuple[Transform, ...] = ()  # applied to model and trace, in order, before anything else sees them
    kernel: str = "grouped"  # what computes experts on the device
    graph: bool = True  # kernels are replayed as CUDA graphs, not launched one by one as transformers does
    repacked: bool = True  # weights of experts on the CPU lie as its kernels want them, not as the file has them
    native: bool = False  # a compiled program drives the device, as llama.cpp does, not Python
    source: str = ""
    quality: Quality | None = None  # where outputs change: the accuracy its authors published
    notes: tuple[str, ...] = ()  # what a reader of the result must know

    def __post_init__(self) -> None:
        self._adopt()
        for f in fields(self):
            check_kinds(f.name, getattr(self, f.name))
        self._check_cache()
        self._check_beliefs()
        if isinstance(self.capacity, WholeLayers) and (
            self.misses.keep or not isinstance(self.predictor, NoPrediction)
        ):
            raise PolicyError(
                "capacity WholeLayers leaves layers without a slot, so nothing can be brought there; set "
                "misses.keep=false and predictor=none, or another capacity"
            )
        if self.kernel not in KERNELS:
            raise PolicyError(f"unknown kernel '{self.kernel}'{nearest(self.kernel, KERNELS)}")
        if self.expert_bits is not None and not 0 < self.expert_bits <= 64:
            raise PolicyError(f"expert_bits {self.expert_bits} must lie above 0 and up to 64 bits per weight")
        if self.misses.changes_outputs and any(getattr(t, "merges", False) for t in self.transforms):
            raise PolicyError(
                f"merged experts belong to one request: misses.rule {self.misses.rule} cannot put another in their "
                "place; set misses.rule to fetch, host or cheaper"
            )

    def _adopt(self) -> None:
        """Plain objects in the place of a declared choice become its `own`."""
        for part, choice in ADOPTING.items():
            if not isinstance(given := getattr(self, part), choice):
                object.__setattr__(self, part, choice(own=given))
        for part, method in (("capacity", "split"), ("predictor", "predict"), ("scheduling", "admit")):
            if not hasattr(getattr(self, part), method):
                raise PolicyError(f"{part} {type(getattr(self, part)).__name__} needs a method {method}")

    @property
    def own(self) -> tuple[tuple[str, Any], ...]:
        """(part, object) of every choice that is a plain object of the user's."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        things = [(part, getattr(choice, "own", None) or choice) for part, choice in parts.items()]
        return tuple((p, t) for p, t in things if p in CHOICES and is_own(t)) + tuple(
            ("transforms", t) for t in self.transforms if is_own(t)
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """What a trace or a question must bring, and what stands in where it does not."""
        choices = (*(getattr(self, f.name) for f in fields(self)), *self.transforms)
        return tuple(dict.fromkeys(need for choice in choices for need in getattr(choice, "needs", ())))

    @property
    def undeclared(self) -> str:
        """Why only the event engine can run it: which parts ask a plain object in mid-run; "" where none does."""
        asked = [part for part in ("eviction", "misses", "prefetch") if getattr(self, part).own is not None]
        return f"{' and '.join(asked)} decided by {self.own_names}, a plain Python object" if asked else ""

    @property
    def own_names(self) -> str:
        return ", ".join(dict.fromkeys(type(thing).__name__ for _, thing in self.own))

    def fresh(self) -> System:
        """The same system with plain objects as they were before any run: what they remember stays within one."""
        try:
            return deepcopy(self) if self.own else self
        except Exception as error:
            raise PolicyError(
                f"{self.own_names} cannot be copied for a run of its own ({error}); keep open files and the like out"
            ) from error

    def _check_cache(self) -> None:
        if self.placement.pinned and self.refresh is not None:
            raise PolicyError("pinned experts cannot be planned anew; set placement.pinned to false or refresh=LRU")
        if self.placement.pinned and self.placement.start == "empty" and self.placement.own is None:
            raise PolicyError("placement.pinned needs experts to pin; set placement.start to hot or all")
        if self.all_resident and (not self.cache or self.misses.rule == "precision"):
            raise PolicyError(
                "all experts resident are a cache that holds them and misses none; set cache=true and misses=LRU, "
                "or all_resident=false"
            )
        if self.placement.pinned and self.misses.keep and not (self.all_resident or self.misses.substitutes):
            raise PolicyError("pinned experts leave no slot for others to keep; set misses.keep to false")
        if (
            not self.cache
            and not self.all_resident
            and self.misses.keep
            and {self.misses.rule, self.misses.prompts} - {None} != {"host"}
        ):
            raise PolicyError("a system without a cache cannot keep what it fetches; set misses.keep to false")
        if self.transfer.write_back and not self.misses.keep:
            raise PolicyError("transfer.write_back needs a cache that evicts; misses.keep is false")
        if self.refresh is not None and not self.cache:
            raise PolicyError("a plan needs a cache to keep its experts in; set refresh=none, or cache=true")

    def _check_beliefs(self) -> None:
        features = {feature for feature, _ in self.eviction.score}
        if "plan" in features and self.refresh is None:
            raise PolicyError("eviction.score plan needs plans to go by; set refresh=eMoE as well, or another score")
        if "prob" in features and isinstance(self.predictor, NoPrediction):
            raise PolicyError("eviction.score prob needs beliefs; set predictor=expert-maps as well, or another score")

    def scratch_slots(self, top_k: int, experts: int) -> int:
        """Slots for experts used once and forgotten: a token's, or a layer's where whole layers move; the next
        layer's as well where a system without a cache prefetches. None where all that comes is kept."""
        if self.cache and self.misses.keep:
            return 0
        own = experts if self.transfer.unit == "layer" else max(2, top_k)
        return own if self.cache or isinstance(self.predictor, NoPrediction) else 2 * own

    def parts(self) -> dict[str, Any]:
        """The composition, part by part, as plain values for results and `systems show`."""
        return {
            f.name: plain(getattr(self, f.name)) for f in fields(self) if f.name not in ("notes", "source", "quality")
        }


def check_kinds(name: str, choice: Any) -> None:
    """Every field of a choice, or of each of several, holds what it is declared to hold; numbers are finite."""
    for one in choice if isinstance(choice, tuple) else (choice,):
        if not is_dataclass(one) or is_own(one):
            continue
        for field_name, kind in _hints(one.__class__).items():
            value = getattr(one, field_name)
            if not fits(value, kind):
                raise PolicyError(f"{name}.{field_name} {value!r} must be {_words(kind)}")
            if is_dataclass(value):
                check_kinds(f"{name}.{field_name}", value)


@lru_cache
def _hints(choice: type) -> dict[str, Any]:
    hints = get_type_hints(choice)
    return {f.name: hints[f.name] for f in fields(choice)}


_WORDS = {
    "int": "a whole number",
    "float": "a finite number",
    "bool": "true or false",
    "str": "a word",
    "NoneType": "none",
    "tuple[float, ...]": "numbers in round brackets, such as (0.9, 0.8)",
    "tuple[str, ...]": "words in round brackets, such as ('a', 'b')",
}


def _words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_words(one) for one in get_args(kind))
    name = str(kind) if get_origin(kind) else kind.__name__
    return _WORDS.get(name, name)


def fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the declared kind; kinds that are neither plain nor tuples of such always fit."""
    inner = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return len(kinds) == len(value) and all(fits(v, k) for v, k in zip(value, kinds, strict=True))
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        return number and math.isfinite(value)
    return isinstance(value, kind) if kind in (str, bool, NoneType) else True


def plain(value: Any) -> Any:
    """A choice as nested plain values; choices name their class so that a result can be read without the code."""
    if hasattr(value, "__dataclass_fields__"):
        body = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **body} if body else type(value).__name__
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    if is_own(value) and hasattr(value, "__dict__"):
        simple = {k: v for k, v in vars(value).items() if isinstance(v, int | float | str)}
        return {"kind": type(value).__name__, **simple} if simple else type(value).__name__
    return value
