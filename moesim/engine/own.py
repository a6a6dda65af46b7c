"""Where the event engine asks a user's own objects, and checks what they say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import nearest
from moesim.policies.capacity import Capacity
from moesim.policies.eviction import ALIASES
from moesim.policies.own import ask, is_own, refused
from moesim.policies.scheduling import Candidate, Scheduling
from moesim.prediction import Beliefs, Predictor
from moesim.trace import Trace

if TYPE_CHECKING:
    from moesim.engine.cache import Entry

Score = Callable[["Entry"], float]


class Resident:
    """What an eviction rule may know of an expert that may leave, read-only.

    layer, expert, bytes; low: whether it is the low-precision copy; and every feature of `eviction.score` under its
    name: `expert.lru`, `expert.lfu`, `expert.prob` … All but `belady`, which looks ahead.
    """

    __slots__ = ("_entry", "_features", "bytes", "expert", "layer", "low")

    def __init__(self, entry: Entry, features: Mapping[str, Score], experts: int) -> None:
        self._entry, self._features = entry, features
        self.layer, self.expert, self.bytes = entry.layer, entry.expert % experts, entry.bytes
        self.low = entry.expert >= experts

    def __getattr__(self, name: str) -> float:
        feature = None if name.startswith("_") else self._features.get(ALIASES.get(name, name))
        if feature is None:
            known = () if name.startswith("_") else (*self._features, *ALIASES)
            raise AttributeError(f"an expert has no '{name}'{nearest(name, known)}")
        return feature(self._entry)

    def __repr__(self) -> str:
        return f"expert {self.expert} of layer {self.layer}"


@dataclass(frozen=True)
class Miss:
    """What a miss rule may know of an expert that is neither resident nor on its way.

    tokens: of this step that chose it; weight: its share of the layer's gate weight in this step; fetch_ns, host_ns:
    how long copying and computing it on the device, or computing it on the CPU, would take with nothing else going on.
    """

    layer: int
    expert: int
    tokens: int
    weight: float
    bytes: int
    fetch_ns: int
    host_ns: int


def own_eviction(
    own: Any, features: Mapping[str, Score], experts: int
) -> tuple[Score, Callable[[list[Entry]], Entry] | None]:
    """(score of an entry, or how to pick one of several) of an object with `score` or `victim`."""
    known = {name: feature for name, feature in features.items() if name != "belady"}

    def score(entry: Entry) -> float:
        view = Resident(entry, known, experts)
        answer = ask(own, "score", view)
        try:
            value = float(answer)
        except (TypeError, ValueError):
            value = float("nan")
        if math.isnan(value):
            raise refused(own, "score", answer, f" for {view!r}")
        return value

    def pick(entries: list[Entry]) -> Entry:
        views = [Resident(entry, known, experts) for entry in entries]
        answer = ask(own, "victim", views)
        for view, entry in zip(views, entries, strict=True):
            if view is answer:
                return entry
        raise refused(own, "victim", answer)

    return (lambda entry: 0.0, pick) if hasattr(own, "victim") else (score, None)


def own_miss(own: Any, miss: Miss) -> str:
    answer = ask(own, "on_miss", miss)
    if answer not in ("fetch", "host", "skip"):
        raise refused(own, "on_miss", answer, f" for expert {miss.expert} of layer {miss.layer}")
    return str(answer)


def own_prefetch(own: Any, layer: int, believed: list[int], resident: set[int], ids: int) -> list[int]:
    answer = ask(own, "prefetch", layer, [expert for expert in believed if expert >= 0], resident)
    try:
        chosen = [int(expert) for expert in answer]
    except (TypeError, ValueError):
        raise refused(own, "prefetch", answer) from None
    if not all(0 <= expert < ids for expert in chosen):
        raise refused(own, "prefetch", answer, f", but ids go from 0 to {ids - 1}")
    return chosen


def own_start(own: Any, popularity: NDArray[np.float64]) -> list[tuple[int, int]]:
    """(layer, expert) pairs, each once; popularity: share of the calibration requests' choices, [layers, experts]."""
    answer = ask(own, "start", popularity.copy())
    try:
        pairs = [(int(layer), int(expert)) for layer, expert in answer]
    except (TypeError, ValueError):
        raise refused(own, "start", answer) from None
    layers, experts = popularity.shape
    if not all(0 <= layer < layers and 0 <= expert < experts for layer, expert in pairs):
        raise refused(own, "start", answer, f", but there are {layers} layers of {experts} experts")
    return list(dict.fromkeys(pairs))


