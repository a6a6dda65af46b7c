"""A run in the files that others' tools write, so that their plotters read it as if it had been measured.

Fields are those of vllm/benchmarks/serve.py (`vllm bench serve --save-result --save-detailed`), of AIPerf's
profile exports (docs/reference/json-export-schema.md, schema 1.1) and of llama.cpp's tools/llama-bench (`-o json`,
`-o csv`). What a simulation has no word for is empty or that tool's default, and every date is the epoch, so that the
same inputs give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim import __version__
from moesim.errors import WorkloadError, nearest
from moesim.files import write_text
from moesim.output import to_json
from moesim.question import Run

EPOCH = datetime.fromtimestamp(0, UTC)
NAME = f"moesim-{__version__}"


def result_files(run: Run, name: str) -> dict[str, str]:
    """File names and their text, the main one first. Raises WorkloadError for an unknown format and an empty run."""
    check_format(name)
    if not len(run.records.requests):
        raise WorkloadError(f"--format {name}: nothing was served ({run.summary['status']}), so there is no result")
    return FORMATS[name](run)


def check_format(name: str) -> None:
    if name not in FORMATS:
        raise WorkloadError(f"--format '{name}': unknown{nearest(name, FORMATS)}")


def write_files(files: Mapping[str, str], directory: Path) -> None:
    for name, text in files.items():
        write_text(directory / name, text)


class _Requests:
    """Columns by request in the order they were sent, and the times of every token (ns)."""

    def __init__(self, run: Run) -> None:
        table = run.records.requests
        order = np.lexsort((table.column("request"), table.column("sent")))
        self.sent, self.arrival, self.first, self.last, self.prompt, self.output = (
            table.column(name)[order]
            for name in ("sent", "arrival", "first_token", "finished", "prompt_tokens", "output_tokens")
        )
        self.ids = [run.request_ids[i] for i in table.column("request")[order].tolist()]
        self._ends = run.records.steps.column("end")
        self.even = 0  # requests whose token times the steps do not tell

    def __len__(self) -> int:
        return len(self.sent)

    def tokens(self, i: int) -> NDArray[np.int64]:
        """When each output token of request `i` came: at the end of every step from its first to its last.

        A request that sat out steps in between (preempted) has more step ends than tokens: those are spread evenly.
        """
        begin, end = np.searchsorted(self._ends, (self.first[i], self.last[i]))
        times = self._ends[begin : end + 1]
        if len(times) == self.output[i]:
            return times
        self.even += 1
        return np.linspace(self.first[i], self.last[i], int(self.output[i])).astype(np.int64)


# -- vLLM ---------------------------------------------------------------------------------------------------------


def _vllm(run: Run) -> dict[str, str]:
    s, m, requests = run.summary, run.summary["metrics"], _Requests(run)
    inputs = s["inputs"]
    asked = inputs["arguments"]
    times = [requests.tokens(i) for i in range(len(requests))]
    result = {
        "date": EPOCH.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "moesim",
        "backend": "moesim",
        "label": inputs["system"]["name"],
        "model_id": inputs["model"]["name"],
        "tokenizer_id": None,
        "num_prompts": len(requests),
        "request_rate": "inf" if asked["request_rate"] is None else asked["request_rate"],
        "burstiness": asked["burstiness"],
        "max_concurrency": asked["max_concurrency"],
        "duration": m["duration_s"],
        "completed": m["completed"],
        "failed": 0,
        **{name: m[name] for name in ("total_input_tokens", "total_output_tokens", "request_throughput")},
        "request_goodput": m.get("request_goodput"),
        **{name: m[name] for name in ("output_throughput", "total_token_throughput")},
        "input_lens": requests.prompt.tolist(),
        "output_lens": requests.output.tolist(),
        "ttfts": ((requests.first - requests.sent) / 1e9).tolist(),
        "itls": [(np.diff(own) / 1e9).tolist() for own in times],
        "latencies": ((requests.last - requests.sent) / 1e9).tolist(),
        "start_times": (requests.sent / 1e9).tolist(),
        "queue_times": ((requests.sent - requests.arrival) / 1e9).tolist(),
        "generated_texts": [""] * len(requests),
        "errors": [""] * len(requests),
        "max_output_tokens_per_s": _peak_rate(times),
        "max_concurrent_requests": _peak_requests(requests),
        "rtfx": 0.0,
        **{name: value for name, value in m.items() if name.endswith(_LATENCIES)},
        "moesim": _said(run, requests),
    }
    return {"vllm.json": json.dumps(result) + "\n"}


_LATENCIES = ("_ttft_ms", "_tpot_ms", "_itl_ms", "_e2el_ms")


def _peak_rate(times: list[NDArray[np.int64]]) -> float:
    """Most output tokens in any whole second since the first request was sent."""
    seconds = np.concatenate(times) // 1_000_000_000
    return float(np.bincount(seconds).max())


def _peak_requests(requests: _Requests) -> int:
    """Most requests sent and not finished at any time."""
    finished = np.sort(requests.last)
    return int((np.arange(1, len(requests) + 1) - np.searchsorted(finished, requests.sent, side="right")).max())


def _said(run: Run, requests: _Requests) -> dict[str, Any]:
    """What a reader of a file that looks measured must be told."""
    inputs = run.summary["inputs"]
    return {
        "simulated": True,
        "version": __version__,
        "status": run.summary["status"],
        "machine": inputs["machine"]["name"],
        "costs": inputs["costs"],
        "routing": inputs["trace"]["provenance"],
        "requests_with_even_itls": requests.even,
    }


# -- AIPerf -------------------------------------------------------------------------------------------------------

# Tag: header in the CSV, unit.
_RECORD = {
    "time_to_first_token": ("Time to First Token", "ms"),
    "time_to_second_token": ("Time to Second Token", "ms"),
    "request_latency": ("Request Latency", "ms"),
    "inter_token_latency": ("Inter Token Latency", "ms"),
    "output_token_throughput_per_user": ("Output Token Throughput Per User", "tokens/sec/user"),
    "input_sequence_length": ("Input Sequence Length", "tokens"),
    "output_sequence_length": ("Output Sequence Length", "tokens"),
    "output_token_count": ("Output Token Count", "tokens"),
}
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
_STATISTICS = ("avg", "min", "max", "sum", *(f"p{p}" for p in _PERCENTILES), "std")


def _aiperf(run: Run) -> dict[str, str]:
    requests, m, inputs = _Requests(run), run.summary["metrics"], run.summary["inputs"]
    records = [_aiperf_record(requests, i) for i in range(len(requests))]
    blocks: dict[str, dict[str, Any]] = {}
    for tag, (_, unit) in _RECORD.items():
        values = np.array([r["metrics"][tag]["value"] for r in records if tag in r["metrics"]], dtype=float)
        if len(values):
            blocks[tag] = {"unit": unit} | _statistics(values)
    scalars = {
        "request_throughput": ("Request Throughput", "requests/sec", m["request_throughput"]),
        "request_count": ("Request Count", "requests", float(m["completed"])),
        "output_token_throughput": ("Output Token Throughput", "tokens/sec", m["output_throughput"]),
        "total_output_tokens": ("Total Output Tokens", "tokens", float(m["total_output_tokens"])),
        "total_isl": ("Total Input Sequence Length", "tokens", float(requests.prompt.sum())),
        "total_osl": ("Total Output Sequence Length", "tokens", float(requests.output.sum())),
        "benchmark_duration": ("Benchmark Duration", "sec", m["duration_s"]),
    }
    if "request_goodput" in m:
        good = round(m["slo_attainment"] * m["completed"])
        scalars["goodput"] = ("Goodput", "requests/sec", m["request_goodput"])
        scalars["good_request_count"] = ("Good Request Count", "requests", float(good))
    blocks |= {tag: {"unit": unit, "avg": value} for tag, (_, unit, value) in scalars.items()}
    end = datetime.fromtimestamp(int(requests.last.max()) / 1e9, UTC)
    summary = {
        "schema_version": "1.1",
        "aiperf_version": NAME,
        **blocks,
        "input_config": {"moesim": inputs["arguments"] | _said(run, requests)},
        "was_cancelled": False,
        "error_summary": [],
        "start_time": EPOCH.replace(tzinfo=None).isoformat(),
        "end_time": end.replace(tzinfo=None).isoformat(),
    }
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return {
        "profile_export_aiperf.json": to_json(summary) + "\n",
        "profile_export_aiperf.csv": _aiperf_csv(blocks, scalars),
        "profile_export.jsonl": lines,
    }


def _aiperf_record(requests: _Requests, i: int) -> dict[str, Any]:
    """A line of profile_export.jsonl; `inter_token_latency` is what vLLM calls TPOT."""
    sent, first, last = int(requests.sent[i]), int(requests.first[i]), int(requests.last[i])
    prompt, output = int(requests.prompt[i]), int(requests.output[i])
    values: dict[str, Any] = {
        "input_sequence_length": prompt,
        "time_to_first_token": (first - sent) / 1e6,
        "request_latency": (last - sent) / 1e6,
        "output_token_count": output,
        "output_sequence_length": output,
    }
    if output > 1:
        gaps = np.diff(requests.tokens(i)) / 1e6
        mean = (last - first) / 1e6 / (output - 1)
        values["time_to_second_token"] = float(gaps[0])
        values["inter_token_latency"] = mean
        values["output_token_throughput_per_user"] = 1e3 / mean
        chunks = {"inter_chunk_latency": {"value": gaps.tolist(), "unit": "ms"}}
    else:
        chunks = {}
    return {
        "metadata": {
            "session_num": i,
            "x_request_id": requests.ids[i],
            "x_correlation_id": requests.ids[i],
            "conversation_id": requests.ids[i],
            "turn_index": 0,
            "request_start_ns": sent,
            "request_ack_ns": None,
            "request_end_ns": last,
            "worker_id": "moesim",
            "record_processor_id": "moesim",
            "benchmark_phase": "profiling",
            "was_cancelled": False,
            "cancellation_time_ns": None,
        },
        "metrics": {tag: {"value": value, "unit": _RECORD[tag][1]} for tag, value in values.items()} | chunks,
        "error": None,
    }


def _statistics(values: NDArray[np.float64]) -> dict[str, Any]:
    found: dict[str, Any] = {"avg": values.mean(), "min": values.min(), "max": values.max()}
    found |= {f"p{p}": np.percentile(values, p) for p in _PERCENTILES}
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return {k: float(v) for k, v in found.items()} | {
        "std": float(deviation),
        "count": len(values),
        "sum": float(values.sum()),
    }


def _aiperf_csv(blocks: dict[str, dict[str, Any]], scalars: dict[str, tuple[str, str, float]]) -> str:
    """Two tables with an empty line between: distributions, then single values; both by tag."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["Metric", *_STATISTICS])
    for tag in sorted(set(blocks) - set(scalars)):
        header, unit = _RECORD[tag]
        writer.writerow([f"{header} ({unit})", *(f"{blocks[tag][name]:.2f}" for name in _STATISTICS)])
    writer.writerow([])
    writer.writerow(["Metric", "Value"])
    for _, (header, unit, value) in sorted(scalars.items()):
        writer.writerow([header if unit == "requests" else f"{header} ({unit})", f"{value:.2f}"])
    return out.getvalue()


