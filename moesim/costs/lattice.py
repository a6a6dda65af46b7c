"""A table of values on a rectangular grid, interpolated multilinearly, and its regression from scattered points.

Lattice regression (Garcia and Gupta, NIPS 2009): the node values whose interpolation fits the points best, kept smooth
where points are few. A lattice whose nodes rise along an axis rises everywhere along it.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise, product
from typing import Any

import numpy as np

PULL = 0.1  # towards the prior, in units of the smoothness: what is far from points returns to the physics
MIN_STEP = 0.45  # of an axis in octaves: finer nodes follow noise


class Lattice:
    """axes: ascending node positions per dimension; values: one per node, last axis fastest; covered: whether points
    lay near a node."""

    __slots__ = ("_strides", "axes", "covered", "values")

    def __init__(self, axes: list[list[float]], values: list[float], covered: list[bool]) -> None:
        self.axes, self.values, self.covered = axes, values, covered
        self._strides = [1] * len(axes)
        for i in range(len(axes) - 2, -1, -1):
            self._strides[i] = self._strides[i + 1] * len(axes[i + 1])

    def at(self, point: list[float]) -> tuple[float, float]:
        """The value at `point`, moved to the nearest edge if outside, and how much of it is covered, 0 to 1."""
        base, steps = 0, []
        for axis, x, stride in zip(self.axes, point, self._strides, strict=True):
            last = len(axis) - 1
            i = bisect_right(axis, x) - 1
            if i < 0 or last == 0:
                continue
            base += min(i, last) * stride
            if i < last and x > axis[i]:
                steps.append(((x - axis[i]) / (axis[i + 1] - axis[i]), stride))
        corners = [(base, 1.0)]
        for share, stride in steps:
            corners = [pair for at, w in corners for pair in ((at, w * (1 - share)), (at + stride, w * share))]
        values, covered = self.values, self.covered
        return sum([values[at] * w for at, w in corners]), sum([w for at, w in corners if covered[at]])


def choose_axes(points: np.ndarray, max_nodes: int) -> list[list[float]]:
    """Node positions for `points` [n, d]: the values that occur, thinned until at most `max_nodes` nodes are left.

    Where room is left, a node halves each gap of one to two octaves, so that the prior's bends are followed there.
    """
    step = MIN_STEP
    while True:
        axes = [_thin(np.unique(column), step) for column in points.T]
        if np.prod([len(axis) for axis in axes]) <= max_nodes:
            break
        step *= 1.15
    for i, axis in enumerate(axes):
        finer = _halve(axis)
        if np.prod([len(other) for other in axes]) / len(axis) * len(finer) <= max_nodes:
            axes[i] = finer
    return axes


def _halve(axis: list[float]) -> list[float]:
    middles = [(a + b) / 2 for a, b in pairwise(axis) if 1.05 < b - a < 2.2]
    return sorted([*axis, *middles])


def _thin(values: np.ndarray, step: float) -> list[float]:
    """Both ends and what lies at least `step` from the last kept value and from the far end."""
    kept, end = [float(values[0])], float(values[-1])
    for value in values[1:-1]:
        if value - kept[-1] >= step and end - value >= step:
            kept.append(float(value))
    return [*kept, end] if end > kept[0] else kept


def fit_lattice(
    axes: list[list[float]],
    points: np.ndarray,
    targets: np.ndarray,
    prior: np.ndarray,
    rising: list[int],
    smooth: float,
) -> np.ndarray:
    """Node values for `targets` at `points` [n, d], close in shape to `prior` (one value per node).

    smooth: weight of the second differences of (values - prior) against one point; rising: axes along which values may
    not fall. Outliers are weighed down as by soft L1.
    """
    matrix = interpolation_matrix(axes, points)
    rough = _differences(axes)
    shape = [len(axis) for axis in axes]
    weights = np.ones(len(targets))
    residual = targets - matrix @ prior
    values = np.zeros(len(prior))
    for _ in range(3):
        values = _solve(matrix, residual, weights, rough, smooth, values)
        error = np.abs(residual - matrix @ values)
        scale = max(float(np.median(error)) * 3, 1e-4)
        weights = 1 / np.sqrt(1 + (error / scale) ** 2)
    mass = np.asarray(matrix.sum(axis=0)).ravel() + 1e-3
    return make_rising((prior + values).reshape(shape), mass.reshape(shape), rising).ravel()


def interpolation_matrix(axes: list[list[float]], points: np.ndarray) -> Any:
    """Sparse [n, nodes]: the multilinear weights of every node for every point, clamped to the grid."""
    from scipy.sparse import csr_matrix

    n, shape = len(points), [len(axis) for axis in axes]
    lower, share = [], []
    for axis, column in zip(axes, points.T, strict=True):
        grid = np.asarray(axis)
        x = np.clip(column, grid[0], grid[-1])
        i = np.clip(np.searchsorted(grid, x, side="right") - 1, 0, max(len(grid) - 2, 0))
        width = grid[i + 1] - grid[i] if len(grid) > 1 else np.ones(n)
        lower.append(i)
        share.append((x - grid[i]) / width if len(grid) > 1 else np.zeros(n))
    columns, weights = [], []
    for corner in product(*((0, 1) if len(axis) > 1 else (0,) for axis in axes)):
        columns.append(np.ravel_multi_index([i + c for i, c in zip(lower, corner, strict=True)], shape))
        weights.append(np.prod([s if c else 1 - s for s, c in zip(share, corner, strict=True)], axis=0))
    rows = np.tile(np.arange(n), len(columns))
    return csr_matrix((np.concatenate(weights), (rows, np.concatenate(columns))), (n, int(np.prod(shape))))


def near_points(axes: list[list[float]], points: np.ndarray) -> np.ndarray:
    """Per node, whether a cell with points is at most one node away along every axis."""
    near = np.asarray((interpolation_matrix(axes, points) > 1e-9).sum(axis=0)).reshape([len(axis) for axis in axes]) > 0
    for axis in range(near.ndim):
        lines = np.moveaxis(near, axis, -1)
        grown = lines.copy()
        grown[..., 1:] |= lines[..., :-1]
        grown[..., :-1] |= lines[..., 1:]
        near = np.moveaxis(grown, -1, axis)
    return np.asarray(near.ravel())


def make_rising(values: np.ndarray, weights: np.ndarray, along: list[int]) -> np.ndarray:
    """`values` moved least, as weighted, until none falls along the axes `along`; a few passes of isotonic regression.

    Repairing one axis may undo another, so a running maximum settles what the passes leave.
    """
    from scipy.optimize import isotonic_regression

    for _ in range(4):
        for axis in along:
            if (np.diff(values, axis=axis) >= 0).all():
                continue
            lines = np.moveaxis(values, axis, -1).copy()
            masses = np.moveaxis(weights, axis, -1)
            for index in np.argwhere((np.diff(lines, axis=-1) < 0).any(axis=-1)):
                at = tuple(index)
                lines[at] = isotonic_regression(lines[at], weights=masses[at]).x
            values = np.moveaxis(lines, -1, axis)
    for axis in along:
        values = np.maximum.accumulate(values, axis)
    return values


def _differences(axes: list[list[float]]) -> Any:
    """Sparse rows of second differences along each axis (first differences where it has two nodes)."""
    from scipy.sparse import csr_matrix, eye, kron, vstack

    blocks = []
    for d, axis in enumerate(axes):
        x = np.asarray(axis)
        if len(x) == 1:
            continue
        if len(x) == 2:
            rows = np.array([[-1.0, 1.0]]) * 0.3
        else:
            left, right = np.diff(x)[:-1], np.diff(x)[1:]
            rows = np.zeros((len(x) - 2, len(x)))
            for i, (a, b) in enumerate(zip(left, right, strict=True)):
                rows[i, i : i + 3] = np.array([1 / a, -1 / a - 1 / b, 1 / b]) * 2 / (a + b) * min(a, b, 1.0)
        before = int(np.prod([len(a) for a in axes[:d]]))
        after = int(np.prod([len(a) for a in axes[d + 1 :]]))
        blocks.append(kron(kron(eye(before), csr_matrix(rows)), eye(after)))
    return vstack(blocks).tocsr() if blocks else None


def _solve(matrix: Any, targets: np.ndarray, weights: np.ndarray, rough: Any, smooth: float, start: np.ndarray) -> Any:
    """Normal equations by conjugate gradients; a pull towards the prior keeps it where no points are near."""
    from scipy.sparse import diags
    from scipy.sparse.linalg import cg

    weighted = matrix.T @ diags(weights)
    normal = weighted @ matrix + PULL * smooth * diags(np.ones(matrix.shape[1]))
    if rough is not None:
        normal = normal + smooth * (rough.T @ rough)
    scale = diags(1 / normal.diagonal())
    return cg(normal, weighted @ targets, x0=start, rtol=1e-4, maxiter=600, M=scale)[0]
