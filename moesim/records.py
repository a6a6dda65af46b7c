"""What happened, as flat columns. Metrics, plots and timelines read these; the engine knows none of them."""

from __future__ import annotations

from array import array
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
KERNELS = ("mixer", "resident experts", "arrived expert", "step")


class Table:
    """int64 rows of named columns, appended one after the other or many at once."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self._last = array("q")  # rows added one by one since the last block
        self._blocks: list[NDArray[np.int64]] = []
        self.add = self._last.extend

    def extend(self, rows: NDArray[np.int64]) -> None:
        """Many rows at once, which are the table's from now on: [rows, columns]."""
        if len(rows):
            self._close()
            self._blocks.append(rows)

    def _close(self) -> None:
        """What was added one by one becomes a block."""
        if self._last:
            self._blocks.append(np.array(self._last, dtype=np.int64).reshape(-1, len(self.columns)))
            del self._last[:]

    def __len__(self) -> int:
        return sum(map(len, self._blocks)) + len(self._last) // len(self.columns)

    def rows(self) -> NDArray[np.int64]:
        """All rows, in order: [rows, columns]."""
        self._close()
        if len(self._blocks) != 1:
            empty = np.empty((0, len(self.columns)), dtype=np.int64)
            self._blocks = [np.concatenate(self._blocks) if self._blocks else empty]
        return self._blocks[0]

    def column(self, name: str) -> NDArray[np.int64]:
        return self.rows()[:, self.columns.index(name)].copy()

    def to_arrow(self) -> Any:
        import pyarrow as pa

        return pa.table({name: self.column(name) for name in self.columns})


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
