"""One run: share the budget among the families, measure the least sure points, keep every row as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moesim.calibrate.choose import Candidates
from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point
from moesim.calibrate.store import Store
from moesim.calibrate.timing import Disturbed, Timer, Timing
from moesim.costs.families import family as columns
from moesim.errors import MoesimError

_NOT_FEATURES = ("family", "seconds", "mad_s", "samples", "contaminated")
_TRIES = 2  # a disturbed point is measured once more, later


@dataclass
class Track:
    """A family during a run. skipped: why points were not measured, with how many."""

    family: Family
    candidates: Candidates
    spent_s: float = 0.0
    measured: int = 0
    before: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1


@dataclass(frozen=True)
class Outcome:
    """Families as they ended, and whether the user stopped the run."""

    tracks: list[Track]
    interrupted: bool


def run(
    families: list[Family],
    device: Device,
    timer: Timer,
    store: Store,
    deadline: float,
    show: Callable[[str], None] = lambda what: None,
) -> Outcome:
    """Measure until `deadline` (time.monotonic) or until nothing is left; Ctrl-C ends it early."""
    tracks = [open_track(family, device, store, deadline - time.monotonic()) for family in families]
    try:
        while time.monotonic() < deadline and (track := _least_served(tracks)):
            started = time.monotonic()
            point = track.candidates.next()
            assert point is not None
            show(f"{track.family.name} {' '.join(str(value) for value in point.values())}")
            _measure(track, point, tracks, device, timer, store)
            track.spent_s += time.monotonic() - started
    except KeyboardInterrupt:
        return Outcome(tracks, interrupted=True)
    return Outcome(tracks, interrupted=False)


def open_track(family: Family, device: Device, store: Store, budget_s: float) -> Track:
    """The points of a family that run here, those measured before left out."""
    track_skips: dict[str, int] = {}
    usable: list[Point] = []
    for point in family.points(device, budget_s):
        reason = family.runnable(device, point)
        if reason:
            track_skips[reason] = track_skips.get(reason, 0) + 1
        else:
            usable.append(point)
    features = columns(family.name)
    candidates = Candidates(usable, features.shape, features.variant, device.seed)
    track = Track(family, candidates, skipped=track_skips)
    for row in store.rows:
        if row["family"] == family.name:
            track.candidates.measured(point_of(row), row["seconds"])
            track.before += 1
    return track


def _least_served(tracks: list[Track]) -> Track | None:
    """Of the families with points left, the one that had the least of its share."""
    open_ = [track for track in tracks if len(track.candidates) and track.family.share]
    return min(open_, key=lambda track: track.spent_s / track.family.share) if open_ else None


def _measure(track: Track, point: Point, tracks: list[Track], device: Device, timer: Timer, store: Store) -> None:
    """Measure a point, and what belongs beside it where that family runs too and has no such row."""
    timing = _attempt(track, point, device, timer)
    if timing is None:
        return
    _keep(track, point, timing, store)
    name, twin = track.family.beside(point) or ("", {})
    for other in tracks:
        if other.family.name == name and other.candidates.has(twin):
            beside = _attempt(other, twin, device, timer)
            if beside is not None:
                _keep(other, twin, beside, store)


def _attempt(track: Track, point: Point, device: Device, timer: Timer) -> Timing | None:
    """Measure; what cannot be measured is left out, and the reason written down."""
    try:
        return track.family.measure(point, device, timer)
    except Disturbed:
        key = str(point)
        track.tries[key] = track.tries.get(key, 0) + 1
        if track.tries[key] < _TRIES:
            track.candidates.postpone(point)
            return None
        reason = "disturbed by other programs or by throttling"
    except (RuntimeError, OSError, MoesimError) as error:  # out of memory, no such kernel, a result that is not finite
        reason = str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__
    track.candidates.give_up(point)
    track.skip(reason)
    return None


def _keep(track: Track, point: Point, timing: Timing, store: Store) -> None:
    numbers: dict[str, Any] = {"seconds": timing.seconds, "mad_s": timing.mad_s, "samples": list(timing.samples)}
    if timing.contaminated:
        numbers["contaminated"] = 1
    store.add({"family": track.family.name, **point, **numbers})
    track.candidates.measured(point, timing.seconds)
    track.measured += 1


def point_of(row: dict[str, Any]) -> Point:
    """The features of a row."""
    return {name: value for name, value in row.items() if name not in _NOT_FEATURES}
