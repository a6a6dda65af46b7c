"""Prompts on some GPUs and outputs on others: what goes over takes its time, and nothing is lost on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.engine.pools import _in_turn, _most, _transfers, simulate_pools
from moesim.engine.simulate import simulate
from moesim.errors import PolicyError, WorkloadError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.page import format_run
from moesim.question import Question, Scene, parse_pools, run
from moesim.systems import load_system
from moesim.trace.assumed import distinct_routing
from moesim.units import ns

MIXTRAL = load_model("mixtral-8x7b")
SMALL = replace(MIXTRAL, name="small", layers=4, moe_layers=(0, 1, 2, 3), hidden=1024, expert_ffn=4096)
RESIDENT, EPLB = load_system("all-resident"), load_system("EPLB")


def scene(pools: tuple[int, int] = (1, 1), requests: int = 6, prompt: int = 20, decode: int = 12, **options) -> Scene:
    options = {"machine": f"{sum(pools)}xh100-sxm", "request_rate": float("inf"), "engine": "events"} | options
    trace = distinct_routing(SMALL, requests, prompt, decode)
    return Scene(trace, Question(model=SMALL, disaggregate=pools, **options))


def settings(s: Scene, system=RESIDENT):
    return [pool.setting(system, pool.ledger(system)) for pool in s.pools(system)]


def outcome_of(s: Scene, system=RESIDENT):
    return simulate_pools(s.workload, *settings(s, system), system, engine="events")


def test_one_request_takes_what_one_gpu_takes_and_the_way_of_its_cache():
    s = scene(requests=1)
    alone = Scene(s.trace, replace(s.question, machine="h100-sxm", disaggregate=None))
    plain = simulate(alone.setting(RESIDENT, alone.ledger(RESIDENT)), RESIDENT, engine="events")
    table = alone.setting(RESIDENT, alone.ledger(RESIDENT)).table
    way = ns(table.costs.exchange("all_gather", 2 * SMALL.kv_bytes(20), 2))
    apart = outcome_of(s)
    assert way > 0
    assert apart.elapsed_ns == plain.elapsed_ns + way
    before, after = (one.records.requests for one in (plain, apart))
    for name in ("sent", "admitted", "first_token", "output_tokens", "prompt_tokens"):
        assert after.column(name).tolist() == before.column(name).tolist()
    assert after.column("finished")[0] == before.column("finished")[0] + way
    assert apart.records.gaps[0] == plain.records.gaps[0] + way
    assert list(apart.records.gaps[1:]) == list(plain.records.gaps[1:])


@pytest.mark.parametrize("system", [RESIDENT, EPLB], ids=["tensor", "data"])
def test_every_token_is_made_once_and_none_before_its_cache_has_come(system):
    s = scene((2, 4), requests=40, request_rate=200.0, max_num_seqs=4)
    outcome = outcome_of(s, system)
    requests, steps = outcome.records.requests, outcome.records.steps
    assert sorted(requests.column("request").tolist()) == list(range(40))
    assert (requests.column("output_tokens") == 13).all()
    assert steps.column("prefill_tokens").sum() == 40 * 20
    assert steps.column("decode_tokens").sum() == len(outcome.records.gaps) == 40 * 12
    assert (np.diff(steps.column("start")) >= 0).all()
    first, second = outcome.pools
    took, _, _ = _transfers(*settings(s, system), system, np.array([20]))
    own = first.records.requests
    landed = np.sort(own.column("finished")) + took[0]
    assert (np.sort(second.records.requests.column("arrival")) >= landed).all()
    assert (second.records.requests.column("admitted") >= second.records.requests.column("arrival")).all()
    total = int((requests.column("finished") - requests.column("first_token")).sum())
    assert total == sum(outcome.records.gaps)


def test_requests_with_one_token_stay_where_they_were():
    s = scene(requests=4)
    short = [replace(r, decode=r.decode[: 0 if i % 2 else 5]) for i, r in enumerate(s.workload.requests)]
    s.workload = replace(s.workload, requests=tuple(short))
    outcome = outcome_of(s)
    by_request = dict(zip(*(outcome.records.requests.column(c) for c in ("request", "output_tokens")), strict=True))
    assert by_request == {0: 6, 1: 1, 2: 6, 3: 1}
    assert len(outcome.pools[1].records.requests) == 2


def test_busy_and_idle_make_up_the_elapsed_time_of_all_gpus():
    outcome = outcome_of(scene((2, 4), requests=20, request_rate=100.0), EPLB)
    spent = outcome.busy_ns["gpu"] + outcome.busy_ns["exchange"] + outcome.idle_ns
    assert abs(spent - outcome.elapsed_ns) <= 3  # every mean is rounded down
    assert abs(sum(outcome.counts.spent.values()) - spent + outcome.idle_ns) <= 8


def test_caches_go_over_every_link_of_the_smaller_pool_or_each_over_one():
    """512 tokens, 4 layers, 8 KV heads of 128, keys and values of 2 bytes: 8 MiB."""
    context, whole = np.array([512]), 512 * 4 * 2 * 8 * 128 * 2
    split = settings(scene((2, 4)))
    took, channels, nbytes = _transfers(*split, RESIDENT, context)
    cost = split[0].table.costs.exchange
    assert (took[0], channels, nbytes[0]) == (ns(cost("all_gather", 2 * (whole // 2), 2)), 1, whole)
    took, channels, _ = _transfers(*settings(scene((4, 2))), RESIDENT, context)
    assert (took[0], channels) == (ns(cost("all_gather", 2 * (whole // 2), 2)), 1)
    took, channels, nbytes = _transfers(*settings(scene((2, 4)), EPLB), EPLB, context)
    assert (took[0], channels, nbytes[0]) == (ns(cost("all_gather", 2 * whole, 2)), 2, whole)


def test_transfers_take_turns_and_memory_is_held_from_begin_to_end():
    ready, took = np.array([10, 0, 5]), np.array([4, 20, 6])
    began, ended = _in_turn(ready, took, 1)
    assert began.tolist() == [26, 0, 20] and ended.tolist() == [30, 20, 26]
    began, _ = _in_turn(ready, took, 2)
    assert began.tolist() == [11, 0, 5]
    assert _most(np.array([0, 5, 10]), np.array([10, 8, 12]), np.array([3, 4, 5])) == 7


def test_more_caches_than_there_is_room_for_are_overloaded():
    machine = load_machine("2xh100-sxm")
    tight = replace(machine, gpu=replace(machine.gpu, memory_bytes=1_750_000_000))
    trace = distinct_routing(SMALL, 60, 100, 400)
    asked = Question(model=SMALL, machine=tight, request_rate=float("inf"), disaggregate=(1, 1), max_batch_tokens=128)
    result = run(trace, "all-resident", replace(asked, engine="events"), anchors=False)
    pool = result.summary["devices"]["decode"]
    assert pool["kv_most_bytes"] > pool["kv_room_bytes"]
    assert result.summary["status"] == "OVERLOADED"
    few = run(trace, "all-resident", replace(asked, engine="events", num_prompts=2), anchors=False).summary
    assert few["status"] == "FITS"
    assert few["devices"]["decode"]["kv_most_bytes"] <= few["devices"]["decode"]["kv_room_bytes"]


def test_the_page_tells_of_both_pools_and_anchors_are_disaggregated_too():
    trace = distinct_routing(SMALL, 4, 16, 8)
    asked = Question(model=SMALL, machine="4xh100-sxm", request_rate=50.0, disaggregate=(3, 1), engine="events")
    result = run(trace, "EPLB", asked, settings=["parallel.redundant=1"])
    page = format_run(result)
    assert "\nprefill       3 GPUs" in page and "\ndecode        1 GPU; busy" in page and "KV transfer" in page
    assert result.summary["anchors"]["of_sample"]["policy"]["mean_ttft_ms"] > 0
    assert "expert cache" in result.summary["anchors"]["lru"]["error"]


def test_what_cannot_be_disaggregated_is_said():
    assert parse_pools("5:3") == (5, 3)
    for text in ("5", "0:8", "a:b", "-1:2"):
        with pytest.raises(WorkloadError, match="GPUs for prompts:GPUs for outputs"):
            parse_pools(text)
    with pytest.raises(WorkloadError, match="divides 2 GPUs that are alike, but 3xh100-sxm has 3"):
        scene(machine="3xh100-sxm")
    with pytest.raises(WorkloadError, match="must not wait for outputs"):
        scene(max_concurrency=2)
    with pytest.raises(WorkloadError, match="need prompts"):
        scene(prompt=0)
    with pytest.raises(WorkloadError, match="goes without"):
        scene(preemption="recompute")
    with pytest.raises(PolicyError, match="has an expert cache"):
        run(scene().trace, "LRU", scene().question)
