"""The live runtime: it decides as the simulator does, computes every token, and no busy machine passes or fails it.

Times are reported by `moesim validate live` and asserted nowhere here. All of it runs on CPU tensors, by the code that
runs on a GPU.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moesim.cli import app
from moesim.errors import ValidationError
from moesim.trace.io import read
from tests.conftest import ROOT
from validate.live import compare, session
from validate.live.cases import Case, cases, check_memory, chosen, play, prepare, shapes, stage_for
from validate.live.measured import TOKENS, MeasuredTable, Samples, Slice
from validate.live.runtime import Cores
from validate.live.weights import HIGH_BITS, LOW_BITS, Backend, forward

FREE = Cores(None, None, None)
GOOD = ("predictor=oracle(recall=0.9)",)


@pytest.fixture(scope="module")
def trace():
    return read(ROOT / "traces" / "tiny-moe-8x16.parquet")


def made_up():
    """A round number for every cost: 10 us per token of an expert, 1 ns per 4 bytes copied."""
    samples = Samples()
    for tokens in TOKENS:
        for name in ("expert", "low expert", "further expert", "further low expert", "arrived expert", "mixer"):
            samples.note(name, tokens, 10_000 * tokens)
        samples.note("host expert", tokens, 25_000 * tokens)
    for nbytes in (1000, 100_000):
        samples.note("copy", nbytes, nbytes / 4)
    return samples


def run(case, trace, on_disk=False):
    """(prepared, table, log, outcome, stage) of one real run and one simulated one."""
    prepared = prepare(case, shapes(trace, quick=True)["small"], trace)
    stage = stage_for(prepared.shape, [prepared], Backend("cpu"), on_disk)
    try:
        table = MeasuredTable(stage.shape, made_up())
        log = play(prepared, stage, table.miss_costs, FREE, 0.0)
        return prepared, table, log, compare.simulated(prepared, table)[0], stage
    finally:
        stage.close()


CASES = [replace(c, shape="small") for c in cases() if c.shape == "small"]


@pytest.mark.parametrize("case", CASES, ids=[f"{c.group}: {c.name}" for c in CASES])
def test_the_runtime_decides_as_the_simulator_does(case, trace):
    prepared, table, log, outcome, _ = run(case, trace)
    found = compare.decisions(prepared, [log], outcome, table)
    if prepared.exact:
        assert found["identical"], found
    assert found["agreement"] > 0.5  # what a prefetch brings in time depends on the clock
    if prepared.exact or prepared.system.misses.rule != "precision":  # which skips what is not there in time
        assert found["real_hits"] + found["real_lates"] + found["real_misses"] == found["lookups"]


def test_experts_in_a_file_are_decided_alike(trace):
    prepared, table, log, outcome, _ = run(Case("", "", "small", "LRU", 2, steps=4), trace, on_disk=True)
    assert compare.decisions(prepared, [log], outcome, table)["identical"]


def test_a_wrong_decision_is_noticed(trace):
    prepared, table, log, outcome, _ = run(Case("", "", "small", "LRU", 4, steps=4), trace)
    for spoilt in (
        replace(log, evicted=[log.evicted[1], log.evicted[0], *log.evicted[2:]]),
        replace(log, copies=[log.copies[1], log.copies[0], *log.copies[2:]]),
        replace(log, layers=[(*row[:2], row[2] + 1, *row[3:]) for row in log.layers]),
        replace(log, evicted=log.evicted[:-1]),
    ):
        assert not compare.decisions(prepared, [spoilt], outcome, table)["identical"]


@pytest.mark.parametrize(
    ("policy", "slots", "settings"),
    [("LRU", 4, ()), ("LRU", 1, GOOD), ("LRU", 8, ("misses.rule=host",)), ("on-demand", 4, ()), ("AdapMoE", 4, ())],
)
def test_every_token_is_computed_by_the_experts_it_chose(trace, policy, slots, settings):
    """Conservation, on real numbers: the last layer's output is the sum over the experts each token chose."""
    case = Case("", "", "small", policy, slots, batch=3, steps=3, waves=1, settings=settings)
    prepared, _, _, _, stage = run(case, trace)
    rows = [int(r.decode[-1]) for r in prepared.workload.requests]
    last = prepared.shape.layers - 1
    for token, row in enumerate(rows):
        x = stage.x[token : token + 1]
        chosen = prepared.trace.experts[row, last].tolist()
        wanted = sum(forward(stage.shape, stage.host[HIGH_BITS].of(last, e), x) for e in chosen)
        assert torch.allclose(stage.out[token], wanted[0], rtol=1e-4, atol=1e-5)


def test_low_copies_are_computed_at_low_precision(trace):
    case = Case("", "", "small", "HOBBIT(ahead=0, thresholds=(0, 1))", 4, steps=3, settings=("misses.low_bits=16",))
    prepared, _, log, _, stage = run(case, trace)
    assert any(expert >= stage.shape.experts for _, expert in log.copies)
    assert prepared.buffers(LOW_BITS) and stage.host[LOW_BITS].nbytes == stage.shape.nbytes() // 2


