"""Trace files: Parquet, one row per token. traces/README.md documents the schema for users."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.files import atomic
from moesim.trace import cache
from moesim.trace.check import check, check_info, check_matches, check_size, narrow
from moesim.trace.trace import PHASES, Requests, Trace, TraceInfo

__all__ = ["check_matches", "read", "write"]

SCHEMA_VERSION = 1
ROW_GROUP = 65536
_METADATA = b"moesim"
_REQUIRED = ("request_id", "phase", "position", "prompt_tokens", "experts")
_OPTIONAL = ("task", "arrival_ns", "weights", "probabilities")
_TEXT = ("request_id", "task", "phase")


def write(trace: Trace, path: Path | str) -> None:
    """Write `trace` as Parquet, whole or not at all; the same trace gives the same bytes. Raises TraceError."""
    check(trace, str(path))
    schema = _schema(trace)
    try:
        with (
            atomic(path) as temporary,
            pq.ParquetWriter(
                temporary, schema, compression="zstd", compression_level=3, use_dictionary=True,
                write_page_checksum=True,
            ) as writer,
        ):  # fmt: skip
            for start in range(0, trace.tokens, ROW_GROUP):
                writer.write_table(_table(trace, slice(start, start + ROW_GROUP), schema), row_group_size=ROW_GROUP)
    except OSError as error:
        raise TraceError(f"{path}: cannot write ({error.strerror or error})") from error


def read(path: Path | str) -> Trace:
    """The trace in a Parquet file, checked; arrays are read-only. Raises TraceError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            content_hash = hashlib.file_digest(file, "sha256").hexdigest()
            trace = cache.load(content_hash)
            if trace is None:
                file.seek(0)
                trace = _parse(file, str(path), content_hash)
                cache.store(trace)
            return trace
    except OSError as error:
        raise TraceError(f"{path}: cannot read ({error.strerror or error})") from error


