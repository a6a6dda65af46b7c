"""A Model from the header of a GGUF file: its metadata and tensor table, never its weights.

Written from the public specification (ggml-org/ggml, docs/gguf.md). Sizes are the real bytes of each tensor, as quants
differ from layer to layer. Everything in a file is a claim: counts and lengths are bounded before they are used.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from moesim.errors import ModelError

# Elements and bytes of a block, by ggml type number (ggml.h); other types are measured by their place in the file.
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),  # F32 F16 Q4_0 to Q8_0
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),  # Q2_K to Q8_K
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110),  # IQ2_XXS to IQ3_S
    22: (256, 82), 23: (256, 136), 29: (256, 56), 34: (256, 54), 35: (256, 66),  # IQ2_S IQ4_XS IQ1_M TQ1_0 TQ2_0
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2),  # I8 to I64 F64 BF16
    39: (32, 17), 40: (64, 36), 41: (128, 18),  # MXFP4 NVFP4 Q1_0
}  # fmt: skip
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_HEADER = 512 << 20  # bytes read or skipped in one file
MAX_KEYS, MAX_TENSORS, MAX_DIMS = 1 << 16, 1 << 17, 4
MAX_NAME, MAX_STRING, MAX_ITEMS, KEPT_ITEMS = 1 << 16, 16 << 20, 1 << 22, 1 << 14
MAX_ELEMENTS, MAX_PARTS = 1 << 48, 1000
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]  # fastest dimension first, as ggml writes it
    bytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass
class Header:
    """Metadata and tensors of one model, its parts joined."""

    values: dict[str, Any] = field(default_factory=dict)  # short arrays as tuples; long ones only in `lengths`
    lengths: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class _Stream:
    """Reads little-endian values, refusing what would run past the file or the header limit."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size = file, path, size
        self.left = min(size, MAX_HEADER)

    def take(self, n: int) -> bytes:
        self._spend(n)
        data = self.file.read(n)
        if len(data) != n:
            raise self.error("is cut off inside its header; download it again")
        return data

    def skip(self, n: int) -> None:
        self._spend(n)
        self.file.seek(n, 1)

    def number(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def count(self, what: str, limit: int) -> int:
        n = self.number("<Q")
        if n > limit:
            raise self.error(f"says it has {n} {what}, more than {limit}; it is damaged")
        return n

    def string(self, limit: int = MAX_STRING) -> str:
        return self.take(self.count("bytes in a text", limit)).decode("utf-8", "replace")

    def error(self, message: str) -> ModelError:
        return ModelError(f"{self.path}: {message}")

    def _spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            rule = "is cut off inside its header; download it again"
            raise self.error(
                rule if self.size <= MAX_HEADER else f"has a header larger than {MAX_HEADER >> 20} MiB; it is damaged"
            )


def read_header(path: Path) -> Header:
    """The header of a GGUF file; of a split one, whichever part is named, of all its parts."""
    header = Header()
    for part in _parts(path):
        _read_part(part, header)
    if header.values.get("split.count", 0) > 1 and not PART.fullmatch(path.name):
        raise ModelError(f"{path}: is one part of a split model; keep its name ending in -00001-of-0000N.gguf")
    return header


def _parts(path: Path) -> list[Path]:
    match = PART.fullmatch(path.name)
    if match is None:
        return [path]
    stem, total = match[1], int(match[3])
    if not 0 < total <= MAX_PARTS:
        raise ModelError(f"{path}: claims {total} parts; must be 1 to {MAX_PARTS}")
    parts = [path.with_name(f"{stem}-{i:05d}-of-{match[3]}.gguf") for i in range(1, total + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise ModelError(f"{path}: part {missing[0]} is missing beside it ({len(missing)} of {total} parts in all)")
    return parts


def _read_part(path: Path, header: Header) -> None:
    try:
        with path.open("rb") as file:
            _read_stream(_Stream(file, path, path.stat().st_size), header)
    except (OSError, ValueError) as error:  # ValueError: a path no system can have
        raise ModelError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _read_stream(stream: _Stream, header: Header) -> None:
    if stream.take(4) != b"GGUF":
        raise stream.error("is not a GGUF file: it does not start with 'GGUF'")
    version = stream.number("<I")
    if version not in (2, 3):
        raise stream.error(f"is GGUF version {version}; read are 2 and 3, little-endian")
    tensors, keys = stream.count("tensors", MAX_TENSORS), stream.count("metadata keys", MAX_KEYS)
    for _ in range(keys):
        _read_value(stream, stream.string(MAX_NAME), header)
    _read_tensors(stream, tensors, header)


def _read_value(stream: _Stream, key: str, header: Header) -> None:
    kind = stream.number("<I")
    if kind in SCALARS:
        header.values[key] = stream.number(SCALARS[kind])
    elif kind == STRING:
        header.values[key] = stream.string()
    elif kind == ARRAY:
        _read_array(stream, key, header)
    else:
        raise stream.error(f"gives {key[:60]!r} a value of unknown type {kind}; it is damaged or newer than version 3")


def _read_array(stream: _Stream, key: str, header: Header) -> None:
    kind, n = stream.number("<I"), stream.count(f"items in {key[:60]!r}", MAX_ITEMS)
    header.lengths[key] = n
    if kind == STRING:
        for _ in range(n):
            stream.skip(stream.count("bytes in a text", MAX_STRING))
    elif kind not in SCALARS:
        raise stream.error(f"has an array {key[:60]!r} of type {kind}; read are arrays of numbers and texts")
    elif n <= KEPT_ITEMS:
        item = SCALARS[kind]
        header.values[key] = struct.unpack(f"<{n}{item[1]}", stream.take(n * struct.calcsize(item)))
    else:
        stream.skip(n * struct.calcsize(SCALARS[kind]))


def _read_tensors(stream: _Stream, count: int, header: Header) -> None:
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name, dims = stream.string(MAX_NAME), stream.number("<I")
        if not 1 <= dims <= MAX_DIMS:
            raise stream.error(f"tensor {name[:60]!r} has {dims} dimensions; must be 1 to {MAX_DIMS}")
        shape = struct.unpack(f"<{dims}Q", stream.take(8 * dims))
        kind, offset = stream.number("<I"), stream.number("<Q")
        if not 0 < math.prod(shape) < MAX_ELEMENTS:
            raise stream.error(f"tensor {name[:60]!r} has shape {shape}, which cannot be; the file is damaged")
        if name in entries or name in header.tensors:
            raise stream.error(f"tensor {name[:60]!r} is listed twice")
        entries[name] = shape, kind, offset
    starts = sorted({offset for *_, offset in entries.values()})
    ends = dict(zip(starts, [*starts[1:], _data_bytes(stream, header)], strict=False))
    for name, (shape, kind, offset) in entries.items():
        header.tensors[name] = Tensor(shape, _tensor_bytes(stream.error, name, shape, kind, ends[offset] - offset))


def _data_bytes(stream: _Stream, header: Header) -> int:
    """Length of the tensor data, which starts after the header at a multiple of the alignment."""
    alignment = header.values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise stream.error(f"has alignment {alignment!r}; must be a positive number of bytes")
    return stream.size - -(-stream.file.tell() // alignment) * alignment


def _tensor_bytes(error: Callable[[str], ModelError], name: str, shape: tuple[int, ...], kind: int, room: int) -> int:
    if kind in BLOCKS:
        per_block, size = BLOCKS[kind]
        if shape[0] % per_block:
            raise error(
                f"tensor {name[:60]!r} has rows of {shape[0]}, but its type {kind} stores blocks of {per_block}"
            )
        return math.prod(shape) // per_block * size
    if 0 < room <= 8 * math.prod(shape) + MAX_NAME:
        return room  # a fork's type, padding included
    raise error(f"tensor {name[:60]!r} has the unknown type {kind}, and its place in the file gives no size for it")
