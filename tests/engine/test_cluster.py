"""Several GPUs in step: one GPU is the plain device, costs are the closed form, loads are what the placement says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs.shard import widths
from moesim.engine.clock import Clock
from moesim.engine.cluster import Cluster
from moesim.engine.serve import Server
from moesim.engine.simulate import calibration_popularity, simulate
from moesim.errors import MachineError, PolicyError
from moesim.machine import load_machine
from moesim.metrics import bottleneck
from moesim.model import load_model
from moesim.policies import FCFS
from moesim.question import Question, Scene, run
from moesim.records import Records
from moesim.systems import load_system
from moesim.trace.assumed import distinct_routing
from moesim.units import ns

MIXTRAL = load_model("mixtral-8x7b")


def scene(machine: str = "2xh100-sxm", requests: int = 6, prompt: int = 20, decode: int = 12, **options) -> Scene:
    trace = distinct_routing(MIXTRAL, requests, prompt, decode)
    return Scene(trace, Question(machine=machine, **options))


def outcome_of(s: Scene, system, detail: bool = False):
    return simulate(s.setting(system, s.ledger(system)), system, detail)


@pytest.mark.parametrize("clients", [1, 4])
def test_a_cluster_of_one_gpu_is_the_plain_device(clients):
    s = scene("h100-sxm", max_concurrency=clients)
    system = load_system("all-resident")
    setting = s.setting(system, s.ledger(system))
    plain = simulate(setting, system, engine="events")
    env, records = Clock(), Records(False)
    cluster = Cluster(env, s.trace, setting.table, system, 1, calibration_popularity(s.trace), records)
    env.run(env.process(Server(env, cluster, cluster.model, s.workload, FCFS(), setting.limits, records).run()))
    assert records.requests.rows().tolist() == plain.records.requests.rows().tolist()
    assert records.steps.rows().tolist() == plain.records.steps.rows().tolist()
    assert cluster.counts == plain.counts


def test_tensor_parallel_decoding_is_the_closed_form():
    s = scene(requests=1, prompt=0, decode=1)
    system = load_system("all-resident")
    setting = s.setting(system, s.ledger(system))
    cluster = Cluster(Clock(), s.trace, setting.table, system, 2, calibration_popularity(s.trace), Records(False))
    table, costs = cluster._table, setting.table.costs
    reduce = ns(costs.exchange("all_reduce", MIXTRAL.hidden * 2, 2))
    gather = ns(costs.exchange("all_gather", MIXTRAL.vocab * 2, 2))
    layers = sum(table.layers_ns([], [0])) + 32 * (table.grouped_ns(2, 2) + 2 * reduce)
    assert outcome_of(s, system).elapsed_ns == table.step_ns(1, 1) + gather + layers
    assert cluster.model.heads == MIXTRAL.heads // 2 and cluster.model.expert_ffn == MIXTRAL.expert_ffn // 2


def test_whole_experts_wait_for_the_busiest_gpu():
    """All tokens of a layer choose experts 0 and 1, which lie on the first GPU: the second has nothing to do."""
    s = scene(requests=4, prompt=0, decode=8, max_concurrency=4)
    s.trace.experts[:] = [0, 1]
    system = load_system("all-resident")
    sliced = replace(system, parallel=replace(system.parallel, attention="data"))
    whole = replace(system, parallel=replace(sliced.parallel, experts="expert"))
    spread = replace(system, parallel=replace(whole.parallel, placement="balanced", redundant=2))
    found = {name: outcome_of(s, one) for name, one in (("sliced", sliced), ("whole", whole), ("spread", spread))}
    assert found["whole"].devices["balancedness"] == 0.5
    assert found["whole"].devices["imbalance_ratio"] == 1.0
    assert found["spread"].devices["balancedness"] == 1.0
    assert found["sliced"].devices["balancedness"] == 1.0
    assert found["spread"].counts.spent["experts"] < found["whole"].counts.spent["experts"]


def test_busy_idle_and_exchange_make_up_the_elapsed_time():
    s = scene(requests=8, request_rate=20.0, max_num_seqs=4)
    for name in ("all-resident", "EPLB"):
        outcome = outcome_of(s, load_system(name))
        assert sum(outcome.busy_ns.values()) + outcome.idle_ns == outcome.elapsed_ns
        limits = bottleneck(outcome.counts, outcome.idle_ns, outcome.busy_ns, outcome.elapsed_ns)
        assert sum(limits["critical_path"].values()) == pytest.approx(1)
        assert outcome.counts.spent["exchange"] > 0


def test_overlap_hides_exchanges_but_the_first_and_the_last():
    s = scene("4xa100-80gb-sxm", requests=32, prompt=0, decode=6, max_concurrency=32)
    plain = replace(load_system("EPLB"), parallel=replace(load_system("EPLB").parallel, redundant=0))
    halves = replace(plain, parallel=replace(plain.parallel, overlap=True))
    a, b = outcome_of(s, plain), outcome_of(s, halves)
    assert 0 < b.counts.spent["exchange"] < a.counts.spent["exchange"]
    assert b.counts.spent["experts"] > a.counts.spent["experts"]  # every half reads its experts' weights


def test_rebalancing_follows_the_load_and_pays_for_the_experts_it_moves():
    s = scene(requests=4, prompt=0, decode=40, max_concurrency=4)
    half = len(s.trace.experts) // 2
    s.trace.experts[:half], s.trace.experts[half:] = [0, 1], [2, 3]
    once, often = load_system("EPLB(redundant=2)"), load_system("EPLB(redundant=2, interval=10)")
    fixed, moving = outcome_of(s, once), outcome_of(s, often)
    assert fixed.devices["rebalanced"] == 0 and moving.devices["rebalanced"] > 0
    assert moving.devices["balancedness"] >= fixed.devices["balancedness"]


def test_detail_tells_of_every_exchange():
    s = scene(requests=2, prompt=5, decode=3)
    outcome = outcome_of(s, load_system("all-resident"), detail=True)
    kernels = outcome.records.kernels
    took = kernels.column("end") - kernels.column("start")
    spent = outcome.counts.spent
    for what, name in ((0, "mixer"), (1, "experts"), (4, "exchange")):
        layered = took[(kernels.column("what") == what) & (kernels.column("layer") >= 0)]
        assert layered.sum() == spent[name]
    assert took.sum() + outcome.idle_ns == outcome.elapsed_ns


def test_memory_is_that_of_one_gpu():
    s = scene("8xh200", max_concurrency=6)
    one = Scene(s.trace, replace(s.question, machine="h200"))
    split, alone = s.ledger(load_system("all-resident")), one.ledger(load_system("all-resident"))
    assert split.expert_bytes == alone.expert_bytes // 8
    assert split.kv_bytes == alone.kv_bytes // 8  # eight KV heads
    apart = s.ledger(load_system("EPLB"))
    assert apart.slots_per_layer == 2 and apart.expert_bytes == alone.expert_bytes // 4
    assert apart.gpu["weights but experts"] == alone.gpu["weights but experts"]


def test_what_several_gpus_cannot_do_is_said():
    with pytest.raises(PolicyError, match="machine with one GPU"):
        run(distinct_routing(MIXTRAL, 1, 4, 4), "LRU", Question(machine="2xh100-sxm"))
    with pytest.raises(PolicyError, match=r"do not divide over 3 GPUs; set parallel\.attention=data"):
        run(distinct_routing(MIXTRAL, 1, 4, 4), "all-resident", Question(machine="3xh100-sxm"))
    with pytest.raises(PolicyError, match=r"parallel\.redundant=1"):
        settings = ["parallel.attention=data", "parallel.experts=expert"]
        run(distinct_routing(MIXTRAL, 1, 4, 4), "all-resident", Question(machine="3xh100-sxm"), settings)
    with pytest.raises(MachineError, match="1 to 1024 GPUs"):
        load_machine("0xh200")
    with pytest.raises(MachineError, match="not in the catalogue"):
        load_machine("8xh2000")


def test_several_gpus_are_compared_with_what_they_can_be():
    result = run(distinct_routing(MIXTRAL, 2, 8, 4), "EPLB", Question(machine="2xh100-sxm"))
    summary = result.summary
    assert summary["engine"]["used"] == "cluster"
    assert summary["ceiling"]["output_throughput"] > summary["metrics"]["output_throughput"]
    assert summary["anchors"]["all_resident"]["output_throughput"] > 0
    assert "one GPU" in summary["anchors"]["lru"]["error"]
    assert np.isclose(summary["devices"]["imbalance_ratio"], 1 / summary["devices"]["balancedness"] - 1)


# -- HEXA-MoE: shares of the hidden dimension, on GPUs that need not be alike --------------------------------------


UNLIKE = "rtx-4090+rtx-3090"
SMALL = replace(MIXTRAL, name="small", layers=4, moe_layers=(0, 1, 2, 3), hidden=1024, expert_ffn=4096)


def spent_on(policy: str, machine: str = UNLIKE, requests: int = 8, prompt: int = 512) -> dict[str, int]:
    trace = distinct_routing(SMALL, requests, prompt, 0)
    asked = Question(model=SMALL, machine=machine, max_concurrency=requests, max_batch_tokens=1 << 20)
    return dict(outcome_of(Scene(trace, asked), load_system(policy)).counts.spent)


def test_columns_are_divided_by_shares_and_add_up():
    assert widths(1536, (1, 1)) == [768, 768]
    assert widths(1000, (0.74, 0.26)) == [740, 260]
    assert sum(widths(1537, (3.0, 2.9, 0.001))) == 1537 and min(widths(1537, (3.0, 2.9, 0.001))) >= 1
    with pytest.raises(PolicyError, match="1 columns"):
        widths(1, (1, 1))


def test_shares_follow_the_speed_of_each_gpu():
    """Equation 2: in proportion to one over what a large product takes."""
    trace = distinct_routing(SMALL, 2, 8, 0)
    summary = run(trace, "HEXA-MoE", Question(model=SMALL, machine=UNLIKE)).summary
    fast, slow = load_machine("rtx-4090").gpu.tflops, load_machine("rtx-3090").gpu.tflops
    assert summary["devices"]["shares"][0] == pytest.approx(fast / (fast + slow), rel=0.01)
    assert summary["ceiling"]["output_throughput"] > 0 and "error" in summary["anchors"]["all_resident"]


@pytest.mark.parametrize("mode", ["model", "data"])
def test_the_best_share_is_the_analytic_one(mode):
    """With many tokens the experts' kernels take what tensor cores take: none of 39 other divisions is quicker."""
    fast, slow = load_machine("rtx-4090").gpu.tflops, load_machine("rtx-3090").gpu.tflops
    times = {
        share: spent_on(f"HEXA-MoE(mode='{mode}', shares=({share}, {1 - share}))", requests=40, prompt=200)["experts"]
        for share in [n / 40 for n in range(16, 40)]
    }
    best = min(times, key=lambda share: times[share])
    assert best == pytest.approx(fast / (fast + slow), abs=0.026)
    assert times[best] < 0.8 * times[0.5]