def _schema(trace: Trace) -> pa.Schema:
    info = trace.info
    text = pa.dictionary(pa.int32(), pa.string())
    columns = {
        "request_id": text,
        "task": text,
        "phase": text,
        "position": pa.int32(),
        "prompt_tokens": pa.int32(),
        "arrival_ns": pa.int64(),
        "experts": pa.list_(pa.int16(), trace.layers * info.top_k),
        "weights": pa.list_(pa.float16(), trace.layers * info.top_k),
        "probabilities": pa.list_(pa.float16(), trace.layers * info.experts),
    }
    present = {
        "task": any(trace.requests.task),
        "arrival_ns": trace.requests.arrival_ns is not None,
        "weights": trace.weights is not None,
        "probabilities": trace.probabilities is not None,
    }
    used = [pa.field(name, kind, nullable=False) for name, kind in columns.items() if present.get(name, True)]
    try:
        text_of_info = json.dumps({"schema_version": SCHEMA_VERSION, **asdict(info)}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TraceError(f"trace of {info.model}: metadata cannot be written as JSON ({error})") from error
    return pa.schema(used, metadata={_METADATA: text_of_info.encode()})


def _table(trace: Trace, rows: slice, schema: pa.Schema) -> pa.Table:
    requests, index = trace.requests, trace.request[rows]
    first, last = int(index[0]), int(index[-1])  # only these requests' names belong in this row group

    def text(values: tuple[str, ...], codes: NDArray[Any]) -> pa.Array:
        encoded = pa.array(values, pa.string()).dictionary_encode()
        return pa.DictionaryArray.from_arrays(pa.array(_numpy(encoded.indices)[codes]), encoded.dictionary)

    columns = {
        "request_id": text(requests.request_id[first : last + 1], index - first),
        "task": text(requests.task[first : last + 1], index - first),
        "phase": text(PHASES, trace.phase[rows]),
        "position": pa.array(trace.position[rows]),
        "prompt_tokens": pa.array(requests.prompt_tokens[index]),
    }
    if requests.arrival_ns is not None:
        columns["arrival_ns"] = pa.array(requests.arrival_ns[index])
    for name in ("experts", "weights", "probabilities"):
        if (array := getattr(trace, name)) is not None:
            values = pa.array(array[rows].reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(values, type=schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _parse(file: IO[bytes], where: str, content_hash: str) -> Trace:
    try:
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        info = _read_info(parquet.schema_arrow, where)
        columns = _read_columns(parquet, info, where)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise TraceError(f"{where}: not a whole Parquet file ({reason}); copy or import it again") from error
    except MemoryError as error:
        raise TraceError(f"{where}: does not fit this machine's memory; cut it into parts elsewhere first") from error
    request, requests = _group(columns, where)
    trace = Trace(
        info=info,
        requests=requests,
        experts=columns["experts"],
        request=request,
        phase=columns["phase"],
        position=columns["position"],
        weights=columns.get("weights"),
        probabilities=columns.get("probabilities"),
        content_hash=content_hash,
    )
    check(trace, where)
    for array in cache.arrays_of(trace).values():
        array.flags.writeable = False  # facts only; the cached arrays of a second read are read-only as well
    return trace


def _read_info(schema: pa.Schema, where: str) -> TraceInfo:
    raw = (schema.metadata or {}).get(_METADATA)
    if raw is None:
        raise TraceError(f"{where}: no 'moesim' metadata, so not a moesim trace; make one with: moesim trace import")
    try:
        values = json.loads(raw)
    except ValueError as error:
        raise TraceError(f"{where}: 'moesim' metadata is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise TraceError(f"{where}: 'moesim' metadata must be a JSON object, not {type(values).__name__}")
    return _parse_info(values, where)


def _parse_info(values: dict[str, Any], where: str) -> TraceInfo:
    version = values.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise TraceError(
            f"{where}: schema_version {version!r}, but this moesim reads {SCHEMA_VERSION}; import the trace again"
        )
    kinds: dict[str, type] = {f.name: str for f in fields(TraceInfo)}
    kinds |= {"experts": int, "top_k": int, "moe_layers": list, "extra": dict}
    for name in ("model", "experts", "top_k", "moe_layers"):
        if name not in values:
            raise TraceError(f"{where}: metadata lacks '{name}'; traces/README.md lists the keys")
    for name, value in values.items():
        if name not in kinds:
            raise TraceError(f"{where}: unknown metadata key '{name}'{nearest(name, kinds)}")
        if type(value) is not kinds[name]:
            raise TraceError(f"{where}: metadata '{name}' is {value!r}; must be of type {kinds[name].__name__}")
    if any(type(layer) is not int for layer in values["moe_layers"]):
        raise TraceError(f"{where}: metadata 'moe_layers' is {values['moe_layers']!r}; must be whole numbers")
    info = TraceInfo(**{**values, "moe_layers": tuple(values["moe_layers"])})
    check_info(info, where)
    return info


def _read_columns(parquet: pq.ParquetFile, info: TraceInfo, where: str) -> dict[str, Any]:
    """Every column as numpy: text as (codes, names), lists as [tokens, layers, width]."""
    names = parquet.schema_arrow.names
    for name in _REQUIRED:
        if name not in names:
            raise TraceError(f"{where}: no column '{name}'; traces/README.md lists the columns")
    known = _REQUIRED + _OPTIONAL
    for name in names:
        if name not in known or names.count(name) > 1:
            raise TraceError(f"{where}: unexpected column '{name}'{nearest(name, known)}")
    tokens, layers = parquet.metadata.num_rows, len(info.moe_layers)
    widths = {"experts": info.top_k, "weights": info.top_k, "probabilities": info.experts}
    check_size(tokens, 2 * layers * sum(widths[n] for n in widths if n in names), where)
    scalars = {"position": np.int32, "prompt_tokens": np.int32, "arrival_ns": np.int64}
    out: dict[str, Any] = {n: np.empty(tokens, dtype) for n, dtype in scalars.items() if n in names}
    for name in (n for n in widths if n in names):
        out[name] = np.empty((tokens, layers, widths[name]), np.int16 if name == "experts" else np.float16)
    text = {name: _Text(tokens) for name in _TEXT if name in names}
    row = 0
    for batch in parquet.iter_batches(ROW_GROUP):
        batch.validate(full=True)  # a damaged footer can make dictionary codes without names
        rows = slice(row, row + len(batch))
        if rows.stop > tokens:
            row = rows.stop
            break
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            _refuse_nulls(column, f"{where}, row {row}", name)
            if name in text:
                text[name].add(column, rows, f"{where}: column '{name}'")
            elif name in widths:
                _fill_lists(out[name], rows, column, name, where)
            else:
                _fill(out[name], rows, column, name, where)
        row = rows.stop
    if row != tokens:
        raise TraceError(f"{where}: {row} rows, but its footer promises {tokens}; copy or import it again")
    return out | text


class _Text:
    """A text column as small integers: names in order of appearance, and a code per row."""

    def __init__(self, tokens: int) -> None:
        self.codes = np.empty(tokens, np.int32)
        self._code_of: dict[str, int] = {}

    @property
    def names(self) -> list[str]:
        return list(self._code_of)

    def add(self, column: pa.Array, rows: slice, what: str) -> None:
        if _is_text(column.type):
            column = column.dictionary_encode()
        if not (pa.types.is_dictionary(column.type) and _is_text(column.type.value_type)):
            raise TraceError(f"{what} is {column.type}; must be text")
        known = [self._code_of.setdefault(name, len(self._code_of)) for name in column.dictionary.to_pylist()]
        self.codes[rows] = np.array(known, np.int32)[_numpy(column.indices)]


def _numpy(array: pa.Array) -> NDArray[Any]:
    # NOTE: not array.to_numpy(), which imports pandas where it is installed: 0.5 s.
    return np.from_dlpack(array)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _refuse_nulls(column: pa.Array, place: str, name: str) -> None:
    if column.null_count:
        raise TraceError(f"{place} or after: column '{name}' has {column.null_count} empty values; fill them")


def _fill(out: NDArray[Any], rows: slice, column: pa.Array, name: str, where: str) -> None:
    if not pa.types.is_integer(column.type):
        raise TraceError(f"{where}: column '{name}' is {column.type}; must be whole numbers ({out.dtype})")
    out[rows] = narrow(_numpy(column), out.dtype, name, where, row=rows.start)


def _fill_lists(out: NDArray[Any], rows: slice, column: pa.Array, name: str, where: str) -> None:
    """Lists of one length each, of any width of whole or floating-point number that fits."""
    kind = column.type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    right = pa.types.is_integer if name == "experts" else pa.types.is_floating
    if not is_list or not right(kind.value_type):
        raise TraceError(f"{where}: column '{name}' is {kind}; must be lists of {out.dtype}")
    width = out.shape[1] * out.shape[2]
    sizes = np.full(len(column), kind.list_size) if pa.types.is_fixed_size_list(kind) else _list_sizes(column)
    if (sizes != width).any():
        row = int(np.argmax(sizes != width))
        raise TraceError(
            f"{where}, row {rows.start + row}: {name} has {sizes[row]} values; "
            f"must be {width} ({out.shape[1]} layers x {out.shape[2]})"
        )
    values = column.flatten()
    _refuse_nulls(values, f"{where}, row {rows.start}", name)
    flat = _numpy(values)
    if name == "experts":
        flat = narrow(flat, out.dtype, "expert", where, row=rows.start, per_row=width)
    with np.errstate(over="ignore"):  # a value too large for float16 becomes infinite, which the checks refuse
        out[rows] = flat.reshape(-1, *out.shape[1:])


def _list_sizes(column: pa.Array) -> NDArray[Any]:
    return np.diff(_numpy(column.offsets))


def _group(columns: dict[str, Any], where: str) -> tuple[NDArray[np.int32], Requests]:
    """Number the requests in order of their rows, and take what must be the same on all rows of one."""
    codes = columns["request_id"].codes
    changes = np.diff(codes, prepend=-1) != 0
    starts = np.flatnonzero(changes)
    order = codes[starts]
    _, first_of = np.unique(order, return_index=True)
    names = columns["request_id"].names
    if first_of.size < order.size:
        again = int(np.setdiff1d(np.arange(order.size), first_of)[0])
        raise TraceError(
            f"{where}, row {starts[again]}: request_id '{names[order[again]]}' appears again after other requests; "
            "rows of a request must be contiguous, and ids unique"
        )
    request = (np.cumsum(changes) - 1).astype(np.int32)
    per_request = {}
    for name in ("prompt_tokens", "arrival_ns", "task"):
        if name in columns:
            values = columns[name].codes if name == "task" else columns[name]
            per_request[name] = values[starts]
            differs = values != per_request[name][request]
            if differs.any():
                row = int(np.argmax(differs))
                raise TraceError(
                    f"{where}, row {row}: {name} differs from the first row of request "
                    f"'{names[codes[row]]}'; must be the same on all its rows"
                )
    columns["phase"] = _phases(columns["phase"], where)
    tasks = columns["task"].names if "task" in columns else [""]
    return request, Requests(
        request_id=tuple(names[code] for code in order),
        task=tuple(tasks[code] for code in per_request.get("task", np.zeros(order.size, np.int32))),
        prompt_tokens=per_request["prompt_tokens"],
        arrival_ns=per_request.get("arrival_ns"),
    )


def _phases(column: _Text, where: str) -> NDArray[np.uint8]:
    for code, name in enumerate(column.names):
        if name not in PHASES and (column.codes == code).any():
            row = int(np.argmax(column.codes == code))
            raise TraceError(f"{where}, row {row}: phase '{name}'; must be prefill or decode")
    lookup = [PHASES.index(name) if name in PHASES else 0 for name in column.names]
    return np.array(lookup, np.uint8)[column.codes]
