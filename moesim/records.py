"""What happened, as flat columns. Metrics, plots and timelines read these; the engine knows none of them."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP = ("start", "end", "prefill_tokens", "decode_tokens", "sequences", "kv_bytes")
LAYER = ("step", "layer", "start", "routed", "end", "hits", "lates", "misses", "host", "waited")
TRANSFER = ("link", "start", "end", "layer", "expert", "bytes", "kind")
REQUEST = ("request", "arrival", "sent", "admitted", "first_token", "finished", "prompt_tokens", "output_tokens")
KERNEL = ("start", "end", "layer", "what")

LINKS = ("h2d", "d2h", "nvme", "host")
KINDS = ("demand", "prefetch", "late", "plan", "write-back", "compute")
KERNELS = ("mixer", "resident experts", "arrived expert", "step", "exchange")


class Table:
    """int64 rows of named columns, appended one after the other or many at once; a tenth of that in memory."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self._last = array("q")  # rows added one by one since the last block
        self._blocks: list[tuple[int, list[_Packed]]] = []  # rows, columns
        self.add = self._last.extend

    def extend(self, rows: NDArray[np.int64]) -> None:
        """Many rows at once, which are copied: [rows, columns]."""
        self._close()
        if len(rows):
            self._blocks.append((len(rows), [_pack(column) for column in np.ascontiguousarray(rows.T)]))

    def _close(self) -> None:
        """What was added one by one becomes a block."""
        if self._last:
            rows = np.array(self._last, dtype=np.int64).reshape(-1, len(self.columns))
            del self._last[:]
            self.extend(rows)

    def __len__(self) -> int:
        return sum(rows for rows, _ in self._blocks) + len(self._last) // len(self.columns)

    def rows(self) -> NDArray[np.int64]:
        """All rows, in order: [rows, columns]."""
        return np.stack([self.column(name) for name in self.columns], axis=1)

    def column(self, name: str) -> NDArray[np.int64]:
        self._close()
        at, out, done = self.columns.index(name), np.empty(len(self), dtype=np.int64), 0
        for rows, packed in self._blocks:
            _unpack(packed[at], out[done : done + rows])
            done += rows
        return out

    def to_arrow(self) -> Any:
        import pyarrow as pa

        return pa.table({name: self.column(name) for name in self.columns})


@dataclass(frozen=True, slots=True)
class _Packed:
    """A column of a block: its first value, and what each next one adds, less `low`, in as few bytes as hold it."""

    first: int
    low: int
    width: int  # bytes of a number
    steps: bytes  # compressed


def _pack(values: NDArray[np.int64]) -> _Packed:
    import pyarrow as pa

    steps = np.diff(values)
    low, high = (int(steps.min()), int(steps.max())) if len(steps) else (0, 0)
    width = next(w for w in (1, 2, 4, 8) if high - low < 1 << 8 * w)
    narrow = (steps - low).astype(f"u{width}")
    return _Packed(int(values[0]), low, width, pa.compress(narrow, codec="lz4_raw", asbytes=True))


def _unpack(packed: _Packed, out: NDArray[np.int64]) -> None:
    import pyarrow as pa

    size = (len(out) - 1) * packed.width
    narrow = pa.decompress(packed.steps, decompressed_size=size, codec="lz4_raw", asbytes=True) if size else b""
    out[0] = packed.first
    out[1:] = np.frombuffer(narrow, dtype=f"u{packed.width}")
    out[1:] += packed.low
    np.cumsum(out, out=out)


class Records:
    """Times in ns since the replay began. `detail` adds a row per layer, transfer and kernel."""

    def __init__(self, detail: bool) -> None:
        self.detail = detail
        self.steps = Table(STEP)
        self.requests = Table(REQUEST)
        self.gaps = array("q")  # time between consecutive tokens of a request
        self.layers = Table(LAYER)
        self.transfers = Table(TRANSFER)
        self.kernels = Table(KERNEL)
