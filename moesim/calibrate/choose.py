"""Which point to measure next: where predictions from the points so far agree least.

Every variant of a family (costs/families.py) first gets a few points that span its axes. Then the log of the
seconds is interpolated over the log of the axes several times, each time without some of the points; the next point
is the one these predictions disagree on most, or that is farthest from any point where they are poor in general.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.calibrate.family import Point

_FOLDS = 4
_SCORED = 400  # points drawn from those left: choosing must cost less than measuring


class Candidates:
    """The points of one family: which are measured, which are left, and which of those is worth most."""

    def __init__(self, points: Sequence[Point], shape: Sequence[str], variant: Sequence[str], seed: int = 0) -> None:
        """shape: the features interpolated over; variant: those that tell curves apart."""
        self._rng = np.random.default_rng(seed)
        self._variants: dict[tuple[Any, ...], _Variant] = {}
        for point in points:
            key = tuple(point.get(name) for name in variant)
            self._variants.setdefault(key, _Variant()).points.append(point)
        for group in self._variants.values():
            group.prepare([name for name in shape if name in group.points[0]])
        self._later: list[Point] = []
        self._where = {_key(p): (v, i) for v in self._variants.values() for i, p in enumerate(v.points)}

    def __len__(self) -> int:
        """Points left."""
        return sum(len(variant.left) for variant in self._variants.values()) + len(self._later)

    def has(self, point: Point) -> bool:
        """Whether `point` is one of those left."""
        variant, index = self._where.get(_key(point), (None, -1))
        return variant is not None and index in variant.left

    def measured(self, point: Point, seconds: float) -> None:
        """Take `point` in; one that is not among the candidates (another budget's) is no use here."""
        if _key(point) in self._where:
            variant, index = self._where[_key(point)]
            variant.seconds[index] = seconds
            variant.left.discard(index)
            variant.scores = None

    def give_up(self, point: Point) -> None:
        """Leave `point` out: it cannot be measured here."""
        variant, index = self._where[_key(point)]
        variant.left.discard(index)
        variant.scores = None

    def postpone(self, point: Point) -> None:
        """Leave `point` out until no other is left."""
        self.give_up(point)
        self._later.append(point)

    def next(self) -> Point | None:
        """The least sure point; None when none is left."""
        open_ = [variant for variant in self._variants.values() if variant.left]
        if not open_:
            return self._later.pop(0) if self._later else None
        fresh = [variant for variant in open_ if len(variant.seconds) < variant.seeds]
        if fresh:
            variant = min(fresh, key=lambda v: len(v.seconds) / v.seeds)
            return variant.points[variant.farthest()]
        best = max(open_, key=lambda v: max(v.unsureness(self._rng).values()))
        scores = best.unsureness(self._rng)
        return best.points[max(scores, key=lambda i: scores[i])]


class _Variant:
    """The points that differ in numbers only."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.seconds: dict[int, float] = {}
        self.scores: dict[int, float] | None = None

    def prepare(self, names: list[str]) -> None:
        """Axes scaled to 0..1 in the logarithm, those without extent left out."""
        axes = np.log2(1 + np.array([[float(p[name]) for name in names] for p in self.points]))
        extent = axes.max(axis=0) - axes.min(axis=0) if axes.size else np.zeros(len(names))
        self.at = (axes[:, extent > 0] - axes[:, extent > 0].min(axis=0)) / extent[extent > 0]
        self.left = set(range(len(self.points)))
        self.seeds = min(len(self.points), self.at.shape[1] + 3)

    def farthest(self) -> int:
        """The cheapest point first, then each time the one farthest from those measured."""
        if not self.seconds:
            return min(self.left, key=lambda i: float(self.at[i].sum()))
        left = sorted(self.left)
        return left[int(np.argmax(self._distance(left)))]

    def unsureness(self, rng: np.random.Generator) -> dict[int, float]:
        """Per point left, or a draw of them: spread of the predictions, plus their usual error by distance."""
        if self.scores is None:
            left, known = sorted(self.left), sorted(self.seconds)
            if len(left) > _SCORED:
                left = sorted(rng.choice(left, _SCORED, replace=False).tolist())
            y = np.log([self.seconds[i] for i in known])
            spread, error = disagreement(self.at[known], y, self.at[left], rng)
            distance = self._distance(left)
            score = spread + error * distance / max(float(distance.max()), 1e-9)
            self.scores = dict(zip(left, score.tolist(), strict=True))
        return self.scores

    def _distance(self, left: list[int]) -> np.ndarray:
        """From each point left to the nearest one measured."""
        apart = self.at[left][:, None, :] - self.at[sorted(self.seconds)][None, :, :]
        return np.asarray(np.sqrt((apart**2).sum(axis=-1)).min(axis=1)) if apart.size else np.zeros(len(left))


def disagreement(x: np.ndarray, y: np.ndarray, at: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Standard deviation of log predictions at `at` [q, d] over folds of x [n, d], y [n], and the usual error on the
    points left out."""
    folds = rng.permutation(len(x)) % min(_FOLDS, len(x))
    predictions, errors = [], [0.0]
    for fold in range(int(folds.max()) + 1 if len(x) > 1 else 0):
        kept = folds != fold
        predicted = _interpolate(x[kept], y[kept], np.vstack([at, x[~kept]]))
        predictions.append(predicted[: len(at)])
        errors += np.abs(predicted[len(at) :] - y[~kept]).tolist()
    return np.std(predictions, axis=0) if predictions else np.zeros(len(at)), float(np.median(errors))


def _interpolate(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """A plane through the points, and what is left of them interpolated linearly along distance."""
    from scipy.interpolate import RBFInterpolator

    design = np.column_stack([np.ones(len(x)), x])
    plane = np.linalg.lstsq(design, y, rcond=None)[0]
    trend = np.column_stack([np.ones(len(at)), at]) @ plane
    if len(x) < 2 or not x.shape[1]:
        return np.asarray(trend)
    return np.asarray(trend + RBFInterpolator(x, y - design @ plane, kernel="linear", degree=0)(at))


def _key(point: Point) -> tuple[Any, ...]:
    return tuple(sorted(point.items()))