def test_gathering_experts_hides_behind_attention_and_a_pass_is_its_closed_form():
    trace = distinct_routing(SMALL, 2, 64, 0)
    asked = Question(model=SMALL, machine="2xrtx-4090", max_concurrency=2, max_num_seqs=2, max_batch_tokens=1 << 20)
    s, system = Scene(trace, asked), load_system("HEXA-MoE(mode='data')")
    setting = s.setting(system, s.ledger(system))
    table, spent = setting.table, outcome_of(s, system).counts.spent
    gather = ns(setting.table.costs.exchange("all_gather", 8 * SMALL.expert_bytes(), 2))
    mixer = table.layers_ns([(64, 0)], [])[0]
    active = [[len(np.unique(rows)) for rows in (ids[:64], ids[64:])] for ids in trace.experts.transpose(1, 0, 2)]
    assert spent["mixer"] == 4 * mixer
    assert spent["exchange"] == 4 * max(gather - mixer, 0)
    assert spent["experts"] == sum(max(table.grouped_ns(a, 128) for a in layer) for layer in active)


def test_few_tokens_travel_and_for_many_the_experts_do():
    """Each way is the quicker one somewhere, and `either` takes it there."""
    few, many = (
        {
            mode: sum(spent_on(f"HEXA-MoE(mode='{mode}')", "4xrtx-4090", 4, prompt).values())
            for mode in ("data", "model")
        }
        for prompt in (4, 16384)
    )
    assert few["model"] < few["data"] and many["data"] < many["model"]
    assert sum(spent_on("HEXA-MoE", "4xrtx-4090", 4, 4).values()) == few["model"]
    assert sum(spent_on("HEXA-MoE", "4xrtx-4090", 4, 16384).values()) == many["data"]


