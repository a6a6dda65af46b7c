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
    line = json.dumps({"timestamp": 1500, "input_length": 6758, "output_length": 500, "hash_ids": [*range(14)]})
    assert read(tmp_path, line + "\n\n", "m.jsonl") == [(1.5, 6758, 500)]
    assert read_rows(tmp_path / "m.jsonl")[0].blocks == tuple(range(13)), "the last block is not full"
    for hashes in ([0, 1], ["a"] * 14, 7):
        with pytest.raises(WorkloadError, match=r"line 1: .*hash_ids"):
            read(tmp_path, json.dumps({**json.loads(line), "hash_ids": hashes}), "m.jsonl")
    line = json.dumps({"input_toks": 12, "output_toks": 3, "arrival_time_ns": 2_000_000})
    assert read(tmp_path, line, "l.jsonl") == [(pytest.approx(0.002), 12, 3)]


SHAREGPT = [
    {"id": "a", "conversations": [{"from": "human", "value": "x" * 9}, {"from": "gpt", "value": "y" * 40}]},
    {"id": "b", "conversations": [{"from": "human", "value": "no answer"}]},
    {"id": "c", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}, {"value": "more"}]},
]


def test_sharegpt_counts_a_token_for_every_four_characters_of_the_first_two_turns(tmp_path):
    text = json.dumps(SHAREGPT)
    assert read(tmp_path, text, "s.json") == [(0.0, 3, 10), (0.0, 1, 1)]
    assert [(row.line, row.counted) for row in read_rows(tmp_path / "s.json")] == [(1, False), (3, False)]


def test_vllm_bench_results_are_workloads(tmp_path):
    """Times count from the first request, before the client held any back; failed ones are left out."""
    result = {"input_lens": [5, 6, 7], "output_lens": [3, 0, 2], "start_times": [100.5, 100.0, 103.0]}
    assert read(tmp_path, json.dumps(result), "v.json") == [(0.5, 5, 3), (3.0, 7, 2)]
    result |= {"queue_times": [0.25, 0.0, 1.0], "errors": ["", "", "timed out"]}
    assert read(tmp_path, json.dumps(result), "v.json") == [(0.25, 5, 3)]
    del result["start_times"], result["queue_times"], result["errors"]
    assert read(tmp_path, json.dumps(result), "v.json") == [(0.0, 5, 3), (0.0, 7, 2)]


def test_a_simulated_result_is_a_workload_that_gives_the_same_result(tmp_path, small_config, trace_file, call):
    words = ("replay", trace_file, "--model", small_config, "--no-anchors", "--engine", "events", "--format", "vllm")
    first = json.loads(call(*words, "--request-rate", 500)[1])
    (tmp_path / "v.json").write_text(json.dumps(first))
    again = json.loads(call(*words, "--workload", tmp_path / "v.json")[1])
    for name in ("input_lens", "output_lens"):
        assert again[name] == first[name]
    assert np.allclose(np.diff(again["start_times"]), np.diff(first["start_times"]), atol=2e-9)


def test_files_without_times_take_a_rate_and_the_answer_says_how_tokens_were_counted(
    tmp_path, small_config, trace_file, call
):
    (tmp_path / "s.json").write_text(json.dumps(SHAREGPT))
    (tmp_path / "w.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,1,2\n1,3,4\n")
    words = ("replay", trace_file, "--model", small_config, "--no-anchors", "--engine", "events", "--request-rate", 5)
    code, out, _ = call(*words, "--workload", tmp_path / "s.json", "--json")
    told = json.loads(out)["inputs"]["workload"]
    assert code == 0 and told["arrivals"].startswith("5 requests/s")
    assert "a token for every 4 characters" in told["routing"]
    code, _, err = call(*words, "--workload", tmp_path / "w.csv")
    assert code == 2 and "brings its own arrivals; leave out --request-rate 5" in err


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
        ("s.json", "[{}", "not JSON .*; lines of JSON go into a .jsonl"),
        ("s.json", '{"duration": 1}', "neither a list of conversations nor input_lens"),
        ("s.json", "[1]", "conversation 1: has no list 'conversations'"),
        ("s.json", '[{"conversations": [{"value": "a"}, 3]}]', "conversation 1: each turn must be"),
        ("s.json", "[]", "no requests"),
        ("v.json", '{"input_lens": [1, 2], "output_lens": [1]}', "lists of the same length"),
        ("v.json", '{"input_lens": [1, "x"], "output_lens": [1, 1]}', "request 2: input_lens 'x' must be a whole"),
        ("v.json", '{"input_lens": [1], "output_lens": [1.5]}', "request 1: output_lens '1.5' must be a whole"),
        ("v.json", '{"input_lens": [1], "output_lens": [1], "start_times": [null]}', "request 1: start_times None"),
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
    records.requests.add((0, 0, 0, 0, 100 * ms, 300 * ms, 8, 5, 0, 0, 0, 0))  # TTFT 100, TPOT 50
    records.requests.add((1, 0, 0, 0, 250 * ms, 290 * ms, 8, 5, 0, 0, 0, 0))  # TTFT 250, TPOT 10
    records.requests.add((2, 0, 0, 0, 90 * ms, 500 * ms, 8, 6, 0, 0, 0, 0))  # TTFT 90, TPOT 82
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
