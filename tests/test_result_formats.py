"""Files of others' tools, field by field: their names, and what they say beside the run's own numbers."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from moesim.errors import WorkloadError
from moesim.question import Question, run
from moesim.result_formats import result_files
from tests.conftest import small_trace


def words(text: str) -> list[str]:
    return text.split()


# vllm/benchmarks/serve.py, `vllm bench serve --save-result --save-detailed`, in its order.
VLLM = words("""
date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration
completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput
total_token_throughput input_lens output_lens ttfts itls latencies start_times queue_times generated_texts errors
max_output_tokens_per_s max_concurrent_requests rtfx mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms
median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms mean_e2el_ms median_e2el_ms
std_e2el_ms p99_e2el_ms
""")
# docs/tutorials/working-with-profile-exports.md of AIPerf.
AIPERF_METADATA = words("""
session_num x_request_id x_correlation_id conversation_id turn_index request_start_ns request_ack_ns request_end_ns
worker_id record_processor_id benchmark_phase was_cancelled cancellation_time_ns
""")
AIPERF_STATS = words("""
unit avg min max p1 p5 p10 p25 p50 p75 p90 p95 p99 std count sum
""")
# tools/llama-bench/README.md of llama.cpp, `-o csv` and `-o json`.
LLAMA_BENCH = words("""
build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params n_batch
n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu no_kv_offload
flash_attn devices tensor_split tensor_buft_overrides use_mmap use_direct_io embeddings no_op_offload no_host repack
fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts stddev_ts
""")


@pytest.fixture(scope="module")
def served(small_config):
    """Six requests, two at a time, with SLOs."""
    question = Question(
        model=str(small_config), request_rate=2000.0, max_num_seqs=2, engine="events", goodput=(("ttft", 2.0),)
    )
    return run(small_trace(), "LRU", question, anchors=False)


@pytest.fixture(scope="module")
def alone(small_config):
    return run(small_trace(), "LRU", Question(model=str(small_config), engine="events"), anchors=False)


def test_vllm_has_the_fields_of_its_benchmark_and_agrees_with_the_run(served):
    result = json.loads(result_files(served, "vllm")["vllm.json"])
    m = served.summary["metrics"]
    assert [name for name in VLLM if name not in result] == []
    assert [name for name in result if name in VLLM[:31]] == VLLM[:31]
    assert result["completed"] == 6 and result["request_goodput"] == m["request_goodput"]
    assert result["request_rate"] == 2000.0 and result["moesim"]["simulated"] is True
    for ttft, itls, latency, output in zip(
        result["ttfts"], result["itls"], result["latencies"], result["output_lens"], strict=True
    ):
        assert len(itls) == output - 1 and ttft + sum(itls) == pytest.approx(latency)
    gaps = np.concatenate(result["itls"])
    assert 1e3 * gaps.mean() == pytest.approx(m["mean_itl_ms"]) and result["moesim"]["requests_with_even_itls"] == 0
    assert 1e3 * np.mean(result["ttfts"]) == pytest.approx(m["mean_ttft_ms"])
    tpot = [(latency - ttft) / (n - 1) for latency, ttft, n in zip(
        result["latencies"], result["ttfts"], result["output_lens"], strict=True)]  # fmt: skip
    assert 1e3 * np.mean(tpot) == pytest.approx(m["mean_tpot_ms"])
    assert result["max_concurrent_requests"] >= m["max_num_requests_running"] == 2
    assert sum(result["output_lens"]) == m["total_output_tokens"]


def test_aiperf_writes_its_three_files_with_their_fields(served):
    files = result_files(served, "aiperf")
    assert list(files) == ["profile_export_aiperf.json", "profile_export_aiperf.csv", "profile_export.jsonl"]
    m, summary = served.summary["metrics"], json.loads(files["profile_export_aiperf.json"])
    assert sorted(summary["time_to_first_token"]) == sorted(AIPERF_STATS)
    assert summary["time_to_first_token"]["p99"] == pytest.approx(m["p99_ttft_ms"])
    assert summary["inter_token_latency"]["avg"] == pytest.approx(m["mean_tpot_ms"])
    assert summary["request_latency"]["count"] == 6
    assert summary["request_throughput"] == {"unit": "requests/sec", "avg": m["request_throughput"]}
    assert summary["goodput"]["avg"] == m["request_goodput"]
    lines = [json.loads(line) for line in files["profile_export.jsonl"].splitlines()]
    assert len(lines) == 6 and all(list(line["metadata"]) == AIPERF_METADATA for line in lines)
    for line in lines:
        assert list(line) == ["metadata", "metrics", "error"]
        spent = line["metadata"]["request_end_ns"] - line["metadata"]["request_start_ns"]
        assert spent == pytest.approx(1e6 * line["metrics"]["request_latency"]["value"])
        assert all(set(metric) == {"value", "unit"} for metric in line["metrics"].values())
    tables = files["profile_export_aiperf.csv"].split("\r\n\r\n")
    head, *rows = csv.reader(io.StringIO(tables[0]))
    assert head[:4] == ["Metric", "avg", "min", "max"] and "Time to First Token (ms)" in [row[0] for row in rows]
    assert next(csv.reader(io.StringIO(tables[1]))) == ["Metric", "Value"]


def test_llama_bench_has_a_row_per_test(alone):
    files, m = result_files(alone, "llama-bench"), alone.summary["metrics"]
    rows = json.loads(files["llama-bench.json"])
    assert [name for name in rows[0] if not name.startswith("samples_")] == LLAMA_BENCH
    prompt, generated = rows
    assert (prompt["n_prompt"], prompt["n_gen"], prompt["n_depth"]) == (10, 0, 0)
    assert prompt["avg_ns"] == pytest.approx(1e6 * m["mean_ttft_ms"], rel=1e-6)
    assert (generated["n_prompt"], generated["n_gen"], generated["n_depth"]) == (0, 30, 10)
    assert generated["avg_ns"] / 30 == pytest.approx(1e6 * m["mean_tpot_ms"], rel=1e-6)
    assert generated["avg_ts"] == pytest.approx(np.mean(generated["samples_ts"])) and len(generated["samples_ns"]) == 6
    table = list(csv.DictReader(io.StringIO(files["llama-bench.csv"])))
    assert list(table[0]) == LLAMA_BENCH and table[1]["n_gen"] == "30" and table[0]["use_mmap"] == "1"
    assert rows[0]["model_size"] > 0 and rows[0]["n_cpu_moe"] == 0


def test_layers_on_the_cpu_are_llama_cpps(small_config):
    question = Question(model=str(small_config), engine="events")
    done = run(small_trace(), "llama.cpp(n_cpu_moe=2)", question, anchors=False)
    assert json.loads(result_files(done, "llama-bench")["llama-bench.json"])[0]["n_cpu_moe"] == 2


def test_llama_bench_refuses_requests_side_by_side_and_unknown_formats_are_named(served):
    with pytest.raises(WorkloadError, match="one request at a time, and 2 ran at once; set --max-concurrency 1"):
        result_files(served, "llama-bench")
    with pytest.raises(WorkloadError, match=r"--format 'vlm': unknown; did you mean 'vllm'"):
        result_files(served, "vlm")


def test_a_request_that_sat_steps_out_has_even_gaps_and_the_file_says_so(served):
    """As after a preemption: more step ends between its tokens than tokens."""
    import copy

    from moesim.records import Records

    records = Records(False)
    for table in ("steps", "requests"):
        getattr(records, table).extend(getattr(served.records, table).rows())
    last = served.records.steps.rows()[-1]
    late = served.records.requests.rows()[-1].copy()
    late[list(served.records.requests.columns).index("output_tokens")] -= 1
    records.requests = type(records.requests)(served.records.requests.columns)
    records.requests.extend(np.vstack([served.records.requests.rows()[:-1], late]))
    assert last[1] == late[5]
    other = copy.copy(served)
    object.__setattr__(other, "records", records)
    result = json.loads(result_files(other, "vllm")["vllm.json"])
    assert result["moesim"]["requests_with_even_itls"] == 1
    assert all(
        ttft + sum(itls) == pytest.approx(latency)
        for ttft, itls, latency in zip(result["ttfts"], result["itls"], result["latencies"], strict=True)
    )


def test_the_command_prints_or_writes_them(tmp_path, small_config, trace_file, call):
    words = ("replay", trace_file, "--model", small_config, "--engine", "events", "--no-anchors", "--format")
    code, out, _ = call(*words, "vllm")
    assert code == 0 and json.loads(out)["backend"] == "moesim"
    assert call(*words, "vllm")[1] == out
    code, out, _ = call(*words, "aiperf", "-o", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["status"]
    assert (tmp_path / "run" / "profile_export.jsonl").is_file() and (tmp_path / "run" / "summary.json").is_file()
    code, _, err = call(*words, "vllm", "--json")
    assert code == 2 and "both print" in err
    assert call(*words, "csv")[0] == 2