# -- llama-bench --------------------------------------------------------------------------------------------------


def _llama_bench(run: Run) -> dict[str, str]:
    """Two rows per length: `pp`, the prompt alone, and `tg`, its output after the prompt (n_depth)."""
    most = run.summary["metrics"]["max_num_requests_running"]
    if most > 1:
        raise WorkloadError(
            f"--format llama-bench: it times one request at a time, and {most} ran at once; set --max-concurrency 1"
        )
    rows = [_llama_bench_fields(run) | row for row in _tests(run)]
    out = io.StringIO()
    columns = [name for name in rows[0] if not name.startswith("samples_")]
    writer = csv.DictWriter(out, columns, quoting=csv.QUOTE_ALL, extrasaction="ignore", lineterminator="\n")
    out.write(",".join(columns) + "\n")
    for row in rows:
        writer.writerow({k: int(v) if isinstance(v, bool) else v for k, v in row.items()})
    return {"llama-bench.json": to_json(rows) + "\n", "llama-bench.csv": out.getvalue()}


def _tests(run: Run) -> Iterator[dict[str, Any]]:
    table = run.records.requests
    names = ("admitted", "first_token", "finished", "prompt_tokens", "output_tokens")
    admitted, first, last, prompt, output = (table.column(name) for name in names)
    read = run.summary["metrics"]["total_input_tokens"] > 0  # else the trace has no prompts: every token is decoded
    for length in np.unique(prompt).tolist() if read else ():
        one = prompt == length
        yield _test(length, 0, 0, (first - admitted)[one])
    decoded, began = (output - 1, first) if read else (output, admitted)
    for length, tokens in np.unique(np.stack([prompt, decoded], axis=1)[decoded > 0], axis=0).tolist():
        one = (prompt == length) & (decoded == tokens)
        yield _test(0, tokens, length, (last - began)[one])


