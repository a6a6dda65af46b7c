"""A question put and answered: the summary, its anchors, its error bar, its memory."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import moesim
from moesim.errors import MemoryBudgetError, MoesimError, TraceError, WorkloadError
from moesim.machine import load_machine
from moesim.output import to_json
from moesim.page import format_run
from moesim.question import Question, run
from moesim.systems import SYSTEMS
from moesim.trace.io import read
from moesim.units import GIB
from tests.conftest import small_trace
from tests.scenes import random_trace


@pytest.fixture
def ask(small_config):
    """run(policy, **question) on the small trace and model."""

    def answer(policy="LRU", trace=None, anchors=False, detail=False, settings=(), **question):
        question = {"model": str(small_config), "slots_per_layer": 4} | question
        return run(trace or small_trace(), policy, Question(**question), settings, anchors, detail)

    return answer


def test_the_summary_has_every_part_and_the_metric_names_of_vllm(ask):
    s = ask("eMoE(period=2)", anchors=True).summary
    assert {"status", "inputs", "metrics", "bottleneck", "memory", "anchors", "uncertainty", "ceiling"} <= set(s)
    names = "duration_s completed total_input_tokens total_output_tokens request_throughput output_throughput"
    names += " lookups hits lates misses hit_rate late_rate miss_rate h2d_bytes stall_ms_per_token"
    for metric in ("ttft", "tpot", "itl", "e2el"):
        names += "".join(f" {stat}_{metric}_ms" for stat in ("mean", "median", "std", "p90", "p95", "p99"))
    assert set(names.split()) <= set(s["metrics"])
    assert set(s["anchors"]) == {"all_resident", "no_cache", "lru", "oracle", "of_sample"}
    json.loads(to_json(s))


def test_same_inputs_give_identical_bytes(ask):
    assert to_json(ask("eMoE(period=2)", anchors=True).summary) == to_json(ask("eMoE(period=2)", anchors=True).summary)


@pytest.mark.parametrize("policy", list(SYSTEMS))
def test_every_system_serves_every_request(ask, policy):
    m = ask(policy).summary["metrics"]
    assert m["completed"] == 6 and m["total_output_tokens"] == 6 * 31 and m["total_input_tokens"] == 60
    assert m["hits"] + m["lates"] + m["misses"] == m["lookups"]


def test_the_anchors_frame_the_policies(ask):
    anchors = ask("LRU", anchors=True).summary["anchors"]
    speed = {name: anchors[name]["output_throughput"] for name in ("no_cache", "lru", "oracle", "all_resident")}
    assert list(speed) == sorted(speed, key=speed.get)
    assert anchors["lru"] | {"fits": True} == anchors["of_sample"]["policy"] | {"fits": True}


def test_all_resident_batches_also_where_its_experts_do_not_fit(ask):
    """As on a GPU with memory enough, KV caches included."""
    card, trace = load_machine("rtx-4090"), random_trace(240, 32, 8, 2, seed=0, requests=6, prompt=10)
    large = replace(card, gpu=replace(card.gpu, memory_bytes=300 * GIB))
    served = {"trace": trace, "model": "mixtral-8x7b", "max_concurrency": 4, "slots_per_layer": 1, "anchors": True}
    anchors = [ask(machine=box, **served).summary["anchors"]["all_resident"] for box in (card, large)]
    assert [row["fits"] for row in anchors] == [False, True]
    assert anchors[0]["output_throughput"] == anchors[1]["output_throughput"]


def test_the_error_bar_holds_the_prediction_and_the_ceiling_is_above_it(ask):
    s = ask("LRU", anchors=True).summary
    low, high = s["uncertainty"]["output_throughput"]
    assert low < s["metrics"]["output_throughput"] < high
    assert 0 < s["ceiling"]["reached"] < 1
    assert s["ceiling"]["output_throughput"] > s["anchors"]["all_resident"]["output_throughput"]


def test_the_critical_path_adds_up_and_names_the_largest_share(ask):
    b = ask("on-demand").summary["bottleneck"]
    assert sum(b["critical_path"].values()) == pytest.approx(1)
    assert b["limited_by"] == max(b["critical_path"], key=b["critical_path"].get) == "pcie"


def test_reroute_reports_which_share_was_served_as_chosen(ask):
    weighted = small_trace(weights=True)
    s = ask("eMoE(period=2)", trace=weighted, slots_per_layer=2).summary
    fidelity = s["routing_fidelity"]
    rows = [fidelity["overall"], *fidelity["by_task"].values()]
    rows += [
        dict(zip(fidelity["by_layer"], row, strict=True)) for row in zip(*fidelity["by_layer"].values(), strict=True)
    ]
    assert len(rows) == 1 + 2 + 3 and list(fidelity["by_task"]) == ["a", "b"]
    assert all(0 < row["exact"] < 1 and sum(row.values()) == pytest.approx(1) for row in rows)
    assert "reported" in s["published_quality"]
    assert any("quality is not modelled" in note for note in s["notes"])
    changed = ask("eMoE(period=2)", settings=["misses=Fiddler"]).summary
    assert changed["published_quality"] is None, "what was published is of another system"
    plain = ask("LRU").summary
    assert plain["published_quality"] is None and plain["routing_fidelity"]["by_layer"]["exact"] == [1, 1, 1]
    exact = {"exact": 1, "lower_precision": 0, "rerouted": 0, "merged": 0, "skipped": 0}
    assert plain["routing_fidelity"]["overall"] == plain["routing_fidelity"]["by_task"]["b"] == exact


def test_tasks_of_any_name_and_number_fit_the_page(ask):
    trace = small_trace(requests=20, tokens=400, weights=True)
    names = ("all", "\x1b[31mred", "long" * 40, *(f"t{i:02}" for i in range(17)))
    result = ask(
        "eMoE(period=2)", trace=replace(trace, requests=replace(trace.requests, task=names)), slots_per_layer=2
    )
    page = format_run(result)
    assert "\x1b" not in page and "and 8 tasks more" in page and page.count("\n  all ") == 2


def test_emoe_calls_its_predictor_every_period(ask, monkeypatch):
    from moesim.engine.residency import Residency

    plans = []
    plan = Residency.plan
    monkeypatch.setattr(Residency, "plan", lambda self, values: (plans.append(self._env.now), plan(self, values)))
    ask("eMoE(period=2)", trace=small_trace(requests=7, tokens=280), engine="events")
    assert len(plans) == 3, "before requests 2, 4 and 6"


def test_insensitive_tasks_call_for_no_plan(ask, monkeypatch):
    from moesim.engine.residency import Residency

    plans = []
    monkeypatch.setattr(Residency, "plan", lambda self, values: plans.append(values))
    ask("eMoE(period=1, insensitive=('a','b'))", engine="events")
    assert not plans
    ask("eMoE(period=1, insensitive=('b',))", engine="events")
    assert len(plans) == 2, "requests 2 and 4 are of task a"


def test_more_slots_are_never_slower(ask):
    speeds = [ask("LRU", slots_per_layer=n).summary["metrics"]["output_throughput"] for n in (2, 4, 6, 8)]
    assert speeds == sorted(speeds)


def test_concurrency_defaults_to_one_user_and_to_no_limit_under_load(ask):
    assert ask().summary["inputs"]["workload"]["max_concurrency"] == 1
    assert ask(request_rate=100.0).summary["inputs"]["workload"]["max_concurrency"] == 6


def test_a_rate_beyond_capacity_is_called_overloaded(ask):
    trace = small_trace(requests=40, tokens=1600)
    calm = ask("on-demand", trace=trace, request_rate=1.0, max_num_seqs=1)
    busy = ask("on-demand", trace=trace, request_rate=400.0, max_num_seqs=1)
    assert calm.summary["status"] == "FITS" and busy.summary["status"] == "OVERLOADED"


def test_an_infeasible_plan_says_so_instead_of_running(ask):
    trace = random_trace(4, 32, 8, 2, seed=0)
    s = ask("all-resident", trace=trace, model="mixtral-8x7b", slots_per_layer=None).summary
    assert s["status"] == "OOM" and not s["metrics"] and "GPU memory" in s["status_reason"]
    assert "OOM" in format_run(ask("all-resident", trace=trace, model="mixtral-8x7b", slots_per_layer=None))


def test_a_cache_of_less_than_one_slot_per_layer_is_not_run(ask):
    s = ask("LRU", slots_per_layer=None, expert_memory=4 << 20).summary
    assert s["status"] == "CACHE_DISABLED" and not s["metrics"]
    together = ask("LRU(scope='global')", slots_per_layer=None, expert_memory=4 << 20).summary
    assert together["metrics"]["completed"] == 6, "one slot for all layers is enough to make progress"


def test_a_trace_of_another_model_is_refused(ask):
    with pytest.raises(TraceError, match="experts"):
        ask(model="deepseek-v3")


def test_the_run_can_be_saved_and_read(ask, tmp_path):
    result = ask("Mixtral-Offloading", detail=True)
    result.save(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"summary.json", "requests.parquet", "transfers.parquet"}
    frame = result.to_pandas("transfers")
    assert len(frame) and (frame["end"] >= frame["start"]).all()
    text = format_run(result)
    assert "tok/s" in text and "limited by" in text


def test_the_python_api_reads_a_path(trace_file, small_config):
    result = moesim.replay(trace_file, "LRU", model=str(small_config), slots_per_layer=4, anchors=False)
    assert result.summary["metrics"]["completed"] == 6
    assert result.summary["inputs"]["trace"]["sha256"] == read(trace_file).content_hash
    assert len(result.to_pandas()) == 6


def test_settings_change_one_choice(ask):
    assert ask(settings=["misses.rule=host"]).summary["metrics"]["host_experts"] > 0


def test_host_memory_too_small_reads_from_the_drive(ask, tmp_path):
    """24 experts of 3 MiB (the small model) in host memory for 12 of them."""
    machine = tmp_path / "tight.yaml"
    machine.write_text("from: rtx-4090\nhost:\n  memory: 60MiB\n  reserve: 1MiB\nnvme:\n  gbps: 5\n")
    result = ask(machine=str(machine), slots_per_layer=2)
    assert result.summary["metrics"]["nvme_bytes"] > 0
    assert result.summary["bottleneck"]["critical_path"]["nvme"] > 0


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ({"slots_per_layer": 9}, MemoryBudgetError),
        ({"slots_per_layer": 0}, MemoryBudgetError),
        ({"slots_per_layer": None, "expert_memory": 1000}, MemoryBudgetError),
        ({"slots_per_layer": 4, "expert_memory": 10**8}, MemoryBudgetError),
        ({"slots_per_layer": None, "expert_memory": 10**15}, MemoryBudgetError),
        ({"max_concurrency": 0}, WorkloadError),
        ({"max_batch_tokens": 0}, WorkloadError),
        ({"chunk": -1}, WorkloadError),
        ({"request_rate": -2.0}, WorkloadError),
        ({"num_prompts": 0}, WorkloadError),
        ({"slo_ms": 0.0}, WorkloadError),
        ({"machine": "rtx-9999x"}, MoesimError),
        ({"model": "no-such-model"}, MoesimError),
    ],
)
def test_a_question_that_makes_no_sense_is_refused_in_one_line(ask, question, error):
    with pytest.raises(error) as caught:
        ask(**question)
    assert "\n" not in str(caught.value)


def test_gaps_and_tpot_agree_for_a_single_user(ask):
    m = ask("all-resident").summary["metrics"]
    assert m["mean_itl_ms"] == pytest.approx(m["mean_tpot_ms"], rel=0.05)
    assert np.isfinite(m["mean_ttft_ms"])
