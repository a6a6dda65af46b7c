"""What would help: gains agree with where the critical path goes, and every change is one that it says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from moesim.errors import WorkloadError
from moesim.machine import load_machine
from moesim.question import Question, run
from moesim.systems import load_system
from moesim.whatif import _gain_band, format_whatif, whatif
from tests.conftest import small_trace


@pytest.fixture
def ask(small_config):
    def answer(policy="on-demand", by=0.1, metric="output_throughput", **question):
        question = {"model": str(small_config), "machine": "rtx-4090"} | question
        return whatif(small_trace(), load_system(policy), Question(**question), by, metric, shown=False)

    return answer


def changes(result, kind="scaled"):
    return {row["resource"]: row for row in result["changes"] if row["kind"] == kind}


def test_the_base_is_what_replay_says(ask, small_config):
    metrics = run(small_trace(), "LRU", Question(model=str(small_config), slots_per_layer=4), anchors=False).summary
    assert ask("LRU", slots_per_layer=4)["base"]["value"] == metrics["metrics"]["output_throughput"]


def test_the_gain_of_a_faster_link_agrees_with_the_critical_path(ask, small_config):
    """Time saved is 1 - 1/1.1 of the copies' wait at least, and of the time the link is busy at most: what compute
    hides of a copy shrinks with it."""
    card = load_machine("rtx-4090")
    machine = replace(card, pcie=replace(card.pcie, overhead_us=0.0))
    row = changes(ask(machine=machine))["PCIe"]
    question = Question(model=str(small_config), machine=machine)
    limits = run(small_trace(), "on-demand", question, anchors=False).summary["bottleneck"]
    assert row["critical_share"] == limits["critical_path"]["pcie"] > 0.1
    saved = 1 - 1 / (1 + row["gain"])
    assert row["critical_share"] <= saved / (1 - 1 / 1.1) + 1e-4
    assert saved / (1 - 1 / 1.1) <= limits["utilisation"]["h2d"] + 1e-4


def test_what_a_run_does_not_use_gains_nothing(ask):
    rows = changes(ask())
    for resource in ("NVMe", "CPU cores", "host memory"):
        assert rows[resource]["gain"] == 0 and not rows[resource]["significant"]


def test_cpu_experts_gain_by_host_memory_bandwidth_and_not_by_the_link(ask):
    rows = changes(ask("KTransformers", slots_per_layer=2))
    assert rows["PCIe"]["gain"] == pytest.approx(0, abs=1e-6)
    assert rows["host DRAM"]["gain"] + rows["CPU cores"]["gain"] > 0


def test_faster_resources_never_lose_and_more_helps_more(ask):
    once, twice = changes(ask()), changes(ask(by=1.0))
    for name, row in once.items():
        assert row["gain"] >= 0 and twice[name]["gain"] >= row["gain"]


def test_a_time_gains_by_falling(ask):
    row = changes(ask(metric="mean_tpot_ms"))["PCIe"]
    assert row["gain"] > 0


def test_changes_are_sorted_by_gain_and_bands_hold_their_gain(ask):
    result = ask("LRU", slots_per_layer=4)
    gains = [row["gain"] for row in result["changes"]]
    assert gains == sorted(gains, reverse=True)
    assert all(row["gain_p10_p90"][0] <= row["gain"] <= row["gain_p10_p90"][1] for row in result["changes"])
    policies = [row["what"] for row in result["changes"] if row["kind"] == "policy"]
    assert "LFU" in policies and "LRU" not in policies


def test_a_perfect_predictor_is_tried_where_there_is_one(ask):
    row = changes(ask("ProMoE", slots_per_layer=4), "policy")["predictor recall"]
    assert row["what"] == "never wrong, 1 layer ahead" and row["gain"] > 0
    for without in ("LRU", "DeepSpeed"):  # DeepSpeed brings whole layers and predicts nothing
        assert "predictor recall" not in [r["resource"] for r in ask(without, slots_per_layer=4)["changes"]]


def test_one_memory_has_no_link(ask):
    rows = changes(ask(machine="strix-halo"))
    assert "memory bandwidth" in rows and "PCIe" not in rows


def test_bad_questions_are_refused(ask):
    with pytest.raises(WorkloadError, match="mean_tpot_ms"):
        ask(metric="tpot")
    with pytest.raises(WorkloadError, match="--by"):
        ask(by=0.0)


def test_a_profile_is_used_and_its_parts_are_made_faster(ask, small_config):
    result = ask(machine="h100-sxm")
    metrics = run(small_trace(), "on-demand", Question(model=str(small_config), machine="h100-sxm"), anchors=False)
    assert result["base"]["value"] == metrics.summary["metrics"]["output_throughput"]
    assert "h100" in result["notes"][-1] and "measured curves" in result["notes"][-1]
    rows = changes(result)
    assert rows["PCIe"]["gain"] > 0 and rows["HBM"]["gain"] > 0


@pytest.mark.parametrize(
    ("gain", "ends", "band"),
    [
        (0.02, [0.01, 0.04], (0.01, 0.04)),  # in between, as any prediction's band
        (-0.02, [-0.01, -0.04], (-0.04, -0.01)),
        (0.02, [-0.01, 0.05, 0.06], (-0.01, 0.07)),  # may be a loss: 0.03 down, 0.03 and 0.04 up
        (0.0, [0.0, 0.0], (0.0, 0.0)),
    ],
)
def test_p10_and_p90_of_a_gain(gain, ends, band):
    assert _gain_band(gain, ends) == pytest.approx(band)


def test_the_command(call, trace_file, small_config):
    asked = ("whatif", trace_file, "--model", small_config, "--slots-per-layer", 4)
    code, out, err = call(*asked, "--json")
    assert code == 0 and not err and call(*asked, "--json")[1] == out
    assert {"metric", "base", "changes"} <= set(json.loads(out))
    code, out, _ = call(*asked)
    assert code == 0 and "PCIe: +10 %" in out and format_whatif(json.loads(call(*asked, "--json")[1])) == out.rstrip()