def own_split(capacity: Capacity, total: int, expert_bytes: Sequence[int], experts: int) -> tuple[int, ...]:
    """Bytes of each layer; a user's division may not hand out more than there is."""
    answer = ask(capacity, "split", total, expert_bytes, experts)
    if not is_own(capacity):
        return tuple(answer)
    try:
        sizes = tuple(int(size) for size in answer)
    except (TypeError, ValueError):
        raise refused(capacity, "split", answer) from None
    if len(sizes) != len(expert_bytes) or min(sizes) < 0 or sum(sizes) > total:
        raise refused(capacity, "split", answer, f" for {len(expert_bytes)} layers and a total of {total} bytes")
    return sizes


class OwnScheduling:
    """A user's scheduler, whose answers are checked."""

    def __init__(self, own: Scheduling) -> None:
        self._own = own

    def admit(self, waiting: Sequence[Candidate], running: Sequence[Candidate], now: int) -> int | None:
        answer: Any = ask(self._own, "admit", waiting, running, now)
        if answer is None and waiting and not running:
            raise refused(self._own, "admit", answer, " although nothing is running, so nothing would ever be served")
        if answer is None:
            return None
        if not isinstance(answer, Integral) or not 0 <= int(answer) < len(waiting):
            raise refused(self._own, "admit", answer, f" with {len(waiting)} waiting")
        return int(answer)


def own_predict(predictor: Predictor, trace: Trace, seed: int) -> tuple[Beliefs, ...]:
    """What a predictor believes; a user's may be given as an array of what is known one layer ahead."""
    answer: Any = ask(predictor, "predict", trace, seed)
    if not is_own(predictor):
        return tuple(answer)
    if isinstance(answer, np.ndarray):
        answer = Beliefs(answer, distance=1)
    beliefs = tuple(answer) if isinstance(answer, tuple | list) else (answer,)
    for one in beliefs:
        if not isinstance(one, Beliefs):
            raise refused(predictor, "predict", one)
        _check_beliefs(predictor, one, trace)
    return tuple(replace(one, experts=one.experts.astype(np.int16)) for one in beliefs)


def _check_beliefs(predictor: Predictor, beliefs: Beliefs, trace: Trace) -> None:
    ids, count = beliefs.experts, trace.info.experts
    shape = (trace.tokens, trace.layers)
    if ids.ndim != 3 or ids.shape[:2] != shape or not np.issubdtype(ids.dtype, np.integer):
        about = f" of shape {ids.shape} and type {ids.dtype} for {shape[0]} tokens and {shape[1]} layers"
        raise refused(predictor, "predict", type(ids).__name__, about)
    if ids.size and (ids.min() < -1 or ids.max() >= 2 * count):
        worst = int(ids.max() if ids.max() >= 2 * count else ids.min())
        about = f" among experts 0 to {count - 1} (-1 for none, from {count} on for low-precision copies)"
        raise refused(predictor, "predict", worst, about)
    if not isinstance(beliefs.distance, Integral) or beliefs.distance < 0:
        raise refused(predictor, "predict", beliefs.distance, " as a distance in layers")
    if beliefs.map is not None and beliefs.map.shape != (*shape, count):
        raise refused(predictor, "predict", beliefs.map.shape, f" as the shape of a map of {(*shape, count)}")
