"""Boosted regression trees as plain arrays: what a smooth curve leaves over in tables of thousands of shapes.

Libraries choose kernels and tile sizes per shape, so their times have steps and outliers that no smooth curve follows.
scikit-learn grows the trees; asking them needs numpy alone.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.errors import CalibrationError

TREES, LEAVES, DEPTH, RATE = 100, 63, 8, 0.2  # 300 trees are hardly more accurate on the tables of docs/calibration.md
UNIT = 1000  # leaves are stored in steps of 0.1 %
LEAF = 255  # in place of a feature's number
MAX_NODES = 200_000


class Trees:
    """A sum of trees over `features` [n, f]: go left where features[:, feature] <= threshold.

    thresholds: per feature, ascending; kinds: per node in preorder the feature it asks, or LEAF; cuts: per split the
    number of its threshold; leaves: per leaf its value in steps of 0.1 %.
    """

    def __init__(self, thresholds: list[list[float]], kinds: np.ndarray, cuts: np.ndarray, leaves: np.ndarray) -> None:
        self.thresholds, self.kinds, self.cuts, self.leaves = thresholds, kinds, cuts, leaves
        splits = kinds != LEAF
        if len(kinds) > MAX_NODES or splits.sum() != len(cuts) or len(kinds) - splits.sum() != len(leaves):
            raise CalibrationError("trees: splits and leaves do not fill the nodes")
        asked = kinds[splits]
        if len(asked) and (
            asked.max() >= len(thresholds) or (cuts >= np.array([len(t) for t in thresholds])[asked]).any()
        ):
            raise CalibrationError("trees: a node asks for a feature or threshold there is not")
        self._feature = np.where(splits, kinds, 0).astype(np.intp)
        self._threshold = np.full(len(kinds), math.inf)
        self._threshold[splits] = [thresholds[f][c] for f, c in zip(asked.tolist(), cuts.tolist(), strict=True)]
        self._value = np.zeros(len(kinds))
        self._value[~splits] = leaves / UNIT
        self._roots, right, self._depth = _links(splits.tolist())
        left = np.where(splits, np.arange(len(kinds)) + 1, np.arange(len(kinds)))
        self._next = np.stack([left, right], axis=1).ravel()  # of node i: left at 2 i, right at 2 i + 1

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """[n] sums for `features` [n, f]."""
        rows = np.arange(len(features))[:, None]
        at = np.broadcast_to(self._roots, (len(features), len(self._roots)))
        for _ in range(self._depth):
            right = features[rows, self._feature[at]] > self._threshold[at]
            at = self._next[2 * at + right]
        return np.asarray(self._value[at].sum(axis=1))

    def one(self, features: list[float]) -> float:
        """The sum for one row of features."""
        # NOTE: the same walk as __call__ without the second dimension, which would take twice as long.
        x, at = np.array(features), self._roots
        feature, threshold, following = self._feature, self._threshold, self._next
        for _ in range(self._depth):
            at = following[2 * at + (x[feature[at]] > threshold[at])]
        return float(self._value[at].sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in fit.json: about 20 kB."""
        leaves = self.leaves.astype("<i2").view(np.uint8).reshape(-1, 2)
        raw = self.kinds.tobytes() + self.cuts.tobytes() + leaves.T.tobytes()  # low bytes, then high: packs better
        sizes = [len(self.kinds), len(self.leaves)]
        return {
            "thresholds": self.thresholds,
            "sizes": sizes,
            "nodes": base64.b85encode(zlib.compress(raw, 9)).decode(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trees:
        """Raises CalibrationError, KeyError, TypeError or ValueError where `data` holds no trees."""
        nodes, leaves = map(int, data["sizes"])
        if not 0 < leaves <= nodes <= MAX_NODES:
            raise CalibrationError(f"trees: {nodes} nodes, {leaves} leaves; at most {MAX_NODES}")
        size = nodes + (nodes - leaves) + 2 * leaves
        try:
            raw = zlib.decompressobj().decompress(base64.b85decode(data["nodes"]), size + 1)
        except zlib.error as error:
            raise CalibrationError(f"trees: damaged ({error})") from error
        thresholds = [list(map(float, values)) for values in data["thresholds"]]
        if len(raw) != size or not all(math.isfinite(x) for values in thresholds for x in values):
            raise CalibrationError("trees: nodes or thresholds are not what their sizes say")
        kinds = np.frombuffer(raw, np.uint8, nodes)
        cuts = np.frombuffer(raw, np.uint8, nodes - leaves, nodes)
        values = np.frombuffer(raw, np.uint8, 2 * leaves, 2 * nodes - leaves).reshape(2, leaves)
        return cls(thresholds, kinds, cuts, np.ascontiguousarray(values.T).view("<i2").ravel())


def grow(features: np.ndarray, residual: np.ndarray) -> Trees:
    """Trees for `residual` [n] over `features` [n, f], fitted to the absolute error: outliers are many, and real."""
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError as error:
        raise CalibrationError("large tables need scikit-learn, not installed; pip install 'moesim[fit]'") from error
    model = HistGradientBoostingRegressor(
        loss="absolute_error", max_iter=TREES, max_leaf_nodes=LEAVES, max_depth=DEPTH, learning_rate=RATE,
        min_samples_leaf=5, early_stopping=False, random_state=0,
    ).fit(features, residual)  # fmt: skip
    # The nodes have no public name in scikit-learn; constraints.txt pins the version this was tested with.
    grown = [trees[0].nodes for trees in model._predictors]
    asked: list[set[float]] = [set() for _ in range(features.shape[1])]
    for nodes in grown:
        for node in nodes[nodes["is_leaf"] == 0]:
            asked[node["feature_idx"]].add(_round(node["num_threshold"]))
    thresholds = [sorted(values) for values in asked]
    number = [{value: i for i, value in enumerate(values)} for values in thresholds]
    kinds, cuts, leaves = [LEAF], [], [float(np.ravel(model._baseline_prediction)[0])]
    for nodes in grown:
        todo = [0]
        while todo:
            node = nodes[todo.pop()]
            if node["is_leaf"]:
                kinds.append(LEAF)
                leaves.append(float(node["value"]))
                continue
            feature = int(node["feature_idx"])
            kinds.append(feature)
            cuts.append(number[feature][_round(node["num_threshold"])])
            todo += [int(node["right"]), int(node["left"])]
    values = np.clip(np.rint(np.array(leaves) * UNIT), -32768, 32767).astype(np.int16)
    return Trees(thresholds, np.array(kinds, np.uint8), np.array(cuts, np.uint8), values)


def _round(threshold: float) -> float:
    return round(float(threshold), 4)


def _links(splits: list[bool]) -> tuple[np.ndarray, np.ndarray, int]:
    """Roots, right children (leaves are their own) and the depth of trees in preorder."""
    roots, right, levels = [], list(range(len(splits))), [0] * len(splits)
    waiting: list[int] = []  # splits whose right child is still to come
    whole = True
    for i, split in enumerate(splits):
        if whole:
            roots.append(i)
        elif splits[i - 1]:
            levels[i] = levels[i - 1] + 1
        else:
            parent = waiting.pop()
            right[parent], levels[i] = i, levels[parent] + 1
        if split:
            waiting.append(i)
        whole = not split and not waiting
    if not whole:
        raise CalibrationError("trees: the last is not whole")
    return np.array(roots), np.array(right), max(levels)
