"""Request files of others: each format by a line or two, what is wrong named by line, and real ones where they lie."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.errors import WorkloadError
from moesim.metrics import goodput_metrics
from moesim.records import Records
from moesim.workload_files import read_rows

DATA = Path(__file__).parents[2] / "shared" / "data"


def read(tmp_path, text, name="w.csv"):
    (tmp_path / name).write_text(text)
    return [(row.arrival_s, row.prompt, row.output) for row in read_rows(tmp_path / name)]


def test_azure_times_count_from_the_first_request(tmp_path):
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    text = head + "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    assert read(tmp_path, text) == [(0.0, 374, 44), (pytest.approx(4.314579), 396, 109)]
    text = head + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,7,1\n"
    assert read(tmp_path, text) == [(0.0, 2162, 5), (pytest.approx(0.99007), 7, 1)]


def test_burstgpt_leaves_failed_requests_out(tmp_path):
    head = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    assert read(tmp_path, head + "5,ChatGPT,472,18,490,Log\n45,GPT-4,10,0,10,Log\n") == [(5.0, 472, 18)]


def test_json_lines_of_mooncake_and_llmservingsim(tmp_path):
    line = json.dumps({"timestamp": 1500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]})
    assert read(tmp_path, line + "\n\n", "m.jsonl") == [(1.5, 6758, 500)]
    line = json.dumps({"input_toks": 12, "output_toks": 3, "arrival_time_ns": 2_000_000})
    assert read(tmp_path, line, "l.jsonl") == [(pytest.approx(0.002), 12, 3)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.csv", "a,b\n1,2\n", "column 'arrival_s' is missing"),
        ("w.csv", "arrival_s,prompt_tokens,output_tokens\n", "no requests"),
        ("w.csv", "arrival_s,prompt_tokens,output_tokens\n0,1.5,2\n", "line 2: prompt_tokens '1.5' must be a whole"),
        ("w.csv", "arrival_s,prompt_tokens,output_tokens\n0,0,2\n", "line 2: prompt_tokens '0' must be"),
        ("w.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnow,1,2\n", "line 2: TIMESTAMP 'now' must be a date"),
        ("w.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10,1,2\n2024-05-09,1,2\n", "line 3: seconds"),
        ("w.jsonl", "{", "line 1: not JSON"),
        ("w.jsonl", "[]", "line 1: not a JSON object"),
        ("w.jsonl", '{"a": 1}', "line 1: neither input_length nor input_toks"),
        ("w.jsonl", '{"timestamp": null, "input_length": 1, "output_length": 1}', "line 1: timestamp ''"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    with pytest.raises(WorkloadError, match=message):
        read(tmp_path, text, name)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("azure_llm_2023/data/AzureLLMInferenceTrace_code.csv", 8819),
        ("azure_llm_2023/data/AzureLLMInferenceTrace_conv.csv", 19366),
        ("mooncake_traces/FAST25-release/traces/conversation_trace.jsonl", 12031),
    ],
)
def test_real_files_are_read_whole(path, count):
    if not (DATA / path).is_file():
        pytest.skip(f"{path} is not beside this checkout")
    rows = read_rows(DATA / path)
    assert len(rows) == count and min(row.arrival_s for row in rows) == 0


def test_goodput_by_hand():
    records = Records(False)
    ms = 1_000_000  # request, arrival, sent, admitted, first token, finished, prompt, output
    records.requests.add((0, 0, 0, 0, 100 * ms, 300 * ms, 8, 5))  # TTFT 100, TPOT 50
    records.requests.add((1, 0, 0, 0, 250 * ms, 290 * ms, 8, 5))  # TTFT 250, TPOT 10
    records.requests.add((2, 0, 0, 0, 90 * ms, 500 * ms, 8, 6))  # TTFT 90, TPOT 82
    found = goodput_metrics(records, {"ttft": 200.0, "tpot": 60.0}, ["a", "b", "a"])
    assert found["request_goodput"] == pytest.approx(1 / 0.5) and found["slo_attainment"] == pytest.approx(1 / 3)
    assert found["slo_attainment_by_slo"] == {"ttft": pytest.approx(2 / 3), "tpot": pytest.approx(2 / 3)}
    assert found["slo_attainment_by_task"] == {"a": 0.5, "b": 0.0}


def test_a_model_without_a_trace_is_replayed_on_drawn_routing(tmp_path):
    (tmp_path / "w.jsonl").write_text('{"timestamp": 0, "input_length": 9, "output_length": 4}\n' * 3)
    words = [
        "replay",
        "--model",
        "tiny-moe-8x16",
        "--machine",
        "l4",
        "--no-anchors",
        "--json",
        "--goodput",
        "ttft:1000",
    ]
    run = CliRunner().invoke(app, [*words, "--workload", str(tmp_path / "w.jsonl")])
    result = json.loads(run.stdout)
    assert run.exit_code == 0 and result["metrics"]["completed"] == 3 and result["metrics"]["slo_attainment"] == 1
    assert result["inputs"]["trace"]["provenance"] == "synthetic"
    assert any("drawn, not recorded" in note for note in result["notes"])
    run = CliRunner().invoke(app, [*words, "--num-prompts", "2", "--random-input-len", "5", "--random-output-len", "6"])
    numbers = json.loads(run.stdout)["metrics"]
    assert (numbers["completed"], numbers["total_input_tokens"], numbers["total_output_tokens"]) == (2, 10, 12)
    for wrong, message in (["--goodput", "ttfs:3"], "unknown metric"), (["--goodput", "tpot"], "write METRIC:MS"):
        run = CliRunner().invoke(app, [*words, *wrong])
        assert isinstance(run.exception, WorkloadError) and message in str(run.exception)
    run = CliRunner().invoke(app, ["replay"])
    assert isinstance(run.exception, WorkloadError) and "--model" in str(run.exception)


def test_arrivals_are_in_order_whatever_the_file(tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens\n2,1,2\n1,3,4\n"
    assert np.array_equal(read(tmp_path, text), [(2.0, 1, 2), (1.0, 3, 4)])  # the file's order; the workload sorts
