"""Curves from measured rows: physics first, then a lattice on top (docs/calibration.md compares the alternatives).

Physics: overhead + (memory^p + compute^p)^(1/p), memory = bytes / bandwidth and compute = operations / rate, fitted to
the logarithm of the times with a soft L1 loss. The lattice holds log seconds at grid nodes, pulled towards the physics
where no points are; beyond its edges the physics alone says how a time grows, and the curve calls it extrapolated.
Tables of many shapes may get boosted trees on what is left, where that predicts held-out shapes clearly better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from typing import Any

import numpy as np

from moesim.costs.families import ACTIVITIES, Family, Row, family
from moesim.costs.lattice import Lattice, choose_axes, fit_lattice, interpolation_matrix, near_points
from moesim.costs.trees import Trees, grow
from moesim.errors import CalibrationError

MAX_NODES = 12000
SMOOTH = 0.03
TILES = (1, 16, 64)
MIN_POINTS = 3
MIN_COVERED = 0.5  # of a cell's corners, by their weight: with less a shape counts as extrapolated
_MAY_BE_ZERO = ("past", "routed", *ACTIVITIES)
UNIT = 250  # stored residuals are in steps of 0.4 %
MIN_FOR_TREES = 400  # shapes
WORTH_TREES = (0.01, 0.03)  # lower median or P90 of the held-out errors; they cost monotonicity, bytes and time


@dataclass(frozen=True)
class Physics:
    """overhead: seconds; bandwidth: bytes/s; rate: operations/s, infinite where a family has none; sharpness: p."""

    overhead: float
    bandwidth: float
    rate: float
    sharpness: float
    tile: int = 1

    def log_seconds(self, nbytes: Any, flops: Any) -> Any:
        """Natural logarithm of the seconds for plain numbers or arrays."""
        with np.errstate(divide="ignore"):
            memory = self.sharpness * np.log(np.divide(nbytes, self.bandwidth))
            compute = self.sharpness * np.log(np.divide(flops, self.rate))
        return np.logaddexp(math.log(self.overhead), np.logaddexp(memory, compute) / self.sharpness)


@dataclass(frozen=True)
class Curve:
    """Seconds of one variant of a family as a function of its shape.

    axes: node positions as log2; residual: log seconds at the nodes minus the physics there, in steps of 0.4 %;
    covered: the nodes that points lay near, four a hexadecimal digit; errors and band (P10 and P90 of the log of
    measured over predicted) are of shapes held out of the fit. trees: what is added to the log seconds on top; a curve
    without them rises along its axes.
    """

    family: str
    variant: tuple[Any, ...]
    physics: Physics
    axes: tuple[tuple[float, ...], ...]
    residual: tuple[int, ...]
    covered: str
    points: int
    holdout_median_error: float
    p90: float
    band: tuple[float, float]
    trees: Trees | None = None

    def seconds(self, **features: float) -> float:
        """Time of one shape. Raises CalibrationError where a feature is missing or not a number above 0."""
        return self.ask(**features)[0]

    def ask(self, **features: float) -> tuple[float, bool]:
        """Time of one shape, and whether it is extrapolated."""
        fam, row = family(self.family), {**self._variant, **features}
        log_seconds, beyond = self._on_lattice(_place(fam, row, self.physics.tile))
        if self.trees is not None:
            log_seconds += self._on_trees(_place(fam, row, 1), row)
        return math.exp(log_seconds), beyond

    def at(self, point: list[float]) -> tuple[float, bool]:
        """Log seconds at a point given in the axes' log2, and whether it is extrapolated."""
        log_seconds, beyond = self._on_lattice(point)
        if self.trees is not None:
            log_seconds += self._on_trees(point, _row_at(family(self.family), point))
        return log_seconds, beyond

    def _on_trees(self, point: list[float], row: Row) -> float:
        assert self.trees is not None
        return self.trees.one(point + _hints(family(self.family), row))

    def _on_lattice(self, point: list[float]) -> tuple[float, bool]:
        value, covered = self._lattice.at(point)
        if all(axis[0] - 1e-4 <= x <= axis[-1] + 1e-4 for x, axis in zip(point, self.axes, strict=True)):
            return value, covered < MIN_COVERED
        edge = [min(max(x, axis[0]), axis[-1]) for x, axis in zip(point, self.axes, strict=True)]
        return value + self._physics_at(point) - self._physics_at(edge), True

    def work_at(self, point: list[float]) -> tuple[float, float]:
        """Bytes and operations at a point given in the axes' log2."""
        nbytes, flops = _work(family(self.family), self._variant, np.array([point]))
        return float(nbytes[0]), float(flops[0])

    def extrapolates(self, **features: float) -> bool:
        """Whether this shape lies beyond what was measured, or in a gap of it."""
        return self.ask(**features)[1]

    @property
    def range(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of each axis that was measured."""
        names = family(self.family).axis_names
        return {
            name: (_from_log(name, axis[0]), _from_log(name, axis[-1]))
            for name, axis in zip(names, self.axes, strict=True)
        }

    @property
    def name(self) -> str:
        """`gemm bf16 vllm torch`."""
        return " ".join([self.family, *map(str, self.variant)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in fit.json."""
        p = self.physics
        return {
            "family": self.family,
            "variant": list(self.variant),
            "physics": [_short(x) for x in (p.overhead, p.bandwidth, p.rate, p.sharpness)] + [p.tile],
            "axes": [[round(x, 4) for x in axis] for axis in self.axes],
            "points": self.points,
            "holdout_median_error": _short(self.holdout_median_error),
            "p90": _short(self.p90),
            "band": [_short(x) for x in self.band],
            "covered": self.covered,
            "residual": list(self.residual),
            **({"trees": self.trees.to_dict()} if self.trees else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Curve:
        """Raises CalibrationError, KeyError, TypeError or ValueError where `data` is no curve."""
        fam = family(data["family"])
        overhead, bandwidth, rate, sharpness, tile = data["physics"]
        rate = math.inf if rate is None else rate
        axes = tuple(tuple(map(float, axis)) for axis in data["axes"])
        numbers = [overhead, bandwidth, sharpness, *(x for axis in axes for x in axis), *data["band"]]
        if not all(math.isfinite(x) for x in numbers) or min(overhead, bandwidth, rate, sharpness) <= 0:
            raise CalibrationError(f"{fam.name}: a number of the fit is not finite or not above 0")
        if len(axes) != len(fam.axis_names) or any(list(axis) != sorted(set(axis)) or not axis for axis in axes):
            raise CalibrationError(f"{fam.name}: axes must be {', '.join(fam.axis_names)}, each ascending")
        residual = tuple(map(int, data["residual"]))
        if len(residual) != math.prod(len(axis) for axis in axes):
            raise CalibrationError(f"{fam.name}: {len(residual)} residuals do not fill the grid")
        covered = data["covered"]
        int(covered, 16)
        if len(covered) != -(-len(residual) // 4):
            raise CalibrationError(f"{fam.name}: {len(covered)} digits of coverage do not fill the grid")
        if len(data["variant"]) != len(fam.variant):
            raise CalibrationError(f"{fam.name}: variant must give {', '.join(fam.variant)}")
        return cls(
            fam.name,
            tuple(data["variant"]),
            Physics(overhead, bandwidth, rate, sharpness, int(tile)),
            axes,
            residual,
            covered,
            int(data["points"]),
            float(data["holdout_median_error"]),
            float(data["p90"]),
            (float(data["band"][0]), float(data["band"][1])),
            _read_trees(data["trees"], fam) if "trees" in data else None,
        )

    @cached_property
    def _variant(self) -> dict[str, Any]:
        return dict(zip(family(self.family).variant, self.variant, strict=True))

    @cached_property
    def _lattice(self) -> Lattice:
        """Built at first use, and made rising again: rounding may have undone it by a step."""
        work = _work_at_nodes(self.family, self.variant, self.axes)
        values = np.asarray(self.physics.log_seconds(*work)) + np.array(self.residual) / UNIT
        shape = [len(axis) for axis in self.axes]
        values = values.reshape(shape)
        for axis in range(len(shape)):
            values = np.maximum.accumulate(values, axis)
        bits = [digit == "1" for char in self.covered for digit in f"{int(char, 16):04b}"]
        return Lattice([list(axis) for axis in self.axes], values.ravel().tolist(), bits)

    def _physics_at(self, point: list[float]) -> float:
        return float(_physics_at(family(self.family), self._variant, self.physics, np.array([point]))[0])


def _read_trees(data: Mapping[str, Any], fam: Family) -> Trees:
    trees = Trees.from_dict(data)
    wanted = len(fam.axis_names) + len(_hints(fam, _row_at(fam, [1.0] * len(fam.axis_names))))
    if len(trees.thresholds) != wanted:
        raise CalibrationError(f"{fam.name}: trees of {len(trees.thresholds)} features, but it has {wanted}")
    return trees


def fit_rows(rows: Iterable[Row], trees: bool = False) -> list[Curve]:
    """One curve per family and variant; variants with fewer than 3 shapes give none. trees: as in fit_family."""
    groups: dict[tuple[str, tuple[Any, ...]], list[Row]] = {}
    for row in rows:
        fam = family(row["family"])
        groups.setdefault((fam.name, fam.key(row)), []).append(row)
    return [curve for group in groups.values() if (curve := fit_family(group, trees)) is not None]


def fit_family(rows: Sequence[Row], trees: bool = False) -> Curve | None:
    """The curve of rows of one family and variant, None where they hold fewer than 3 shapes.

    trees: try boosted trees on top, which need scikit-learn. Raises CalibrationError where a row is incomplete, of
    another variant, or has a value that cannot be.
    """
    fam, variant, points, hints, log_seconds = _table(rows, trees)
    if len(points) < MIN_POINTS:
        return None
    tiles = TILES if fam.tiled and len(points) >= 20 * len(TILES) else (1,)
    tried = [(_holdout(fam, variant, _tile(fam, points, tile), log_seconds, tile), tile) for tile in tiles]
    errors, tile = min(tried, key=lambda pair: _errors(pair[0])[0])
    tiled = _tile(fam, points, tile)
    features, with_trees, grown = np.hstack([points, hints]), None, None
    if trees and len(points) >= MIN_FOR_TREES:
        with_trees = _holdout(fam, variant, tiled, log_seconds, tile, features)
    physics, axes, values = _fit(fam, variant, tiled, log_seconds, tile)
    if with_trees is not None and _worth_it(_errors(errors), _errors(with_trees)):
        errors = with_trees
        grown = grow(features, log_seconds - interpolation_matrix(axes, tiled) @ values)
    nodes = np.array(list(product(*axes)))
    residual = values - _physics_at(fam, variant, physics, nodes)
    median, p90 = _errors(errors)
    return Curve(
        family=fam.name,
        variant=tuple(variant.values()),
        physics=physics,
        axes=tuple(map(tuple, axes)),
        residual=tuple(np.rint(residual * UNIT).astype(int).tolist()),
        covered=_hexadecimal(near_points(axes, tiled)),
        points=len(points),
        holdout_median_error=median,
        p90=p90,
        band=(float(np.quantile(errors, 0.1)), float(np.quantile(errors, 0.9))),
        trees=grown,
    )


def _errors(logs: np.ndarray) -> tuple[float, float]:
    """Median and P90 of |predicted / measured - 1| from log(measured / predicted)."""
    off = np.abs(np.expm1(-logs))
    return float(np.median(off)), float(np.quantile(off, 0.9))


def _worth_it(plain: tuple[float, float], better: tuple[float, float]) -> bool:
    """Whether either error falls by enough, and the other does not rise by as large a share."""
    gains = [a - b for a, b in zip(plain, better, strict=True)]
    enough = any(gain >= least for gain, least in zip(gains, WORTH_TREES, strict=True))
    return enough and math.prod(better) < math.prod(plain)


def _hexadecimal(flags: np.ndarray) -> str:
    """Four flags a digit, the first in its highest bit."""
    padded = np.concatenate([flags, np.zeros(-len(flags) % 4, bool)]).reshape(-1, 4)
    return "".join(f"{digit:x}" for digit in padded @ [8, 4, 2, 1])


def rescale(curve: Curve, scale: str) -> Curve:
    """The curve at the slow (`low`) or fast (`high`) end of its band, or as it is."""
    if scale == "default":
        return curve
    shift = curve.band[1] if scale == "low" else curve.band[0]
    p, factor = curve.physics, math.exp(shift)
    moved = Physics(p.overhead * factor, p.bandwidth / factor, p.rate / factor, p.sharpness, p.tile)
    return replace(curve, physics=moved)


def faster(curve: Curve, bandwidth: float, rate: float) -> Curve:
    """The curve with bytes and operations so many times as fast; fixed costs, and what is on top, stay as they are."""
    if bandwidth == rate == 1:
        return curve
    p = curve.physics
    return replace(curve, physics=replace(p, bandwidth=p.bandwidth * bandwidth, rate=p.rate * rate))


def _table(rows: Sequence[Row], hinted: bool) -> tuple[Family, dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    """Family, variant, points [n, d] (log2 of the axes), hints [n, h] and the median log seconds of each.

    The points are distinct; if `hinted`, together with their hints.
    """
    fam = family(rows[0]["family"])
    key = fam.key(rows[0])
    merged: dict[tuple[tuple[float, ...], tuple[float, ...]], list[float]] = {}
    for row in rows:
        if row["family"] != fam.name or fam.key(row) != key:
            raise CalibrationError(f"{fam.name}: rows of several families or variants; fit one at a time")
        seconds = row["seconds"]
        if not (isinstance(seconds, (int, float)) and math.isfinite(seconds) and seconds > 0):
            raise CalibrationError(f"{fam.name}: seconds {seconds!r} is not a time above 0")
        at = tuple(_place(fam, row, 1)), tuple(_hints(fam, row)) if hinted else ()
        merged.setdefault(at, []).append(math.log(seconds))
    log_seconds = np.array([float(np.median(values)) for values in merged.values()])
    points, hints = (np.array(part) for part in zip(*merged, strict=True))
    return fam, dict(zip(fam.variant, key, strict=True)), points, hints, log_seconds


def _hints(fam: Family, row: Row) -> list[float]:
    """log2 of what libraries choose kernels by beside the shape."""
    return [math.log2(max(value, 1e-9)) for value in fam.hint(row)] if fam.hint else []


def _row_at(fam: Family, point: Sequence[float]) -> Row:
    """A row with the work of a point given in the axes' log2."""
    values = [_from_log(name, x) for name, x in zip(fam.axis_names, point, strict=True)]
    return fam.row_at(values) if fam.row_at else dict(zip(fam.axis_names, values, strict=True))


def _place(fam: Family, row: Mapping[str, Any], tile: int) -> list[float]:
    """log2 of each axis; `past`, which may be 0, as log2(1 + past)."""
    for column in fam.shape:
        value = row.get(column, fam.constant.get(column))
        least = 0 if column in _MAY_BE_ZERO else 1e-9
        if value is None or not least <= value < math.inf:
            raise CalibrationError(f"{fam.name}: {column} {value!r} must be a number above 0")
    values = fam.place(row) if fam.place else [fam.value(row, column) for column in fam.shape]
    point = []
    for name, value in zip(fam.axis_names, values, strict=True):
        whole = math.ceil(value / tile) * tile if name == fam.tiled and tile > 1 else value
        point.append(math.log2(1 + whole) if name == "past" else math.log2(whole))
    return point


def _from_log(name: str, x: float) -> float:
    return round(2**x - 1 if name == "past" else 2**x, 6)


def _tile(fam: Family, points: np.ndarray, tile: int) -> np.ndarray:
    """`points` with the tiled axis rounded up to whole tiles."""
    if tile == 1:
        return points
    axis = fam.axis_names.index(fam.tiled)
    moved = points.copy()
    moved[:, axis] = np.log2(np.ceil(2 ** points[:, axis] / tile - 1e-9) * tile)
    return moved


def _work(fam: Family, variant: Row, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and operations at `points` [n, d]."""
    pairs = [fam.work({**variant, **_row_at(fam, point)}) for point in points]
    both = np.array(pairs, dtype=float)
    return both[:, 0], both[:, 1]


@lru_cache(maxsize=256)  # the ends of a curve's band share its nodes
def _work_at_nodes(
    name: str, variant: tuple[Any, ...], axes: tuple[tuple[float, ...], ...]
) -> tuple[np.ndarray, np.ndarray]:
    fam = family(name)
    return _work(fam, dict(zip(fam.variant, variant, strict=True)), np.array(list(product(*axes))))


def _physics_at(fam: Family, variant: Row, physics: Physics, points: np.ndarray) -> np.ndarray:
    return np.asarray(physics.log_seconds(*_work(fam, variant, points)))


def _fit(
    fam: Family, variant: Row, points: np.ndarray, log_seconds: np.ndarray, tile: int
) -> tuple[Physics, list[list[float]], np.ndarray]:
    """Physics, lattice axes and log seconds at the nodes."""
    physics = _fit_physics(*_work(fam, variant, points), log_seconds, tile)
    axes = choose_axes(points, min(MAX_NODES, 4 * len(points) + 1000))
    nodes = np.array(list(product(*axes)))
    prior = _physics_at(fam, variant, physics, nodes)
    return physics, axes, fit_lattice(axes, points, log_seconds, prior, list(range(len(axes))), SMOOTH)


def _fit_physics(nbytes: np.ndarray, flops: np.ndarray, log_seconds: np.ndarray, tile: int) -> Physics:
    """Soft-L1 least squares of the log seconds; starts from the best rates seen."""
    from scipy.optimize import least_squares

    seconds = np.exp(log_seconds)
    computes = bool((flops > 0).any())
    start = [math.log(seconds.min()), math.log(np.quantile(nbytes / seconds, 0.9))]
    if computes:
        start += [math.log(np.quantile(flops / seconds, 0.9)), math.log(3.0)]

    def physics(q: Any) -> Physics:
        rate, sharpness = (math.exp(q[2]), math.exp(q[3])) if computes else (math.inf, 1.0)
        return Physics(math.exp(q[0]), math.exp(q[1]), rate, sharpness, tile)

    def error(q: np.ndarray) -> np.ndarray:
        return np.asarray(physics(q).log_seconds(nbytes, flops)) - log_seconds

    low = [start[0] - 12, start[1] - 8] + ([start[2] - 8, 0.0] if computes else [])
    high = [start[0] + 3, start[1] + 8] + ([start[2] + 8, math.log(16)] if computes else [])
    found = least_squares(error, start, bounds=(low, high), loss="soft_l1", f_scale=0.1, max_nfev=200)
    return physics(found.x)


def _holdout(
    fam: Family,
    variant: Row,
    points: np.ndarray,
    log_seconds: np.ndarray,
    tile: int,
    features: np.ndarray | None = None,
) -> np.ndarray:
    """log(measured / predicted) of shapes left out of the fit; with `features` trees of them are grown on top.

    Many shapes: a random half predicts the other. Fewer than 200: ten folds, so that each fit keeps nine tenths.
    """
    shapes, index = np.unique(points, axis=0, return_inverse=True)
    folds = 2 if len(shapes) >= 200 else min(10, len(shapes))
    fold = np.random.default_rng(0).permutation(len(shapes)) % folds
    errors = []
    for left_out in range(1 if folds == 2 else folds):
        out = fold[index.ravel()] == left_out
        physics, axes, values = _fit(fam, variant, points[~out], log_seconds[~out], tile)
        edge = np.clip(points, [axis[0] for axis in axes], [axis[-1] for axis in axes])
        beyond = _physics_at(fam, variant, physics, points[out]) - _physics_at(fam, variant, physics, edge[out])
        left = log_seconds - interpolation_matrix(axes, edge) @ values
        if features is not None:
            left = left - grow(features[~out], left[~out])(features)
        errors.append(left[out] - beyond)
    return np.concatenate(errors)


def _short(value: float) -> float | None:
    """Five significant digits; None for infinity, which JSON lacks."""
    return float(f"{value:.5g}") if math.isfinite(value) else None
