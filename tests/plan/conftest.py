"""A small sweep: a trace and a model in files, and points over them."""

from __future__ import annotations

from typing import Any

import pytest

from moesim.plan.spec import Point, points_of


@pytest.fixture
def base(trace_file, small_config) -> dict[str, Any]:
    return {"trace": str(trace_file), "model": str(small_config)}


@pytest.fixture
def points(base) -> list[Point]:
    """Of 12 points, 4 share one prediction, 3 are refused (9 slots of 8 experts)."""
    return points_of({"base": base, "grid": {"policy": ["LRU", "oracle", "LFU"], "slots_per_layer": [1, 2, 4, 9]}})