def _test(n_prompt: int, n_gen: int, n_depth: int, ns: NDArray[np.int64]) -> dict[str, Any]:
    """One row; deviations are those of a sample, as llama-bench's."""
    speeds = 1e9 * (n_prompt + n_gen) / np.maximum(ns, 1)
    spread = [float(x.std(ddof=1)) if len(x) > 1 else 0.0 for x in (ns, speeds)]
    return {
        "n_prompt": n_prompt,
        "n_gen": n_gen,
        "n_depth": n_depth,
        "test_time": EPOCH.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": int(ns.mean()),
        "stddev_ns": int(spread[0]),
        "avg_ts": float(speeds.mean()),
        "stddev_ts": spread[1],
        "samples_ns": ns.tolist(),
        "samples_ts": speeds.tolist(),
    }


def _llama_bench_fields(run: Run) -> dict[str, Any]:
    """The set-up: what moesim knows, else llama-bench's defaults."""
    inputs = run.summary["inputs"]
    model, machine, asked = inputs["model"], inputs["machine"], inputs["arguments"]
    batch = asked["chunk"] or asked["max_batch_tokens"]
    size = inputs["model_size"]
    return {
        "build_commit": NAME,
        "build_number": 0,
        "cpu_info": machine["host"]["name"],
        "gpu_info": machine["gpu"]["name"],
        "backends": "moesim",
        "model_filename": model["name"],
        "model_type": f"{model['name']}, {model['expert_bits']:g} bits",
        "model_size": size["bytes"],
        "model_n_params": size["params"],
        "n_batch": asked["max_batch_tokens"],
        "n_ubatch": batch,
        "n_threads": machine["host"]["cores"],
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": 50,
        "type_k": f"{model['kv_bits']:g} bits",
        "type_v": f"{model['kv_bits']:g} bits",
        "n_gpu_layers": -1,
        "n_cpu_moe": _blocks_on_cpu(run),
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": False,
        "flash_attn": -1,
        "devices": "auto",
        "tensor_split": "0.00",
        "tensor_buft_overrides": "none",
        "use_mmap": True,
        "use_direct_io": False,
        "embeddings": False,
        "no_op_offload": 0,
        "no_host": False,
        "repack": True,
        "fit_target": 0,
        "fit_min_ctx": 0,
    }


def _blocks_on_cpu(run: Run) -> int:
    """llama.cpp's --n-cpu-moe, which counts blocks, dense ones included; 0 for systems that do not divide by layers."""
    inputs, memory = run.summary["inputs"], run.summary["memory"]
    if inputs["system"]["capacity"].get("kind") != "WholeLayers":
        return 0
    layers = inputs["model"]["moe_layers"]
    whole = inputs["model_size"]["expert_bytes"] / len(layers)
    on_cpu = len(layers) - round(memory["peak_resident_expert_bytes"] / whole)
    return int(layers[on_cpu - 1]) + 1 if on_cpu else 0


FORMATS = {"vllm": _vllm, "aiperf": _aiperf, "llama-bench": _llama_bench}
