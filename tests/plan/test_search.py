"""The planner: what it leaves out cannot win, what it names is what replay would say, and nothing is left unsaid."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.errors import WorkloadError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.plan import search
from moesim.plan.search import Asked, plan, space

MODEL = load_model("tiny-moe-8x16")


def machine(name, memory_mib):
    known = load_machine(name)
    return replace(
        known, name=f"{name}-{memory_mib}", gpu=replace(known.gpu, memory_bytes=memory_mib << 20), profile=""
    )


def drawn(seed):
    """A small space and what is asked of it."""
    rng = random.Random(seed)
    machines = [
        machine(name, rng.choice([560, 580, 600, 4000])) for name in rng.sample(["l4", "a10", "rtx-4090", "h100"], 2)
    ]
    policies = rng.sample(["all-resident", "llama.cpp", "KTransformers", "LRU", "Fiddler"], 3)
    choices = space(machines, rng.sample([4.85, 8.5, 32.0], 2), policies, [rng.choice([1, 2, 3])])
    goodput = rng.choice([(), (("tpot", rng.choice([0.5, 1.0, 3.0])),)])
    return choices, Asked(4, 6, goodput, rng.choice(["throughput", "latency"]), seed=1)


@pytest.mark.parametrize("seed", range(50))
def test_what_is_left_out_is_neither_the_best_nor_on_the_front(seed, monkeypatch):
    monkeypatch.setattr(search, "_sure", lambda *given: [])
    monkeypatch.setattr(search, "_explained", lambda *given: {})
    monkeypatch.setattr(search, "_ahead", lambda *given: {})
    choices, asked = drawn(seed)
    pruned, whole = plan(MODEL, choices, asked), plan(MODEL, choices, asked, prune=False)
    assert pruned["best"] == whole["best"]
    assert pruned["pareto"] == whole["pareto"]
    assert len(whole["candidates"]) >= len(pruned["candidates"])


@pytest.mark.parametrize("seed", range(12))
def test_no_candidate_exceeds_its_bound(seed):
    choices, asked = drawn(seed)
    bounds = {tuple(search._named(c).values()): b for b, c, _ in search._by_promise(MODEL, choices, asked, {})}
    for row in plan(MODEL, choices, asked, prune=False)["candidates"]:
        bound = bounds[tuple(search._name_of(row).values())]
        assert row["output_throughput"] <= bound.throughput
        assert row["mean_tpot_ms"] >= bound.tpot_ms


def test_a_dear_machine_that_is_worse_in_all_is_left_out():
    good, poor = machine("h100", 4000), machine("l4", 4000)
    poor = replace(poor, gpu=replace(poor.gpu, hbm_gbps=0.01), prices=replace(poor.prices, usd_per_hour=100.0))
    result = plan(MODEL, space([good, poor], [32.0], ["all-resident"], [2]), Asked(4, 6))
    assert "cannot win" in result["excluded"][0]["reason"] and len(result["candidates"]) == 1


def test_systems_that_change_outputs_are_never_left_out_by_a_bound():
    result = plan(MODEL, space([machine("l4", 4000)], [32.0], ["all-resident", "eMoE"], [1]), Asked(4, 6))
    assert len(result["candidates"]) == 2


@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_best_comes_with_its_band_anchors_and_flags(concurrency):
    result = plan(MODEL, space([machine("l4", 4000)], [32.0], ["LRU", "llama.cpp"], [concurrency]), Asked(4, 6))
    best = result["best"]
    low, high = best["p10_p90"]
    assert low < best["output_throughput"] < high
    assert set(best["anchors"]) == {"all_resident", "no_cache", "lru", "oracle"}
    assert best["output_throughput"] <= best["anchors"]["all_resident"]["output_throughput"] <= best["ceiling"]
    assert {"machine", "policy", "bits", "concurrency"} <= set(result["pareto"][0])
    front = [row for row in result["candidates"] if search._name_of(row) in result["pareto"]]
    assert all("p10_p90" in row and "flags" in row for row in front)


def test_the_next_best_and_whether_costs_may_turn_them_round():
    alike = plan(MODEL, space([machine("l4", 4000)], [32.0], ["all-resident", "llama.cpp"], [1]), Asked(4, 6))
    assert alike["best"]["ahead"] is None  # both are the same, so nothing is behind
    near = plan(MODEL, space([machine("l4", 4000)], [32.0], ["all-resident", "KTransformers"], [1]), Asked(4, 6))
    assert near["best"]["ahead"]["of"]["policy"] == "KTransformers"
    apart = plan(MODEL, space([machine("l4", 4000)], [32.0], ["all-resident", "on-demand"], [1]), Asked(4, 6))
    low, high = apart["best"]["ahead"]["p10_p90"]
    assert 1 < low < apart["best"]["ahead"]["ratio"] < high and apart["best"]["ahead"]["sure"]


def test_several_gpus_are_planned_for_where_they_can_serve():
    choices = space([load_machine("2xh100-sxm")], [32.0], ["all-resident", "LRU"], [2])
    result = plan(MODEL, choices, Asked(4, 6))
    assert result["best"]["policy"] == "all-resident" and "--tensor-parallel-size 2" in result["best"]["flags"]["vLLM"]
    assert result["best"]["usd_per_hour"] == 2 * load_machine("h100-sxm").prices.known
    assert "one GPU" in result["excluded"][0]["reason"]


def test_experts_kept_on_the_gpu_are_in_the_flags():
    policies = ["KTransformers(gpu_experts=1024)", "llama.cpp"]
    result = plan(MODEL, space([machine("l4", 560)], [32.0], policies, [1]), Asked(4, 6))
    flags = {name: line for row in result["candidates"] for name, line in row.get("flags", {}).items()}
    assert "--kt-num-gpu-experts" in flags.get("KTransformers", "--kt-num-gpu-experts")
    assert any("untested" in line for line in flags.values())


def test_a_budget_chooses_machines():
    run = CliRunner().invoke(
        app, ["plan", "--model", "tiny-moe-8x16", "--budget", "0.5", "--random-input-len", "4",
              "--random-output-len", "4", "--policies", "all-resident", "--bits", "32", "--json"]
    )  # fmt: skip
    found = json.loads(run.stdout)
    machines = {row["machine"] for row in [*found["candidates"], *found["excluded"]]}
    assert machines and all(load_machine(name).prices.known <= 0.5 for name in machines)
    run = CliRunner().invoke(app, ["plan", "--model", "tiny-moe-8x16", "--budget", "0.001"])
    assert isinstance(run.exception, WorkloadError) and "no machine costs less" in str(run.exception)


def test_more_bits_than_published_are_one_choice():
    result = plan(MODEL, space([machine("l4", 4000)], [64.0, 99.0], ["all-resident"], [1]), Asked(4, 6))
    assert len(result["candidates"]) == 1 and result["best"]["bits"] == round(MODEL.expert_bits, 2)


def test_money_excludes_with_a_reason():
    dear, unpriced = load_machine("h100"), load_machine("rtx-4090")
    result = plan(MODEL, space([dear, unpriced], [32.0], ["all-resident"], [1]), Asked(4, 6, usd_per_hour=0.5))
    assert result["best"] is None and not result["candidates"]
    reasons = {row["machine"]: row["reason"] for row in result["excluded"]}
    low = plan(MODEL, space([load_machine("l40s")], [32.0], ["all-resident"], [1]), Asked(4, 6, objective="cost"))
    assert low["best"]["usd_per_hour"] == load_machine("l40s").prices.usd_per_hour_low
    assert "over the budget" in reasons["h100-sxm"] and "no price is known" in reasons["rtx-4090"]


def test_the_command():
    words = [
        "plan",
        "--model",
        "tiny-moe-8x16",
        "--machine",
        "l4",
        "--random-input-len",
        "4",
        "--random-output-len",
        "6",
    ]
    run = CliRunner().invoke(app, [*words, "--json"])
    result = json.loads(run.stdout)
    assert run.exit_code == 0 and {"candidates", "best", "excluded"} <= set(result)
    run = CliRunner().invoke(app, [*words, "--goodput", "tpot:0.000001"])
    assert run.exit_code == 3 and "nothing keeps the SLOs" in run.stdout
    run = CliRunner().invoke(app, [*words, "--objective", "speed"])
    assert isinstance(run.exception, WorkloadError) and "unknown objective" in str(run.exception)
