"""What a sweep shows is what its rows say."""

from __future__ import annotations

import json

import pytest

from moesim.errors import SweepError
from moesim.plan.spec import points_of
from moesim.plan.sweep import sweep
from moesim.plan.view import best_along, figures, higher_is_better, text, to_dict, view
from tests.plan.test_sweep import Here


@pytest.fixture
def folder(base, tmp_path):
    grid = {"policy": ["oracle", "LRU"], "slots_per_layer": [4, 1, 9], "eviction.scope": ["layer", "global"]}
    sweep(points_of({"base": base, "grid": grid}), tmp_path / "s", Here())
    return tmp_path / "s"


def test_the_axes_are_what_varied_and_the_best_comes_first(folder):
    found = view(folder)
    assert found.axes == {
        "policy": ["LRU", "oracle"],
        "slots_per_layer": [1, 4, 9],
        "eviction.scope": ["global", "layer"],
    }
    speeds = [row["output_throughput"] for row in found.ranked]
    assert speeds == sorted(speeds, reverse=True)
    assert len(speeds) == 8
    assert [row["slots_per_layer"] for row in found.unanswered] == [9] * 4
    slow = view(folder, "mean_tpot_ms")
    assert [row["mean_tpot_ms"] for row in slow.ranked] == sorted(row["mean_tpot_ms"] for row in slow.ranked)
    assert higher_is_better("hit_rate")
    assert not higher_is_better("h2d_bytes")


def test_the_best_along_an_axis(folder):
    found = view(folder)
    best = best_along(found, "slots_per_layer")
    assert list(best) == [1, 4]
    for value, row in best.items():
        rivals = [r for r in found.ranked if r["slots_per_layer"] == value]
        assert row["output_throughput"] == max(r["output_throughput"] for r in rivals)
    with pytest.raises(SweepError, match="no axis of this sweep; did you mean 'slots_per_layer'"):
        best_along(found, "slots")
    with pytest.raises(SweepError, match="no such metric"):
        view(folder, "speed")


def test_text_and_json_name_what_has_no_answer(folder):
    found = view(folder)
    printed = text(found, "policy", 3)
    assert printed.startswith("12 points, by output_throughput (highest first)")
    assert "REFUSED: 4 points without an answer, 1 reasons, such as: slots per layer 9" in printed
    body = to_dict(found, 3)
    assert (len(body["ranking"]), len(body["unanswered"]), body["points"]) == (3, 4, 12)
    json.dumps(body)


def test_figures_show_every_point_and_join_the_best(folder):
    lines, bars = figures(view(folder), None)
    joined = {t.name: t for t in lines.data if t.mode == "lines+markers"}
    clouds = {t.name: t for t in lines.data if t.mode == "markers"}
    assert set(joined) == set(clouds) == {"LRU", "oracle"}
    for name, line in joined.items():
        assert list(line.x) == [1, 4]
        cloud = clouds[name]
        assert line.y[0] == max(y for x, y in zip(cloud.x, cloud.y, strict=True) if x == 1)
    assert len(bars.data[0].x) == 8
    assert list(bars.data[0].x) == sorted(bars.data[0].x, reverse=True)
    by_name, _ = figures(view(folder), "eviction.scope")
    assert by_name.layout.xaxis.type == "category"


def test_sweep_and_show_on_the_command_line(base, tmp_path, call):
    spec, out, page = tmp_path / "s.yaml", tmp_path / "out", tmp_path / "p.html"
    spec.write_text(json.dumps({"base": base, "grid": {"policy": ["LRU", "LFU"]}}))
    command = ["sweep", str(spec), "--set", "slots-per-layer=1,2", "-o", str(out), "--jobs", "1"]
    code, printed, _ = call(*command, "--json")
    assert (code, json.loads(printed)["points"], json.loads(printed)["before"]) == (0, 4, 0)
    code, printed, _ = call(*command)
    assert code == 0
    assert printed.splitlines() == [f"{out}: 4 points, 0 of them run now", f"moesim sweep show {out}"]
    code, printed, _ = call("sweep", "show", str(out), "--plot", str(page), "--json")
    assert (code, json.loads(printed)["points"]) == (0, 4)
    assert "The best 4 points" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "rai"], "did you mean 'ray'?"),
        (["--address", "x:1"], "needs --executor ray"),
        (["--executor", "ray", "--jobs", "2"], "leave it out"),
        (["--set", "polcy=LRU"], "did you mean 'policy'?"),
        (["--set", "policy=LRX"], "did you mean 'LRU'?"),
    ],
)
def test_wrong_options_are_refused(base, tmp_path, call, arguments, message):
    axes = [] if "policy=LRX" in arguments else ["--set", f"model={base['model']}"]
    code, _, err = call("sweep", base["trace"], *axes, *arguments, "-o", str(tmp_path / "o"))
    assert code == 2
    assert message in err


def test_a_sweep_without_any_answer_fails(base, tmp_path, call):
    axes = ["--set", f"model={base['model']}", "--set", "slots_per_layer=9"]
    code, printed, _ = call("sweep", base["trace"], *axes, "-o", str(tmp_path / "o"), "--jobs", "1")
    assert code == 1
    assert "slots per layer 9" in printed