def test_sequences_are_dealt_out_by_share_where_each_gpu_computes_its_own():
    s = scene("rtx-4090+rtx-3090", requests=8)
    system = load_system("HEXA-MoE(mode='data', shares=(3.0, 1.0))")
    cluster = Cluster(
        Clock(), s.trace, s.setting(system, s.ledger(system)).table, system, 2, calibration_popularity(s.trace),
        Records(False),
    )  # fmt: skip
    owners = [cluster._owner(number) for number in range(8)]
    assert owners.count(0) == 6 and owners[:4].count(1) == 1


def test_memory_of_unlike_gpus_is_the_tightest_ones_and_holds_a_layer_to_gather():
    trace = distinct_routing(SMALL, 1, 4, 4)
    plans = {
        policy: Scene(trace, Question(model=SMALL, machine="2xrtx-4090")).ledger(load_system(policy)).gpu
        for policy in ("HEXA-MoE(mode='data')", "HEXA-MoE(mode='model')")
    }
    data, model = plans.values()
    assert data["staging"] == 8 * SMALL.expert_bytes() and model["staging"] == 0
    assert data["its experts"] == model["its experts"] == SMALL.total_expert_bytes // 2
    unlike = Scene(trace, Question(model=SMALL, machine="h200+rtx-4090")).ledger(load_system("HEXA-MoE"))
    assert sum(unlike.gpu.values()) == load_machine("rtx-4090").gpu.memory_bytes


def test_what_unlike_gpus_cannot_do_is_said():
    trace = distinct_routing(SMALL, 1, 4, 4)
    asked = Question(model=SMALL, machine=UNLIKE)
    for policy in ("all-resident", "EPLB"):
        with pytest.raises(PolicyError, match="use HEXA-MoE"):
            run(trace, policy, asked)
    with pytest.raises(PolicyError, match="3 numbers for 2 GPUs"):
        run(trace, "HEXA-MoE(shares=(1.0, 1.0, 1.0))", asked)
    with pytest.raises(PolicyError, match="numbers above 0"):
        load_system("HEXA-MoE(shares=(1.0, 0.0))")
    with pytest.raises(PolicyError, match="attention=data"):
        run(trace, "all-resident", asked, ("parallel.experts=gather",))
    assert load_machine("2xrtx-4090+rtx-4090").gpus == 3 and not load_machine("rtx-4090+rtx-4090").others
    with pytest.raises(MachineError, match=r"joined by \+"):
        load_machine("rtx-4090+dgx-spark")
