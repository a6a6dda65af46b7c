"""Requests from files: moesim's own CSV, and what public request traces and benchmarks look like."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from moesim.errors import WorkloadError

MAX_FILE_BYTES = 1 << 30
MAX_SECONDS = 1e9  # int64 ns hold nine times as much
MAX_TOKENS = 1 << 24  # per request
PREFIX_BLOCK = 512  # prompt tokens that one hash of Mooncake's traces stands for
CHARACTERS = 4  # of a text to a token: a rule of thumb for English, as no model's tokenizer is at hand
FORMATS = (
    "a CSV with arrival_s, prompt_tokens, output_tokens[, request_id, task]; Azure's TIMESTAMP, ContextTokens, "
    "GeneratedTokens; BurstGPT's Timestamp, Request tokens, Response tokens; JSON lines of Mooncake (timestamp, "
    "input_length, output_length) or LLMServingSim (arrival_time_ns, input_toks, output_toks); or a .json of ShareGPT "
    "conversations or of vllm bench serve --save-detailed (input_lens, output_lens, start_times)"
)


class Row(NamedTuple):
    """A request as a file has it; `line`, or its place in a .json, for messages; `request_id` empty without a name.

    counted: whether the file has lengths in tokens; False where they are characters / CHARACTERS. blocks: hashes of the
    prompt's full blocks (PREFIX_BLOCK).
    """

    line: int
    arrival_s: float
    prompt: int
    output: int
    task: str
    request_id: str
    counted: bool = True
    blocks: tuple[int, ...] = ()


def read_rows(path: Path) -> list[Row]:
    """All requests of a file of a known format, in its order. Raises WorkloadError by file, line, value and rule.

    Times count from the first request where the format gives a date. BurstGPT's failed requests, which have no
    response, are left out.
    """
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; give {FORMATS}")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise WorkloadError(f"{path}: larger than 1 GiB; split it")
    try:
        rows = list({".jsonl": _json_lines, ".json": _json}.get(path.suffix.lower(), _csv)(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise WorkloadError(f"{path}: not a CSV or JSON text file ({error})") from None
    if not rows:
        raise WorkloadError(f"{path}: no requests; give at least one line below the header")
    return rows


def _csv(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = set(reader.fieldnames or ())
        if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= names:
            yield from _azure(path, reader)
        elif {"Timestamp", "Request tokens", "Response tokens"} <= names:
            for line, row in enumerate(reader, start=2):
                if (row["Response tokens"] or "").strip() not in ("", "0"):
                    yield _row(f"{path}, line {line}", line, row, "Timestamp", "Request tokens", "Response tokens", 1.0)
        else:
            missing = {"arrival_s", "prompt_tokens", "output_tokens"} - names
            if missing:
                raise WorkloadError(f"{path}: column '{min(missing)}' is missing; a workload is {FORMATS}")
            for line, row in enumerate(reader, start=2):
                yield _row(f"{path}, line {line}", line, row, "arrival_s", "prompt_tokens", "output_tokens", 1.0)


def _azure(path: Path, reader: Any) -> Iterator[Row]:
    """Azure LLM inference traces of 2023 and 2024: dates to seven digits of a second, with or without a zone."""
    began: datetime | None = None
    for line, row in enumerate(reader, start=2):
        text = (row["TIMESTAMP"] or "").strip()
        whole, dot, rest = text.partition(".")
        digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
        try:
            at = datetime.fromisoformat(whole + (dot + digits[:6].ljust(6, "0") if dot else "") + rest[len(digits) :])
            began = began or at
            seconds = (at - began).total_seconds()
        except (ValueError, TypeError):
            raise WorkloadError(f"{path}, line {line}: TIMESTAMP '{text}' must be a date and time") from None
        row |= {"seconds": str(seconds)}
        yield _row(f"{path}, line {line}", line, row, "seconds", "ContextTokens", "GeneratedTokens", 1.0)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise WorkloadError(f"{path}, line {line}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise WorkloadError(f"{path}, line {line}: not a JSON object; a workload is {FORMATS}")
            if "input_length" in row:
                read = _row(f"{path}, line {line}", line, row, "timestamp", "input_length", "output_length", 1e-3)
                yield read._replace(blocks=_blocks(f"{path}, line {line}", row, read.prompt))
            elif "input_toks" in row:
                yield _row(f"{path}, line {line}", line, row, "arrival_time_ns", "input_toks", "output_toks", 1e-9)
            else:
                raise WorkloadError(
                    f"{path}, line {line}: neither input_length nor input_toks; a workload is {FORMATS}"
                )


def _blocks(where: str, row: dict[str, Any], prompt: int) -> tuple[int, ...]:
    """Hashes of the full blocks of a prompt; Mooncake's files have one of the last, partly filled block too."""
    given, block = row.get("hash_ids", []), PREFIX_BLOCK
    if not isinstance(given, list) or not all(type(x) is int for x in given):
        raise WorkloadError(f"{where}: hash_ids must be a list of whole numbers, one for every {block} prompt tokens")
    if given and len(given) != -(-prompt // block):
        raise WorkloadError(
            f"{where}: {len(given)} hash_ids for a prompt of {prompt} tokens; {-(-prompt // block)} blocks of {block} "
            "tokens, the last one partly filled, need as many"
        )
    return tuple(given[: prompt // block])


def _json(path: Path) -> Iterator[Row]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise WorkloadError(f"{path}: not JSON ({error}); lines of JSON go into a .jsonl") from None
    if isinstance(data, list):
        yield from _sharegpt(path, data)
    elif isinstance(data, dict) and {"input_lens", "output_lens"} <= set(data):
        yield from _vllm_bench(path, data)
    else:
        raise WorkloadError(
            f"{path}: neither a list of conversations nor input_lens and output_lens (vllm bench serve "
            f"--save-detailed); a workload is {FORMATS}"
        )


def _sharegpt(path: Path, data: list[Any]) -> Iterator[Row]:
    """The first two turns of every conversation that has them, as vLLM's benchmark takes it; all at time 0."""
    for number, one in enumerate(data, start=1):
        where = f"{path}, conversation {number}"
        if not isinstance(one, dict) or not isinstance(one.get("conversations"), list):
            raise WorkloadError(f"{where}: has no list 'conversations'; ShareGPT's are {{id, conversations}}")
        given = [turn.get("value") if isinstance(turn, dict) else None for turn in one["conversations"][:2]]
        turns = [turn for turn in given if isinstance(turn, str)]
        if len(turns) < len(given):
            raise WorkloadError(f"{where}: each turn must be {{from, value}} with a text")
        if len(turns) == 2 and all(turns):
            prompt, output = (-(-len(turn) // CHARACTERS) for turn in turns)
            row = {"at": 0, "prompt": prompt, "output": output}
            yield _row(where, number, row, "at", "prompt", "output", 1.0)._replace(counted=False)


def _vllm_bench(path: Path, data: dict[str, Any]) -> Iterator[Row]:
    """Requests that succeeded, by when each was ready to be sent; all at time 0 where the file has no start_times."""
    names = [name for name in ("input_lens", "output_lens", "start_times", "queue_times", "errors") if name in data]
    lists = [data[name] for name in names]
    if not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        raise WorkloadError(f"{path}: {', '.join(names)} must be lists of the same length, one entry per request")
    rows = [dict(zip(names, values, strict=True)) for values in zip(*lists, strict=True)]
    at = [_ready(f"{path}, request {number}", row) for number, row in enumerate(rows, start=1)]
    for number, row in enumerate(rows, start=1):
        if not row.get("errors") and row["output_lens"] != 0:
            row["start"] = at[number - 1] - min(at)
            yield _row(f"{path}, request {number}", number, row, "start", "input_lens", "output_lens", 1.0)


def _ready(where: str, row: dict[str, Any]) -> float:
    """s on the client's clock, before `--max-concurrency` held the request back."""
    start, queued = row.get("start_times", 0.0), row.get("queue_times", 0.0)
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (start, queued)):
        raise WorkloadError(f"{where}: start_times {start!r} and queue_times {queued!r} must be numbers of seconds")
    return float(start - queued)


def _row(where: str, line: int, row: dict[str, Any], at: str, prompt: str, output: str, second: float) -> Row:
    arrival = _number(where, row, at, second, 0.0, MAX_SECONDS)
    lengths = [_number(where, row, name, 1.0, 1, MAX_TOKENS) for name in (prompt, output)]
    for name, length in zip((prompt, output), lengths, strict=True):
        if length != int(length):
            raise WorkloadError(f"{where}: {name} '{row.get(name)}' must be a whole number")
    return Row(line, arrival, int(lengths[0]), int(lengths[1]), row.get("task") or "", row.get("request_id") or "")


def _number(where: str, row: dict[str, Any], name: str, unit: float, least: float, most: float) -> float:
    given = row.get(name)
    try:
        value = float(given) * unit  # type: ignore[arg-type]
    except (ValueError, TypeError):
        value = math.nan
    if not least <= value <= most:
        kind = "a number" if unit != 1 or least == 0 else "a whole number"
        raise WorkloadError(
            f"{where}: {name} '{'' if given is None else given}' must be {kind} from {least:g} to {most / unit:g}"
        )
    return value
