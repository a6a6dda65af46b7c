"""Which fit predicts shapes it did not see: physics alone, neighbours, boosted trees, or a lattice on the physics.

    python benchmarks/fit_candidates.py DIR [CANDIDATE ...]    # DIR: AIConfigurator's folder of one system: h200_sxm

Prints a Markdown table of absolute errors, median / P90 in %, for three splits: a random half of the shapes predicts
the other; whole matrices (or models, or head counts) are left out; 60 shapes predict the rest. Trees need scikit-learn.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moesim.costs import fit
from moesim.costs.families import Family
from moesim.costs.lattice import interpolation_matrix
from moesim.costs.trees import grow
from moesim.profile_import import aiconfigurator

TABLES = {
    "gemm": "gemm/vllm/*/gemm_perf.parquet",
    "grouped": "moe/vllm/*/moe_perf.parquet",
    "attention_decode": "attention/vllm/*/generation_attention_perf.parquet",
}
WHOLE = {
    "gemm": (1, 2),
    "grouped": (2, 3),
    "attention_decode": (2, 3),
}  # axes that make a matrix, a model, a head count


class Task:
    """Points [n, d] in log2 of the axes and log seconds, with the physics at any point."""

    def __init__(self, rows: list[dict]) -> None:
        self.fam: Family
        self.fam, self.variant, self.points, self.hints, self.log_seconds = fit._table(rows, hinted=True)

    def physics(self, train: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        work = fit._work(self.fam, self.variant, self.points[train])
        found = fit._fit_physics(*work, self.log_seconds[train], 1)
        return lambda points: fit._physics_at(self.fam, self.variant, found, points)


def physics_alone(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return task.physics(train)(task.points[test])


def nearest(task: Task, train: np.ndarray, test: np.ndarray, neighbours: int = 1) -> np.ndarray:
    """Physics times the residual of the nearest shapes, by inverse distance."""
    from scipy.spatial import cKDTree

    prior = task.physics(train)
    residual = task.log_seconds[train] - prior(task.points[train])
    distance, index = cKDTree(task.points[train]).query(task.points[test], k=neighbours)
    weight = 1 / (distance.reshape(len(distance), -1) + 1e-3)
    picked = residual[index].reshape(len(distance), -1)
    return prior(task.points[test]) + (weight * picked).sum(1) / weight.sum(1)


def eight_nearest(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return nearest(task, train, test, min(8, int(train.sum())))


def boosted(task: Task, train: np.ndarray, test: np.ndarray, on_physics: bool = False) -> np.ndarray:
    """Monotone gradient-boosted trees on the log time, or trees on the residual of the physics."""
    from sklearn.ensemble import HistGradientBoostingRegressor

    prior = task.physics(train) if on_physics else lambda points: np.zeros(len(points))
    trees = HistGradientBoostingRegressor(
        max_iter=500, max_leaf_nodes=63, learning_rate=0.1, min_samples_leaf=5, random_state=0,
        monotonic_cst=None if on_physics else [1] * task.points.shape[1],
    )  # fmt: skip
    trees.fit(task.points[train], task.log_seconds[train] - prior(task.points[train]))
    return prior(task.points[test]) + trees.predict(task.points[test])


def boosted_residual(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    return boosted(task, train, test, on_physics=True)


def lattice(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """What moesim uses for few shapes, without its choice of tile."""
    predicted = on_lattice(task, train)
    return predicted[test]


def lattice_and_trees(task: Task, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """What moesim uses for many shapes where the trees pay, without its choice of tile."""
    predicted = on_lattice(task, train)
    if train.sum() < fit.MIN_FOR_TREES:
        return predicted[test]
    features = np.hstack([task.points, task.hints])
    return predicted[test] + grow(features[train], task.log_seconds[train] - predicted[train])(features[test])


def on_lattice(task: Task, train: np.ndarray) -> np.ndarray:
    """Log seconds of all points from a fit to the training ones."""
    physics, axes, values = fit._fit(task.fam, task.variant, task.points[train], task.log_seconds[train], 1)
    edge = np.clip(task.points, [axis[0] for axis in axes], [axis[-1] for axis in axes])
    beyond = [fit._physics_at(task.fam, task.variant, physics, at) for at in (task.points, edge)]
    return interpolation_matrix(axes, edge) @ values + beyond[0] - beyond[1]


CANDIDATES = {
    "physics alone": physics_alone,
    "physics x nearest neighbour": nearest,
    "physics x 8 neighbours": eight_nearest,
    "boosted trees, monotone": boosted,
    "physics x boosted trees": boosted_residual,
    "physics x lattice": lattice,
    "physics x lattice x boosted trees": lattice_and_trees,
}


def splits(task: Task) -> Iterator[tuple[str, np.ndarray]]:
    """Name and training mask of each split."""
    rng = np.random.default_rng(0)
    count = len(task.points)
    yield "half", rng.random(count) < 0.5
    _, group = np.unique(task.points[:, WHOLE[task.fam.name]], axis=0, return_inverse=True)
    yield "whole left out", (rng.random(group.max() + 1) < 0.8)[group.ravel()]
    few = np.zeros(count, bool)
    few[rng.choice(count, 60, replace=False)] = True
    yield "60 points", few


def main(folder: Path, names: list[str]) -> None:
    print("| table | split | " + " | ".join(names) + " |")
    print("|---|---|" + "--:|" * len(names))
    for pattern in TABLES.values():
        path = sorted(folder.glob(pattern))[-1]
        groups: dict[tuple, list[dict]] = {}
        for rows in aiconfigurator.read(path).rows:
            for row in rows:
                groups.setdefault((row["family"], row["dtype"], row["kernel"], row.get("window", 0)), []).append(row)
        for key in sorted(groups, key=lambda k: -len(groups[k]))[:2]:
            task = Task(groups[key])
            for split, train in splits(task):
                cells = []
                for candidate in (CANDIDATES[name] for name in names):
                    started = time.perf_counter()
                    off = np.abs(np.expm1(candidate(task, train, ~train) - task.log_seconds[~train]))
                    seconds = time.perf_counter() - started
                    cells.append(f"{100 * np.median(off):.1f} / {100 * np.quantile(off, 0.9):.0f} ({seconds:.1f} s)")
                print(f"| {' '.join(map(str, key[:3]))} | {split} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(CANDIDATES))
