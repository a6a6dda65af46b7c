"""What a sweep asks, from YAML or the command line, becomes exactly the points it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.errors import SweepError
from moesim.plan.spec import MAX_BYTES, Point, points_of, read_spec, with_axes
from moesim.question import Question

BASE = {"trace": "t.parquet"}


def test_a_grid_is_the_product_of_its_axes_over_the_base():
    spec = {"base": {**BASE, "seed": 3}, "grid": {"policy": ["LRU", "LFU"], "slots_per_layer": [2, 4]}}
    assert points_of(spec) == [
        Point(Path("t.parquet"), policy, (), Question(slots_per_layer=slots, seed=3))
        for policy in ("LRU", "LFU")
        for slots in (2, 4)
    ]


def test_listed_runs_come_first_and_nothing_comes_twice():
    runs = [{"policy": "LRU", "slots_per_layer": 2}, {"policy": "oracle"}]
    points = points_of({"base": BASE, "runs": runs, "grid": {"policy": ["LRU"], "slots_per_layer": [2, 4]}})
    assert [(p.policy, p.question.slots_per_layer) for p in points] == [("LRU", 2), ("oracle", None), ("LRU", 4)]
    assert len(points_of({"base": BASE, "runs": runs})) == 2
    assert len(points_of({"base": BASE})) == 1


def test_names_as_people_write_them():
    spec = {"base": BASE, "grid": {"system": "LRU", "memory": "8GiB", "batch": 4, "precision": 4, "slo": "none"}}
    (point,) = points_of(spec | {"anchors": True})
    assert point.question == Question(expert_memory=8 << 30, max_concurrency=4)
    assert (point.policy, point.settings, point.anchors) == ("LRU", ("expert_bits=4",), True)
    (point,) = points_of({"base": {**BASE, "--max-num-seqs": "8", "request-rate": "inf", "placement.pinned": True}})
    assert point.question == Question(max_num_seqs=8, request_rate=float("inf"))
    assert point.settings == ("placement.pinned=true",)


def test_axes_of_the_command_line_replace_those_of_the_file():
    spec = with_axes({"base": BASE, "grid": {"batch": [1], "seed": [0, 1]}}, ["max-concurrency=2,4"])
    assert [(p.question.max_concurrency, p.question.seed) for p in points_of(spec)] == [(2, 0), (4, 0), (2, 1), (4, 1)]
    spec = with_axes({"base": BASE}, ["policy=eMoE(variant='E', period=2),LRU"])
    assert [p.policy for p in points_of(spec)] == ["eMoE(variant='E', period=2)", "LRU"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"grids": {}}, "unknown part 'grids'; did you mean 'grid'?"),
        ({"grid": {"slots_per_layr": [1]}}, "unknown key 'slots_per_layr'; did you mean 'slots_per_layer'?"),
        ({"grid": {"evicton.scope": ["layer"]}}, "unknown key 'evicton.scope'; did you mean 'eviction'?"),
        ({"grid": {"seed": ["two"]}}, "seed: 'two' must be a whole number"),
        ({"grid": {"chunk": [True]}}, "chunk: 'True' must be a whole number"),
        ({"grid": {"prefix_cache": ["maybe"]}}, "prefix_cache: 'maybe' must be true or false"),
        ({"grid": {"prefix_cache": [1]}}, "prefix_cache: '1' must be true or false"),
        ({"grid": {"burstiness": ["x"]}}, "burstiness: 'x' must be a number"),
        ({"grid": {"seed": [None]}}, "seed: cannot be none"),
        ({"grid": {"memory": ["lots"]}}, "expert_memory 'lots': not a size"),
        ({"grid": {"seed": []}}, "grid: seed has no values"),
        ({"grid": {"batch": [1], "max-concurrency": [2]}}, "max-concurrency is given twice"),
        ({"grid": {"seed": [[1, 2]]}}, "must be one plain value"),
        ({"base": {"seed": [1, 2]}}, "lists belong under 'grid'"),
        ({"grid": ["seed"]}, "grid: must be a mapping"),
        ({"runs": {"seed": 1}}, "runs: must be a list of mappings"),
        ({"runs": ["LRU"]}, "runs, item 1: must be a mapping"),
        ({"anchors": "yes"}, "anchors: 'yes' must be true or false"),
        ({"grid": {"seed": list(range(400)), "chunk": list(range(400))}}, "160000 points, at most 100000"),
        ({"grid": {"max_num_seqs": [0]}}, "--max-num-seqs 0 must be at least 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(spec, message):
    with pytest.raises(SweepError) as error:
        points_of({"base": BASE} | spec if "base" not in spec else spec, "s.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("s.yaml: ")


def test_a_sweep_needs_a_trace():
    with pytest.raises(SweepError, match="no trace"):
        points_of({"grid": {"seed": [1]}})


@pytest.mark.parametrize("axis", ["policy", "policy=", "=LRU"])
def test_an_axis_needs_a_key_and_values(axis):
    with pytest.raises(SweepError):
        with_axes({}, [axis])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"grid: [", "not YAML"),
        (b"- 1", "must be a mapping"),
        (b"base: !!python/object/apply:os.getcwd []", "not YAML"),
        (b"#" * (MAX_BYTES + 1), "larger than"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_a_file_that_is_no_specification(tmp_path, text, message):
    path = tmp_path / "s.yaml"
    path.write_bytes(text)
    with pytest.raises(SweepError, match=message):
        read_spec(path)
