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
    """int64 rows of named columns, appended one after the other."""

    def __init__(self, columns: tuple[str, ...]) -> None:
        self.columns = columns
        self._values = array("q")
        self.add = self._values.extend

    def __len__(self) -> int:
        return len(self._values) // len(self.columns)

    def column(self, name: str) -> NDArray[np.int64]:
        rows = np.frombuffer(self._values, dtype=np.int64) if self._values else np.empty(0, dtype=np.int64)
        return rows.reshape(-1, len(self.columns))[:, self.columns.index(name)].copy()

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
