"""Routed experts as NumPy arrays: .npy [tokens, layers, k] as vLLM and SGLang return them, or .npz of many requests."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from moesim.errors import TraceError, nearest
from moesim.trace.check import MAX_BYTES, RoutedModel, narrow
from moesim.trace.importers.common import describe, lay_out, prefill_rows, prompt_lengths
from moesim.trace.trace import Requests, Trace

_MEMBERS = {"ids": 3, "probs": 3, "offsets": 1, "prompt_len": 1, "task": 1}  # with their dimensions


def read(
    path: Path,
    model: RoutedModel,
    *,
    phase: str,
    prompt_tokens: int | None = None,
    task: str = "",
    engine: str = "",
    source: str = "",
) -> Trace:
    """A trace from `ids [tokens, layers, k]`, with optional members in an .npz.

    `probs` (same shape) are the gate weights, `offsets [requests + 1]` the rows of each request, `prompt_len
    [requests]` prompt lengths and `task [requests]` labels. `phase` says what the rows are: prefill, decode, or both
    (prompt first). `prompt_tokens` and `task` stand in for an absent `prompt_len` and `task`. Raises TraceError.
    """
    arrays = _load(path)
    ids = _ids(arrays["ids"], model, path)
    counts = _counts(arrays.get("offsets"), len(ids), path)
    prompt = _prompts(arrays.get("prompt_len"), counts, phase, prompt_tokens, path)
    request, kinds, position = lay_out(counts, prefill_rows(counts, prompt, phase, str(path)), prompt)
    return Trace(
        info=describe(model, path, engine, source),
        requests=Requests(
            request_id=tuple(f"{path.stem}-{i}" for i in range(len(counts))),
            task=_tasks(arrays.get("task"), len(counts), task, path),
            prompt_tokens=prompt.astype(np.int32),
        ),
        experts=ids,
        request=request,
        phase=kinds,
        position=position,
        weights=_weights(arrays.get("probs"), ids.shape, path),
    )


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        if zipfile.is_zipfile(path):
            return _load_npz(path)
        with path.open("rb") as file:
            _check_header(file, "ids", path)
            file.seek(0)
            return {"ids": npy.read_array(file, allow_pickle=False)}
    except OSError as error:
        raise TraceError(f"{path}: cannot read ({error.strerror or error})") from error
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise TraceError(f"{path}: not a whole .npy or .npz file ({error}); write it with numpy.save(z)") from error
    except MemoryError as error:
        raise TraceError(f"{path}: does not fit this machine's memory; split it first") from error


def _load_npz(path: Path) -> dict[str, NDArray[Any]]:
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            name = entry.filename.removesuffix(".npy")
            if name not in _MEMBERS:
                raise TraceError(f"{path}: unexpected array '{name}'{nearest(name, _MEMBERS)}")
            with archive.open(entry) as file:
                _check_header(file, name, path)
            with archive.open(entry) as file:
                arrays[name] = npy.read_array(file, allow_pickle=False)
    if "ids" not in arrays:
        raise TraceError(f"{path}: no array 'ids' of shape [tokens, layers, k]; it holds {', '.join(arrays) or 'none'}")
    return arrays


def _check_header(file: IO[bytes], name: str, path: Path) -> None:
    """Dimensions and size, before memory is taken for them."""
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if len(shape) != _MEMBERS[name]:
        raise TraceError(f"{path}: {name} has shape {list(shape)}; must have {_MEMBERS[name]} dimensions")
    size = dtype.itemsize * int(np.prod(shape, dtype=object))
    if size > MAX_BYTES:
        raise TraceError(f"{path}: {name} takes {size / 2**30:.0f} GiB, more than {MAX_BYTES >> 30} GiB; split it")


def _ids(ids: NDArray[Any], model: RoutedModel, path: Path) -> NDArray[np.int16]:
    if ids.dtype.kind not in "iu":
        raise TraceError(f"{path}: ids are {ids.dtype}; must be whole numbers")
    expected = (len(model.moe_layers), model.top_k)
    if ids.shape[1:] != expected:
        raise TraceError(
            f"{path}: ids have shape {list(ids.shape)}, but {model.name} needs [tokens, {expected[0]} MoE layers, "
            f"{expected[1]} experts per token]; choose the right --model or reorder the axes"
        )
    if not len(ids):
        raise TraceError(f"{path}: ids hold no tokens")
    per_row = expected[0] * expected[1]
    return narrow(ids.reshape(-1), np.int16, "expert", str(path), per_row=per_row).astype(np.int16).reshape(ids.shape)


def _counts(offsets: NDArray[Any] | None, tokens: int, path: Path) -> NDArray[np.int64]:
    """Rows of each request."""
    if offsets is None:
        return np.array([tokens])
    _require_whole("offsets", offsets, path)
    offsets = offsets.astype(np.int64)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != tokens:
        ends = f"{offsets[0]} to {offsets[-1]}" if len(offsets) else "nothing"
        raise TraceError(f"{path}: offsets go from {ends}; must go from 0 to the {tokens} tokens of ids")
    counts = np.diff(offsets)
    if (counts < 1).any():
        first = int(np.argmax(counts < 1))
        raise TraceError(f"{path}: offsets give request {first} {counts[first]} tokens; each request needs at least 1")
    return counts


def _prompts(
    given: NDArray[Any] | None, counts: NDArray[np.int64], phase: str, stand_in: int | None, path: Path
) -> NDArray[np.int64]:
    if given is not None and stand_in is not None:
        raise TraceError(f"{path}: has prompt_len, so --prompt-tokens {stand_in} contradicts it; leave it out")
    if given is not None:
        _require_whole("prompt_len", given, path)
        if len(given) != len(counts):
            raise TraceError(f"{path}: prompt_len has {len(given)} values, but there are {len(counts)} requests")
        return narrow(given, np.int32, "prompt_len", str(path)).astype(np.int64)
    return prompt_lengths(counts, phase, stand_in, str(path))


def _tasks(given: NDArray[Any] | None, requests: int, stand_in: str, path: Path) -> tuple[str, ...]:
    if given is None:
        return (stand_in,) * requests
    if stand_in:
        raise TraceError(f"{path}: has an array task, so --task {stand_in} contradicts it; leave it out")
    if given.dtype.kind != "U" or len(given) != requests:
        raise TraceError(
            f"{path}: task is {given.dtype} {list(given.shape)}; must be {requests} strings, one a request"
        )
    return tuple(given.tolist())


def _weights(probs: NDArray[Any] | None, shape: tuple[int, ...], path: Path) -> NDArray[np.float16] | None:
    if probs is None:
        return None
    if probs.dtype.kind != "f" or probs.shape != shape:
        raise TraceError(
            f"{path}: probs are {probs.dtype} {list(probs.shape)}; must be floating-point with the shape of ids, "
            f"{list(shape)}"
        )
    with np.errstate(over="ignore"):  # too large for float16 becomes infinite, which the checks refuse
        return probs.astype(np.float16)


def _require_whole(name: str, values: NDArray[Any], path: Path) -> None:
    if values.dtype.kind not in "iu":
        raise TraceError(f"{path}: {name} is {values.dtype}; must be whole numbers")
