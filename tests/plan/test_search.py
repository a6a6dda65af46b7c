"""The planner: what it leaves out cannot win, what it names is what replay would say, and nothing is left unsaid."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.engine.simulate import ceiling
from moesim.errors import WorkloadError
from moesim.machine import load_machine
from moesim.metrics import throughput_metrics
from moesim.model import load_model
from moesim.plan import search
from moesim.plan.flags import flags
from moesim.plan.search import POLICIES, Asked, Space, plan
from moesim.question import Question, Scene, run
from moesim.systems import load_system
from moesim.trace.assumed import distinct_routing, pool_routing

MODEL = load_model("tiny-moe-8x16")


def machine(name, memory_mib):
    known = load_machine(name)
    return replace(
        known, name=f"{name}-{memory_mib}", gpu=replace(known.gpu, memory_bytes=memory_mib << 20), profile=""
    )


def drawn(seed):
    """A small space and what is asked of it; KV caches of long prompts take as much as an expert of every layer."""
    rng = random.Random(seed)
    prompt, sizes = rng.choice([(4, [560, 580, 600, 4000]), (300, [557, 562, 568, 4000])])
    machines = [machine(name, rng.choice(sizes)) for name in rng.sample(["l4", "a10", "rtx-4090", "h100"], 2)]
    if rng.random() < 0.3:  # so slow that some of the space is left out
        slow = replace(machines[1].gpu, hbm_gbps=rng.choice([0.1, 1.0, 5.0]))
        machines[1] = replace(machines[1], gpu=slow)
    policies = rng.sample([*POLICIES, "LRU", "Fiddler", "on-demand", "oracle", "MoE-Infinity"], 3)
    concurrency = sorted(rng.sample([1, 2, 3], 2))
    shares = [1.0, *rng.sample([0.6, 0.4, 0.2], rng.choice([1, 2]))]
    choices = Space(machines, rng.sample([4.85, 8.5, 32.0], 2), policies, concurrency, shares)
    goodput = rng.choice([(), (("tpot", rng.choice([0.5, 1.0, 3.0])),), (("ttft", rng.choice([1.0, 5.0])),)])
    return choices, Asked(prompt, 6, goodput, rng.choice(["throughput", "latency", "cost"]), seed=1)


SIMULATED = {}


@pytest.fixture
def unexplained(monkeypatch):
    """Only what is searched, and nothing simulated twice; bands and anchors take most of the time."""
    simulated = search._simulated

    def once(asking, choice):
        key = choice, asking.asked.goodput
        if key not in SIMULATED:
            SIMULATED[key] = simulated(asking, choice)
        row, reason = SIMULATED[key]
        return row and dict(row), reason

    monkeypatch.setattr(search, "_simulated", once)
    monkeypatch.setattr(search, "_sure", lambda *given: [])
    monkeypatch.setattr(search, "_explained", lambda *given: {})
    monkeypatch.setattr(search, "_difference", lambda *given: {})


@pytest.mark.parametrize("seed", range(50))
def test_pruning_never_discards_the_winner_nor_any_of_the_front(seed, unexplained):
    choices, asked = drawn(seed)
    for objective in search.OBJECTIVES:
        asked = replace(asked, objective=objective)
        pruned, whole = plan(MODEL, choices, asked), plan(MODEL, choices, asked, prune=False)
        assert pruned["best"] == whole["best"]
        assert pruned["pareto"] == whole["pareto"]
        assert len(whole["candidates"]) >= len(pruned["candidates"])


@pytest.mark.parametrize("seed", range(50))
def test_no_candidate_exceeds_its_bound(seed, unexplained):
    choices, asked = drawn(seed)
    asking = search._Asking(MODEL, replace(asked, objective="latency"))
    known = search.Search(asking, True, lambda: None)
    bounds = {
        tuple(search._named(choice).values()): known.promise(choice)[0]
        for choice in search._different(asking, choices.choices())
    }
    rows = plan(MODEL, choices, asking.asked, prune=False)["candidates"]
    assert any(math.isfinite(bounds[tuple(search._name_of(row).values())].throughput) for row in rows)
    for row in rows:
        bound = bounds[tuple(search._name_of(row).values())]
        assert row["output_throughput"] <= bound.throughput
        assert row["mean_tpot_ms"] >= bound.tpot_ms


def test_some_of_the_spaces_divide_memory_otherwise():
    """Or the two tests above would say nothing of it."""
    drawn_choices = [(search._Asking(MODEL, drawn(seed)[1]), drawn(seed)[0].choices()) for seed in range(50)]
    divided = [any(c.kv_share < 1 for c in search._different(*given)) for given in drawn_choices]
    assert sum(divided) >= 10


def tight(**kind):
    """LRU with three long requests where their KV caches take half of what is left, or a third of that."""
    choices = Space([machine("l4", 560)], [32.0], ["LRU"], [3], [1.0, 0.3])
    return plan(MODEL, choices, Asked(300, 6, **kind), prune=False)


def test_memory_for_fewer_requests_is_more_for_experts():
    result = tight()
    whole, divided = sorted(result["candidates"], key=lambda row: -row["kv_share"])
    assert whole["slots_per_layer"] == 2 and divided["slots_per_layer"] == 5
    assert divided["expert_bytes"] > whole["expert_bytes"] and divided["kv_bytes"] < whole["kv_bytes"]
    assert divided["mean_tpot_ms"] < whole["mean_tpot_ms"]
    # replay says the same of the division that the row names
    trace = search._Asking(MODEL, Asked(300, 6)).trace(search.Choice(machine("l4", 560), 32.0, "LRU", 3))
    question = Question(
        model=MODEL, machine=machine("l4", 560), max_concurrency=3, expert_memory=divided["expert_bytes"]
    )
    same = run(trace, "LRU", question, anchors=False).summary["metrics"]
    assert divided["output_throughput"] == same["output_throughput"]


def test_a_division_that_gives_experts_little_more_is_none():
    choices = Space([machine("l4", 4000)], [32.0], ["LRU", "on-demand", "all-resident"], [3], [1.0, 0.3])
    result = plan(MODEL, choices, Asked(300, 6))
    assert {row["kv_share"] for row in [*result["candidates"], *result["excluded"]]} == {1.0}


def test_flags_are_for_the_requests_that_have_memory():
    asking = search._Asking(MODEL, Asked(300, 6))
    lines = []
    for share in (1.0, 0.3):
        (choice,) = search._different(asking, [search.Choice(machine("l4", 562), 32.0, "llama.cpp", 3, share)])
        assert choice.kv_share == share
        lines.append(flags(choice.system, asking.scene(choice), 32.0, True)["llama.cpp"])
    assert "-np 3 -c 918 " in lines[0] and "-np 1 -c 306 " in lines[1]


def test_a_cpu_that_is_faster_than_the_gpu_is_in_the_bound():
    """The GPU alone would bound what CPU and GPU together exceed."""
    card = machine("l4", 4000)
    weak = replace(card, gpu=replace(card.gpu, hbm_gbps=0.5), host=replace(card.host, dram_gbps=400.0, cores=64))
    choice = search.Choice(weak, 32.0, "KTransformers", 1)
    asking = search._Asking(MODEL, Asked(4, 6))
    row, _ = search._simulated(asking, choice)
    scene, system = asking.scene(choice), load_system("KTransformers")
    alone = throughput_metrics(ceiling(scene.setting(system, scene.ledger(system))))["output_throughput"]
    assert alone < row["output_throughput"] <= search._bound(asking, choice, {})[0].throughput


def test_measured_curves_and_requests_that_arrive_in_time_have_no_bound(tmp_path):
    asking = search._Asking(MODEL, Asked(4, 6))
    measured = load_machine("h100")
    assert measured.profile
    assert search._bound(asking, search.Choice(measured, 32.0, "all-resident", 1), {}) == (search.ANYTHING, None)
    timed = tmp_path / "timed.csv"
    timed.write_text("arrival_s,prompt_tokens,output_tokens\n0,4,6\n0.001,4,6\n")
    asking = search._Asking(MODEL, Asked(workload=timed))
    assert search._bound(asking, search.Choice(machine("l4", 4000), 32.0, "LRU", 1), {}) == (search.ANYTHING, None)


def test_one_request_at_a_time_is_on_the_front_for_its_tpot():
    result = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["all-resident"], [1, 3]), Asked(4, 6))
    assert result["best"]["concurrency"] == 3 and [row["concurrency"] for row in result["pareto"]] == [3, 1]


def test_an_unknown_price_is_not_free():
    cheap, unpriced = machine("l4", 4000), machine("rtx-4090", 4000)
    result = plan(MODEL, Space([cheap, unpriced], [32.0], ["all-resident"], [1]), Asked(4, 6))
    assert {row["machine"] for row in result["pareto"]} == {cheap.name, unpriced.name}


def test_a_workload_file_is_planned_for(tmp_path):
    requests = tmp_path / "requests.csv"
    requests.write_text("arrival_s,prompt_tokens,output_tokens\n0,4,6\n0,8,3\n0.5,5,2\n")
    asked = Asked(workload=requests, num_prompts=2)
    best = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["all-resident"], [1, 2]), asked)["best"]
    question = Question(
        model=MODEL, machine=machine("l4", 4000), workload=requests, num_prompts=2, max_concurrency=best["concurrency"]
    )
    same = run(pool_routing(MODEL), "all-resident", question, anchors=False).summary["metrics"]
    assert same["completed"] == 2 and best["output_throughput"] == same["output_throughput"]


def test_a_dear_machine_that_is_worse_in_all_is_left_out():
    good, poor = machine("h100", 4000), machine("l4", 4000)
    poor = replace(poor, gpu=replace(poor.gpu, hbm_gbps=0.01), prices=replace(poor.prices, usd_per_hour=100.0))
    result = plan(MODEL, Space([good, poor], [32.0], ["all-resident"], [2]), Asked(4, 6))
    assert "cannot win" in result["excluded"][0]["reason"] and len(result["candidates"]) == 1


def test_systems_that_change_outputs_are_never_left_out_by_a_bound():
    result = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["all-resident", "eMoE"], [1]), Asked(4, 6))
    assert len(result["candidates"]) == 2


@pytest.mark.parametrize("concurrency", [1, 3])
def test_the_best_comes_with_its_band_anchors_and_flags(concurrency):
    result = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["LRU", "llama.cpp"], [concurrency]), Asked(4, 6))
    best = result["best"]
    low, high = best["p10_p90"]
    assert low < best["output_throughput"] < high
    assert set(best["anchors"]) == {"all_resident", "no_cache", "lru", "oracle"}
    assert best["output_throughput"] <= best["anchors"]["all_resident"]["output_throughput"] <= best["ceiling"]
    assert {"machine", "policy", "bits", "concurrency"} <= set(result["pareto"][0])
    front = [row for row in result["candidates"] if search._name_of(row) in result["pareto"]]
    assert all("p10_p90" in row and "flags" in row for row in front)


def test_the_next_best_and_whether_costs_may_turn_them_round():
    alike = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["all-resident", "static"], [1]), Asked(4, 6))
    assert alike["best"]["difference"] is None  # both are the same, so nothing is behind
    apart = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["all-resident", "on-demand"], [1]), Asked(4, 6))
    gap = apart["best"]["difference"]
    assert gap["of"]["policy"] == "on-demand" and 0 < gap["p10"] < gap["value"] < gap["p90"] and gap["exceeds"]


@pytest.mark.parametrize("objective", ["throughput", "latency", "cost"])
def test_costs_that_both_have_in_common_cancel_out(objective):
    """The band of the gap is that of the ratio, and narrower than what both bands would make of it."""
    choices = Space([machine("l4", 4000)], [32.0, 8.5], ["all-resident"], [1])
    result = plan(MODEL, choices, Asked(4, 6, objective=objective), prune=False)
    best, gap = result["best"], result["best"]["difference"]
    second = next(row for row in result["candidates"] if search._name_of(row) == gap["of"])
    metric = search.OBJECTIVES[objective]
    ratio = best[metric] / second[metric] if objective == "throughput" else second[metric] / best[metric]
    assert gap["value"] == pytest.approx(ratio - 1) and gap["p10"] <= gap["value"] <= gap["p90"]
    low, high = best["p10_p90"]
    assert (1 + gap["p90"]) / (1 + gap["p10"]) < high / low


def test_a_difference_is_unsure_as_common_costs_are_also_where_bands_are_the_models_own():
    """Where experts are absent, costs have no share in a band; in what two systems differ by they do."""
    card = machine("l4", 573)
    gap = plan(MODEL, Space([card], [32.0], ["LRU", "KTransformers"], [1]), Asked(4, 6))["best"]["difference"]
    assert gap["p10"] < gap["value"] < gap["p90"]


def test_several_gpus_are_planned_for_where_they_can_serve():
    choices = Space([load_machine("2xh100-sxm")], [32.0], ["all-resident", "LRU"], [2])
    result = plan(MODEL, choices, Asked(4, 6))
    assert result["best"]["policy"] == "all-resident" and "--tensor-parallel-size 2" in result["best"]["flags"]["vLLM"]
    assert result["best"]["usd_per_hour"] == 2 * load_machine("h100-sxm").prices.known
    assert "one GPU" in result["excluded"][0]["reason"]


def test_eplb_on_one_gpu_is_all_resident_and_on_several_has_flags():
    alone = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["all-resident", "EPLB"], [1]), Asked(4, 6))
    assert [row["policy"] for row in alone["candidates"]] == ["all-resident"]
    line = plan(MODEL, Space([load_machine("2xh100-sxm")], [32.0], ["EPLB"], [2]), Asked(4, 6))["best"]["flags"]["vLLM"]
    assert "--data-parallel-size 2 --enable-expert-parallel --enable-eplb" in line and "redundant_experts 2 " in line


def test_experts_kept_on_the_gpu_are_in_the_flags():
    policies = ["KTransformers", "KTransformers(gpu_experts=1024)", "llama.cpp"]
    tight = machine("l4", 560)
    asking = search._Asking(MODEL, Asked(4, 6))
    lines = {}
    for policy in policies:
        (choice,) = search._different(asking, [search.Choice(tight, 32.0, policy, 2)])
        row, _ = search._simulated(asking, choice)
        search._sure(row, asking, choice)
        lines |= {(choice.policy, engine): line for engine, line in row["flags"].items()}
    kept = {policy: line for (policy, engine), line in lines.items() if engine == "KTransformers"}
    (some,) = (policy for policy in kept if "gpu_experts" in policy)
    count = int(some.partition("gpu_experts=")[2].rstrip(")"))
    assert 0 < count < MODEL.experts and f"--kt-num-gpu-experts {count} " in kept[some]
    assert "--kt-num-gpu-experts 0 " in kept["KTransformers"]
    (whole,) = {policy for policy, engine in lines if engine in ("llama.cpp", "ik_llama.cpp")}
    layers = int(whole.partition("n_cpu_moe=")[2].rstrip(")"))
    assert 0 < layers < len(MODEL.moe_layers) and f"--n-cpu-moe {layers} " in lines[whole, "llama.cpp"]
    assert lines[whole, "ik_llama.cpp"] and "-np 2 -c 20 " in lines[whole, "llama.cpp"]
    assert all(line.endswith("# untested") for line in lines.values())


def test_dense_layers_count_in_llama_cpp_and_not_in_moesim():
    model = load_model("deepseek-v3")
    system = load_system("llama.cpp(n_cpu_moe=2)")
    question = Question(model=model, machine="h200")
    scene = Scene(distinct_routing(model, 1, 2, 2), question)
    assert model.moe_layers[0] == 3
    assert "--n-cpu-moe 5 " in flags(system, scene, 8.0, True)["llama.cpp"]


def test_systems_nobody_can_download_have_no_line():
    result = plan(MODEL, Space([machine("l4", 4000)], [32.0], ["LRU", "Fiddler"], [1]), Asked(4, 6))
    assert result["best"]["flags"] == {} and not {"LRU", "Fiddler"} & set(POLICIES)


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
    result = plan(MODEL, Space([machine("l4", 4000)], [64.0, 99.0], ["all-resident"], [1]), Asked(4, 6))
    assert len(result["candidates"]) == 1 and result["best"]["bits"] == round(MODEL.expert_bits, 2)


def test_money_excludes_with_a_reason():
    dear, unpriced = load_machine("h100"), load_machine("rtx-4090")
    result = plan(MODEL, Space([dear, unpriced], [32.0], ["all-resident"], [1]), Asked(4, 6, usd_per_hour=0.5))
    assert result["best"] is None and not result["candidates"]
    reasons = {row["machine"]: row["reason"] for row in result["excluded"]}
    low = plan(MODEL, Space([load_machine("l40s")], [32.0], ["all-resident"], [1]), Asked(4, 6, objective="cost"))
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
    run = CliRunner().invoke(app, [*words, "--kv-share", "0.5,2"])
    assert isinstance(run.exception, WorkloadError) and "at most 1" in str(run.exception)
    run = CliRunner().invoke(app, [*words, "--objective", "speed"])
    assert isinstance(run.exception, WorkloadError) and "unknown objective" in str(run.exception)
