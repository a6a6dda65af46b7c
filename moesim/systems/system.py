"""System: one way of serving, as a composition of orthogonal choices."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from moesim.costs.table import KERNELS
from moesim.errors import PolicyError, nearest
from moesim.policies import (
    FCFS,
    LRU,
    Capacity,
    Even,
    Eviction,
    Misses,
    Placement,
    Prefetch,
    Refresh,
    Scheduling,
    Transfer,
)
from moesim.prediction import NoPrediction, Predictor
from moesim.transforms import Transform


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
    scheduling: Scheduling = field(default_factory=FCFS)
    refresh: Refresh | None = None
    cache: bool = True
    all_resident: bool = False
    expert_bits: float | None = None  # None = as the model comes
    transforms: tuple[Transform, ...] = ()  # applied to model and trace, in order, before anything else sees them
    kernel: str = "grouped"  # what computes experts on the device
    source: str = ""
    quality: Quality | None = None  # where outputs change: the accuracy its authors published
    notes: tuple[str, ...] = ()  # what a reader of the result must know

    def __post_init__(self) -> None:
        if self.placement.pinned and self.refresh is not None:
            raise PolicyError("pinned experts cannot be planned anew; set placement.pinned to false or refresh=LRU")
        if self.placement.pinned and self.placement.start == "empty":
            raise PolicyError("placement.pinned needs experts to pin; set placement.start to hot or all")
        if self.placement.pinned and self.misses.keep and not (self.all_resident or self.misses.changes_outputs):
            raise PolicyError("pinned experts leave no slot for others to keep; set misses.keep to false")
        if not self.cache and not self.all_resident and self.misses.keep and self.misses.rule != "host":
            raise PolicyError("a system without a cache cannot keep what it fetches; set misses.keep to false")
        if self.transfer.write_back and not self.misses.keep:
            raise PolicyError("transfer.write_back needs a cache that evicts; misses.keep is false")
        if self.kernel not in KERNELS:
            raise PolicyError(f"unknown kernel '{self.kernel}'{nearest(self.kernel, KERNELS)}")

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


def plain(value: Any) -> Any:
    """A choice as nested plain values; choices name their class so that a result can be read without the code."""
    if hasattr(value, "__dataclass_fields__"):
        body = {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        return {"kind": type(value).__name__, **body} if body else type(value).__name__
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def change_field(system: System, path: str, text: str) -> System:
    """`path` is a field of the composition (`expert_bits`) or of one of its parts (`eviction.scope`)."""
    setting = f"{path}={text}"
    part, _, name = path.partition(".")
    known = [f.name for f in fields(system) if f.name not in ("name", "source", "quality", "notes")]
    if part not in known:
        raise PolicyError(f"--set {setting}: a system has no '{part}'{nearest(part, known)}")
    choice = getattr(system, part)
    if not name:
        return replace(system, **{part: parse_value(choice, text, setting)})
    if not hasattr(choice, "__dataclass_fields__"):
        raise PolicyError(f"--set {setting}: {system.name} has no {part}; take one from another system: {part}=NAME")
    inner = [f.name for f in fields(choice)]
    if name not in inner:
        raise PolicyError(f"--set {setting}: {part} has no '{name}'{nearest(name, inner)}")
    value = parse_value(getattr(choice, name), text, setting)
    try:
        return replace(system, **{part: replace(choice, **{name: value})})
    except (TypeError, ValueError) as error:
        raise PolicyError(f"--set {setting}: '{text}' is of the wrong kind ({error})") from None


def parse_value(old: Any, text: str, setting: str) -> Any:
    """`text` read as the kind of value it replaces; scores are written `lru:0.5,lfu:0.5`."""
    try:
        if isinstance(old, bool):
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        if isinstance(old, int):
            return int(text)
        if isinstance(old, float):
            return float(text)
        if isinstance(old, tuple) and old and isinstance(old[0], tuple):
            pairs = [item.partition(":") for item in text.split(",")]
            return tuple((feature, float(weight or 1)) for feature, _, weight in pairs)
        if isinstance(old, tuple):
            kind = type(old[0]) if old else str
            return tuple(kind(item) for item in text.split(",") if item)
        if old is None:
            return None if text.lower() == "none" else float(text) if "." in text else int(text)
        if isinstance(old, str):
            return text
    except (ValueError, KeyError):
        pass
    raise PolicyError(f"--set {setting}: '{text}' does not fit, the present value is {old!r}")
