"""What importers share: metadata, token layout and CSV columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.trace.check import MAX_BYTES, RoutedModel
from moesim.trace.trace import DECODE, PREFILL, TraceInfo

ROWS_ARE = ("prefill", "decode", "both")  # both: the prompt, then what followed, in one run of rows
Counts = NDArray[np.int64]  # one number per request
Columns = dict[str, pa.ChunkedArray]


def prompt_lengths(counts: Counts, phase: str, prompt_tokens: int | None, where: str) -> Counts:
    """Prompt length of each request of `counts` rows, where the file itself gives none."""
    if prompt_tokens is not None:
        if prompt_tokens < 0:
            raise TraceError(f"{where}: --prompt-tokens {prompt_tokens}; must not be negative")
        return np.full(len(counts), prompt_tokens, np.int64)
    if phase != "prefill":
        raise TraceError(f"{where}: prompt lengths unknown; give --prompt-tokens N or add them to the file")
    return counts


def prefill_rows(counts: Counts, prompt: Counts, phase: str, where: str) -> Counts:
    """How many of each request's rows are prefill, `phase` saying what the rows are."""
    if phase not in ROWS_ARE:
        raise TraceError(f"{where}: phase '{phase}'{nearest(phase, ROWS_ARE)}")
    return {"prefill": counts, "decode": np.zeros_like(counts), "both": np.minimum(counts, prompt)}[phase]


def lay_out(
    counts: Counts, prefill: Counts, prompt: Counts
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int32]]:
    """Request, phase and position of each row: prefill rows start at position 0, decode rows at the prompt's end."""
    request = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    within = np.arange(len(request)) - (np.cumsum(counts) - counts)[request]
    decodes = within >= prefill[request]
    position = np.where(decodes, within + (prompt - prefill)[request], within)
    return request, np.where(decodes, DECODE, PREFILL).astype(np.uint8), position.astype(np.int32)


def describe(model: RoutedModel, path: Path, engine: str, source: str) -> TraceInfo:
    """Metadata of a recorded trace of `model`; the file's name stands in for an absent source."""
    return TraceInfo(
        model=model.name,
        experts=model.experts,
        top_k=model.top_k,
        moe_layers=tuple(model.moe_layers),
        engine=engine,
        source=source or path.name,
    )


def read_csv(path: Path, kinds: dict[str, pa.DataType], required: tuple[str, ...]) -> Columns:
    """The columns named in `kinds` that the file has; its header must have those required and no others."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise TraceError(f"{path}: more than {MAX_BYTES >> 30} GiB; split it first")
        convert = pa.csv.ConvertOptions(column_types=kinds, null_values=[""])
        # NOTE: one thread, as only then the error of a bad value names its row.
        table = pa.csv.read_csv(path, pa.csv.ReadOptions(use_threads=False), convert_options=convert)
    except OSError as error:
        raise TraceError(f"{path}: cannot read ({error.strerror or error})") from error
    except pa.ArrowException as error:
        raise TraceError(f"{path}: not a readable CSV file ({' '.join(str(error).split())})") from error
    names = table.column_names
    for name in required:
        if name not in names:
            raise TraceError(f"{path}: no column '{name}'; the header must name {', '.join(required)}")
    for name in names:
        if name not in kinds or names.count(name) > 1:
            raise TraceError(f"{path}: unexpected column '{name}'{nearest(name, kinds)}")
        if table[name].null_count:
            row = table[name].is_null().to_numpy().argmax()
            raise TraceError(f"{path}, row {row}: column '{name}' is empty; fill it")
    if not len(table):
        raise TraceError(f"{path}: no rows below the header")
    return {name: table[name] for name in names}