def test_slices_measure_every_cost_the_simulator_asks_for(trace):
    prepared = prepare(Case("", "", "small", "LRU", 4, batch=8, steps=2), shapes(trace, True)["small"], trace)
    stage = stage_for(prepared.shape, [prepared], Backend("cpu"), False)
    samples = Slice(stage, FREE, 0.0, 8).take()
    table = MeasuredTable(stage.shape, samples)
    assert table.copy_ns(stage.shape.nbytes()) > 0 and table.host_expert_ns(3) > 0 and table.handoff_ns >= 0
    one, two, three = (table.grouped_ns(n, n) for n in (1, 2, 3))
    assert 0 < one <= two and three - two == pytest.approx(two - one, abs=2)
    assert set(table.layers_ns([], [5])) == {table.layers_ns([(1, 0)], [])[0]}


def test_a_paced_loader_takes_the_time_it_was_given(trace):
    prepared = prepare(Case("", "", "small", "on-demand", 4, steps=1, waves=1), shapes(trace, True)["small"], trace)
    stage = stage_for(prepared.shape, [prepared], Backend("cpu"), False)
    log = play(prepared, stage, lambda tokens: (0, 0), FREE, 0.1)
    alone = stage.shape.nbytes() / 0.1
    assert sum(row[6] for row in log.layers) >= alone * len(log.copies)  # nothing overlaps within a layer of one token


def test_a_busy_machine_neither_passes_nor_fails():
    found = {"decisions_identical": True, "total_error": 0.5, "policy_ratio_error": 0.0, "pairs_in_wrong_order": []}
    assert compare.verdict(found, missing=1) == "inconclusive"
    assert compare.verdict(found, missing=0) == "failed"
    assert compare.verdict(found | {"total_error": 0.1}, missing=0) == "passed"
    assert compare.verdict(found | {"decisions_identical": False}, missing=1) == "failed"
    assert compare.verdict(found | {"total_error": 0.1, "pairs_in_wrong_order": ["a and b"]}, missing=0) == "failed"


def test_order_counts_only_beyond_the_noise():
    rows = [
        {"group": "g", "case": "a", "real_ms": 10.0, "simulated_ms": 12.0, "error": 0.2, "noise": 0.01},
        {"group": "g", "case": "b", "real_ms": 11.0, "simulated_ms": 11.0, "error": 0.0, "noise": 0.01},
        {"group": "g", "case": "c", "real_ms": 10.1, "simulated_ms": 9.0, "error": -0.1, "noise": 0.02},
    ]
    found = compare.summary(rows)
    assert found["pairs_compared"] == 2 and found["pairs_in_wrong_order"] == ["g: a and b"]
    assert found["policy_ratio_error"] == pytest.approx(abs((9 / 12) / (10.1 / 10) - 1))


def test_pressure_is_a_share(monkeypatch, tmp_path):
    assert 0 <= session.Gate().pressure() < 2
    monkeypatch.setattr(session, "_PRESSURE_FILE", tmp_path / "none")
    assert session.Gate().pressure() == 0


def test_groups_can_be_chosen():
    assert {case.group for case in chosen(False, "prefill, batch 1")} == {"prefill", "batch 1"}
    with pytest.raises(ValidationError, match="unknown group 'prefil'; did you mean 'prefill'"):
        chosen(False, "prefil")


def test_sparse_experts_are_for_gpus(trace):
    assert "2:4" in {case.shape for case in chosen(False, None, "cuda")}
    assert "2:4" not in {case.shape for case in chosen(False, None, "cpu")}
    with pytest.raises(ValidationError, match="needs Sparse Tensor Cores"):
        chosen(False, "2:4 experts", "cpu")
    dense, sparse = shapes(trace, quick=False)["small"], shapes(trace, quick=False)["2:4"]
    assert sparse.nbytes() == sparse.weights * 2 * 9 // 16 and dense.nbytes() == dense.weights * 4


def test_what_cannot_be_run_is_said_beforehand(trace):
    small = shapes(trace, quick=True)["small"]
    with pytest.raises(ValidationError, match="no request of the trace has 9999 prompt"):
        prepare(Case("g", "n", "small", "LRU", 4, prompt=9999), small, trace)
    huge = replace(small, hidden=1 << 17, ffn=1 << 17)
    with pytest.raises(ValidationError, match="do not fit"):
        check_memory({"small": huge}, [prepare(Case("g", "n", "small", "LRU", 4), huge, trace)], False)


def test_the_command_reports_decisions_and_leaves_the_process_as_it_was(tmp_path):
    before = (torch.get_num_threads(), os.sched_getaffinity(0))
    run = CliRunner().invoke(app, ["validate", "live", "--quick", "--budget", "4s", "--json", "-o", str(tmp_path)])
    result = json.loads(run.stdout)
    assert result["decisions_identical"] is True
    assert run.exit_code == {"passed": 0, "inconclusive": 1, "failed": 4}[result["status"]]
    assert (tmp_path / "live.json").is_file() and "decisions" in (tmp_path / "live.txt").read_text()
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
