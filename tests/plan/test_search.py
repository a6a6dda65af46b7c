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
def test_pruning_never_discards_the_winner(seed, monkeypatch):
    monkeypatch.setattr(search, "_explained", lambda *given: {})
    choices, asked = drawn(seed)
    pruned, whole = plan(MODEL, choices, asked), plan(MODEL, choices, asked, prune=False)
    assert pruned["best"] == whole["best"]
    assert len(whole["candidates"]) >= len(pruned["candidates"])


def test_no_candidate_exceeds_its_bound():
    choices, asked = drawn(3)
    bounds = {(c.machine.name, c.bits, c.concurrency): b for b, c, _ in search._by_promise(MODEL, choices, asked, {})}
    for row in plan(MODEL, choices, asked, prune=False)["candidates"]:
        assert row["output_throughput"] <= bounds[row["machine"], row["bits"], row["concurrency"]]


def test_the_best_comes_with_its_band_anchors_and_flags():
    result = plan(MODEL, space([machine("l4", 4000)], [32.0], ["LRU", "llama.cpp"], [1]), Asked(4, 6))
    best = result["best"]
    low, high = best["p10_p90"]
    assert low < best["output_throughput"] < high < best["ceiling"]
    assert set(best["anchors"]) == {"all_resident", "no_cache", "lru", "oracle"}
    assert {"machine", "policy", "bits", "concurrency"} <= set(result["pareto"][0])


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
