"""What happened, as flat columns. Metrics, plots and timelines read these; the engine knows none of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from moesim.packing import Packed

STEP = ("start", "end", "prefill_tokens", "decode_tokens", "sequences", "kv_bytes")
LAYER = ("step", "layer", "start", "routed", "end", "hits", "lates", "misses", "host", "waited")
TRANSFER = ("link", "start", "end", "layer", "expert", "bytes", "kind")
REQUEST = (
    "request", "arrival", "sent", "admitted", "first_token", "finished", "prompt_tokens", "output_tokens",
    "cached_tokens", "recomputed_tokens", "preemptions", "preempted_ns",
)  # fmt: skip
KERNEL = ("start", "end", "layer", "what")

LINKS = ("h2d", "d2h", "nvme", "host")
KINDS = ("demand", "prefetch", "late", "plan", "write-back", "compute")
FEW = 4096  # rows that are not worth packing
KERNELS = ("mixer", "resident experts", "arrived expert", "step", "exchange")


class Table:
    """int64 rows of named columns, appended one after the other or many at once; a tenth of that in memory.

    chain: names of columns that are times, each later than the one before, and the first than the last of another row.
    """

    def __init__(self, columns: tuple[str, ...], chain: tuple[str, ...] = ()) -> None:
        self.columns = columns
        self._chain = tuple(columns.index(name) for name in chain)
        self._last = array("q")  # rows since the last block
        self._blocks: list[tuple[int, list[Packed]]] = []  # rows, columns
        self.add = self._last.extend

    def extend(self, rows: NDArray[np.int64]) -> None:
        """Many rows at once, which are copied: [rows, columns]."""
        if len(rows) < FEW:
            self._last.frombytes(rows.tobytes())
            if len(self._last) > FEW * len(self.columns):
                self._pack_last()
            return
        from moesim.packing import pack

        if self._last:
            self._pack_last()
        self._blocks += pack(rows, self._chain)

    def _pack_last(self) -> None:
        from moesim.packing import pack

        self._blocks += pack(self._unpacked(), self._chain)
        del self._last[:]

    def _unpacked(self) -> NDArray[np.int64]:
        return np.array(self._last, dtype=np.int64).reshape(-1, len(self.columns))

    def __len__(self) -> int:
        return sum(rows for rows, _ in self._blocks) + len(self._last) // len(self.columns)

    def rows(self) -> NDArray[np.int64]:
        """All rows, in order: [rows, columns]."""
        return self._columns(range(len(self.columns))).T

    def column(self, name: str) -> NDArray[np.int64]:
        return self._columns([self.columns.index(name)])[0]

    def _columns(self, which: Sequence[int]) -> NDArray[np.int64]:
        """[columns, rows]"""
        out, done = np.empty((len(which), len(self)), dtype=np.int64), 0
        for rows, block in self._blocks:
            from moesim.packing import unpack

            for values, part in zip(out, unpack(block, rows, self._chain, which), strict=True):
                values[done : done + rows] = part
            done += rows
        out[:, done:] = self._unpacked()[:, list(which)].T
        return out

    def to_arrow(self) -> Any:
        import pyarrow as pa

        return pa.table(dict(zip(self.columns, self._columns(range(len(self.columns))), strict=True)))


class Records:
    """Times in ns since the replay began. `detail` adds a row per layer, transfer and kernel."""

    def __init__(self, detail: bool) -> None:
        self.detail = detail
        self.steps = Table(STEP, ("start", "end"))
        self.requests = Table(REQUEST)
        self.gaps = array("q")  # time between consecutive tokens of a request
        self.layers = Table(LAYER, ("start", "routed", "end"))
        self.transfers = Table(TRANSFER, ("start", "end"))
        self.kernels = Table(KERNEL, ("start", "end"))
