"""Vidur's CSV files: dense projections of a model (`mlp.csv`) and exchanges between devices; milliseconds, fp16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError
from moesim.profile_import import Import, files, number, read_csv

SOURCE = "github.com/microsoft/vidur"
LICENCE = "MIT"

Row = dict[str, Any]


def read(path: Path) -> Import:
    """Every `mlp.csv`, `all_reduce.csv` and `send_recv.csv` below `path`, of one kind of device."""
    known = [p for p in files(path, "*.csv") if p.name in ("mlp.csv", "all_reduce.csv", "send_recv.csv")]
    if not known:
        raise CalibrationError(f"{path}: holds no mlp.csv, all_reduce.csv or send_recv.csv")
    devices = {_device(p) for p in known}
    if len(devices) > 1:
        raise CalibrationError(f"{path}: tables of several devices ({', '.join(sorted(devices))}); give those of one")
    notes = ["mlp.csv: norms, rotary embedding, activation and embedding, whose shapes no family holds"]
    return Import(devices.pop(), "vidur", _rows(known), notes)


def _device(path: Path) -> str:
    """`a100` of compute/a100/MODEL/mlp.csv and of network/a100_dgx/all_reduce.csv."""
    parts = path.resolve().parts
    for folder in ("compute", "network"):
        if folder in parts[:-2]:
            return parts[parts.index(folder) + 1].split("_")[0]
    return path.resolve().parent.name.split("_")[0]


def _rows(paths: list[Path]) -> Iterator[list[Row]]:
    """Dense projections together, as a curve spans models; then the exchanges."""
    dense = [row for path in paths if path.name == "mlp.csv" for row in _dense(path)]
    if dense:
        yield dense
    for path in paths:
        if path.name != "mlp.csv":
            yield _exchange(path)


def _dense(path: Path) -> list[Row]:
    needed = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "num_tokens")
    rows = []
    for i, row in enumerate(read_csv(path, (*needed, "num_tensor_parallel_workers"))):
        where = f"{path}, row {i}"
        heads, kv, hidden, wide, tokens, split = (
            number(row, column, where)
            for column in (*(c for c in needed if c != "use_gated_mlp"), "num_tensor_parallel_workers")
        )
        if min(heads, hidden, wide, split, tokens) <= 0:
            raise CalibrationError(f"{where}: a size is 0")
        gated = 2 if row["use_gated_mlp"] == "True" else 1
        shapes = {
            "attn_pre_proj": ((heads + 2 * kv) * hidden / heads / split, hidden),
            "attn_post_proj": (hidden, hidden / split),
            "mlp_up_proj": (gated * wide / split, hidden),
            "mlp_down_proj": (hidden, wide / split),
        }
        for name, (n, k) in shapes.items():
            milliseconds = number(row, f"time_stats.{name}.median", where)
            if milliseconds > 0:
                rows.append({
                    "family": "gemm", "m": tokens, "n": n, "k": k, "dtype": "fp16", "kernel": "vidur",
                    "seconds": milliseconds * 1e-3,
                })  # fmt: skip
    return rows


def _exchange(path: Path) -> list[Row]:
    """Bytes are those of one device; devices spread over nodes are another kernel."""
    what, rows = path.stem, []
    column = f"time_stats.{what}.median"
    for i, row in enumerate(read_csv(path, (column, "num_workers", "size", "devices_per_node"))):
        where = f"{path}, row {i}"
        milliseconds, size = number(row, column, where), number(row, "size", where)
        if milliseconds > 0 and size > 0:
            rows.append({
                "family": "collective", "what": what, "nbytes": size, "devices": int(number(row, "num_workers", where)),
                "kernel": f"{path.parent.name}, {row['devices_per_node']} per node", "seconds": milliseconds * 1e-3,
            })  # fmt: skip
    return rows
