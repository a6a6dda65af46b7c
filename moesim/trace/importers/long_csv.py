"""Long CSV: one row per chosen expert, with columns token, layer, rank, expert; the order of rows does not matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.trace.check import RoutedModel, narrow
from moesim.trace.importers.common import Columns, Counts, describe, lay_out, prefill_rows, prompt_lengths, read_csv
from moesim.trace.trace import PHASES, PREFILL, Requests, Trace

_REQUIRED = ("token", "layer", "rank", "expert")
_COLUMNS = {name: pa.int64() for name in _REQUIRED} | {
    "request": pa.string(),
    "phase": pa.string(),
    "weight": pa.float32(),
    "task": pa.string(),
}
_TOKEN_BITS = 31
Places = NDArray[np.int64]  # one number per row of the CSV


def read(
    path: Path,
    model: RoutedModel,
    *,
    phase: str | None = None,
    prompt_tokens: int | None = None,
    task: str = "",
    engine: str = "",
    source: str = "",
) -> Trace:
    """A trace from `token,layer,rank,expert` and the optional columns `request`, `phase`, `weight` and `task`.

    Tokens of a request are ordered by `token`; `layer` is the model's own layer number; `rank` counts from 0. Without
    a `phase` column, `phase` says what the rows are: prefill, decode, or both. Raises TraceError.
    """
    columns = read_csv(path, _COLUMNS, _REQUIRED)
    for name, option in (("phase", phase), ("task", task)):
        if name in columns and option:
            raise TraceError(f"{path}: has a column {name}, so --{name} {option} contradicts it; leave it out")
    request, names = _codes(columns["request"]) if "request" in columns else (0, [path.stem])
    token = columns["token"].to_numpy()
    limit = 1 << _TOKEN_BITS
    _refuse((token < 0) | (token >= limit), path, lambda row: f"token {token[row]}; must be 0 to {limit - 1}")
    keys, first, row_of = np.unique((request << _TOKEN_BITS) + token, return_index=True, return_inverse=True)
    cells = _cells(columns, model, row_of, len(keys), path)
    counts = np.bincount(keys >> _TOKEN_BITS)
    phases = _phases(columns["phase"], row_of, first, path) if "phase" in columns else None
    prefill, prompt = _prompts(counts, phases, phase, prompt_tokens, path)
    of_row, kinds, position = lay_out(counts, prefill, prompt)
    shape = (len(keys), len(model.moe_layers), model.top_k)
    experts = narrow(columns["expert"].to_numpy(), np.int16, "expert", str(path))
    weights = columns["weight"].to_numpy() if "weight" in columns else None
    return Trace(
        info=describe(model, path, engine, source),
        requests=Requests(
            request_id=tuple(names),
            task=_tasks(columns["task"], of_row[row_of], path) if "task" in columns else (task,) * len(names),
            prompt_tokens=prompt.astype(np.int32),
        ),
        experts=_scatter(experts, cells, np.int16, shape),
        request=of_row,
        phase=kinds if phases is None else phases,
        position=position,
        weights=None if weights is None else _scatter(weights, cells, np.float16, shape),
    )


def _refuse(bad: NDArray[np.bool_], path: Path, why: Callable[[int], str]) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise TraceError(f"{path}, row {row}: {why(row)}")


def _codes(column: pa.ChunkedArray) -> tuple[Places, list[str]]:
    """A text column as numbers, and the names they stand for in order of appearance."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _cells(columns: Columns, model: RoutedModel, row_of: Places, tokens: int, path: Path) -> Places:
    """Where each CSV row belongs in a flat [tokens, layers, k]; every place must be filled exactly once."""
    known, k = np.array(model.moe_layers), model.top_k
    token, layer, rank = (columns[name].to_numpy() for name in ("token", "layer", "rank"))
    index = np.searchsorted(known, layer).clip(max=len(known) - 1)
    _refuse(
        known[index] != layer,
        path,
        lambda row: f"layer {layer[row]} is not one of {model.name}'s MoE layers, {known[0]} to {known[-1]}",
    )
    _refuse((rank < 0) | (rank >= k), path, lambda row: f"rank {rank[row]}; {model.name} has ranks 0 to {k - 1}")
    rows, per_token = np.bincount(row_of, minlength=tokens), len(known) * k
    _refuse(
        rows[row_of] != per_token,
        path,
        lambda row: f"token {token[row]} has {rows[row_of[row]]} rows; needs {per_token} ({len(known)} layers x {k})",
    )
    cells = (row_of * len(known) + index) * k + rank
    filled = np.zeros(tokens * per_token, bool)
    filled[cells] = True
    complete = np.asarray(filled.reshape(tokens, -1).all(axis=1))
    _refuse(
        ~complete[row_of],
        path,
        lambda row: f"token {token[row]} repeats a rank of a layer; needs ranks 0 to {k - 1} of each layer once",
    )
    return cells


def _scatter(values: NDArray[Any], cells: Places, dtype: Any, shape: tuple[int, int, int]) -> NDArray[Any]:
    out = np.empty(cells.size, dtype)
    with np.errstate(over="ignore"):  # too large for float16 becomes infinite, which the checks refuse
        out[cells] = values
    return out.reshape(shape)


def _phases(column: pa.ChunkedArray, row_of: Places, first: Places, path: Path) -> NDArray[np.uint8]:
    """The phase of each token; its rows must agree."""
    codes, names = _codes(column)
    unknown = np.array([name not in PHASES for name in names])
    _refuse(unknown[codes], path, lambda row: f"phase '{names[codes[row]]}'{nearest(names[codes[row]], PHASES)}")
    phases = np.array([PHASES.index(name) for name in names], np.uint8)[codes]
    of_token = phases[first]
    _refuse(phases != of_token[row_of], path, lambda row: "phase differs from another row of the same token")
    return of_token


def _tasks(column: pa.ChunkedArray, request: NDArray[np.int32], path: Path) -> tuple[str, ...]:
    """The task of each request; its rows must agree."""
    codes, names = _codes(column)
    of_request = np.zeros(request.max() + 1, np.int64)
    of_request[request] = codes
    _refuse(codes != of_request[request], path, lambda row: "task differs from another row of the same request")
    return tuple(names[code] for code in of_request)


def _prompts(
    counts: Counts, phases: NDArray[np.uint8] | None, phase: str | None, prompt_tokens: int | None, path: Path
) -> tuple[Counts, Counts]:
    """Prefill rows and prompt length of each request."""
    if phases is None:
        if phase is None:
            raise TraceError(f"{path}: no column phase; add it, or say with --phase what the rows are")
        prompt = prompt_lengths(counts, phase, prompt_tokens, str(path))
        return prefill_rows(counts, prompt, phase, str(path)), prompt
    prefill = np.add.reduceat((phases == PREFILL).astype(np.int64), np.cumsum(counts) - counts)
    if prompt_tokens is None and not prefill.all():
        raise TraceError(
            f"{path}: request number {int(np.argmin(prefill))} (from 0) has no prefill rows, so its prompt length is "
            "unknown; give --prompt-tokens N"
        )
    return prefill, prefill if prompt_tokens is None else prompt_lengths(counts, "both", prompt_tokens, str(path))
