"""AIConfigurator's Parquet tables of one system: dense and expert kernels, attention, latent attention, collectives.

Tables are told apart by their columns, not by file names, so the tree of any system of that database can be given.
Latencies are milliseconds per call; those of DeepEP, microseconds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError
from moesim.profile_import import MAX_ROWS, Import, files
from moesim.profile_import.power_law import busiest

SOURCE = "github.com/ai-dynamo/aiconfigurator"
LICENCE = "Apache-2.0"

DTYPES = {
    "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "fp8": "fp8", "fp8_block": "fp8_block", "int8": "int8",
    "int8_wo": "int8", "int4_wo": "int4", "w4a16_mxfp4": "mxfp4", "nvfp4": "nvfp4",
}  # fmt: skip
COLLECTIVES = {
    "alltoall": "all_to_all", "all_reduce": "all_reduce", "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}  # fmt: skip

Row = dict[str, Any]


def read(path: Path) -> Import:
    """Every table below `path` that a family fits, the newest version of each framework."""
    tables, notes = _newest(files(path, "*.parquet"))
    devices, engines = set(), set()
    for file in tables:
        head = _columns(file, ["device", "framework", "version", "kernel_source"])[0]
        devices.add(str(head["device"]))
        engine = "nccl" if head["kernel_source"] == "NCCL" else str(head["framework"]).lower()
        engines.add(f"{engine} {head['version']}")
    gpus = sorted(devices, key=len)
    if any(gpus[0] not in gpu for gpu in gpus):
        raise CalibrationError(f"{path}: tables of several devices ({', '.join(gpus)}); give the folder of one")
    found = Import(gpus[-1], ", ".join(sorted(engines)), iter(()), notes)
    found.rows = _rows(tables, notes)
    return found


def _newest(paths: list[Path]) -> tuple[dict[Path, str], list[str]]:
    """Readable tables with their kind; of several versions of one framework's table the newest."""
    best: dict[tuple[str, str, str], tuple[list[int], Path]] = {}
    notes = []
    for path in paths:
        names = _names(path)
        kind = _kind(names)
        if kind is None:
            notes.append(f"{path.parent.parent.parent.name}/{path.name}: not used")
            continue
        head = _columns(path, ["framework", "version", "op_name"])[0]
        key = (kind, str(head["framework"]).lower(), path.name)
        version = [int(part) for part in re.findall(r"\d+", str(head["version"]))]
        if key in best:
            notes.append(f"{kind} {head['framework']}: of several versions the newest")
        if key not in best or version > best[key][0]:
            best[key] = (version, path)
    tables = {path: kind for (kind, _, _), (_, path) in best.items()}
    if not tables:
        raise CalibrationError(
            "no table with the columns of AIConfigurator; give a folder such as systems/data/h200_sxm"
        )
    return tables, sorted(set(notes))


def _kind(names: set[str]) -> str | None:
    """What a table measures, from its columns; None for tables that no family fits."""
    if {"dispatch_avg_t_us", "combine_avg_t_us", "num_token", "hidden_size"} <= names:
        return "deepep"
    if "latency" not in names or "dp_num_tokens" in names:
        return None
    kinds = {
        "gemm": {"gemm_dtype", "m", "n", "k"},
        "moe": {"moe_dtype", "num_tokens", "topk", "moe_tp_size", "moe_ep_size", "distribution"},
        "attention": {"attn_dtype", "kv_cache_dtype", "num_heads", "num_key_value_heads", "head_dim", "isl", "step"},
        "mla": {"mla_dtype", "kv_cache_dtype", "num_heads", "batch_size", "isl", "step", "tp_size"},
        "collective": {"num_gpus", "message_size"},
    }
    kind = next((kind for kind, columns in kinds.items() if columns <= names), None)
    return None if kind == "mla" and "gemm_type" in names else kind  # whole modules include their projections


def _rows(tables: dict[Path, str], notes: list[str]) -> Iterator[list[Row]]:
    """Rows of one table after the other; rows of unknown number formats are left out with a note."""
    convert = {"gemm": _gemm, "moe": _moe, "attention": _attention, "mla": _mla, "collective": _collective,
               "deepep": _deepep}  # fmt: skip
    for path, kind in tables.items():
        unknown: dict[str, int] = {}
        rows: list[Row] = []
        for number, row in enumerate(_columns(path)):
            try:
                for made in convert[kind](row):
                    if made.get("dtype", "fp16") is None:
                        unknown[str(row)] = 1
                    elif math.isfinite(made["seconds"]) and made["seconds"] > 0:
                        rows.append(made)
                    else:
                        raise CalibrationError(f"latency {made['seconds']!r} is not a time above 0")
            except (KeyError, TypeError, ValueError, ZeroDivisionError, CalibrationError) as error:
                raise CalibrationError(f"{path}, row {number}: {error}") from error
        if unknown:
            notes.append(f"{path.name}: {len(unknown)} rows of number formats moesim does not know")
        yield rows


def _kernel(row: Row) -> str:
    return f"{str(row['framework']).lower()} {row['kernel_source']}"


def _gemm(row: Row) -> list[Row]:
    return [{
        "family": "gemm", "m": row["m"], "n": row["n"], "k": row["k"], "dtype": DTYPES.get(row["gemm_dtype"]),
        "kernel": _kernel(row), "seconds": row["latency"] * 1e-3,
    }]  # fmt: skip


def _moe(row: Row) -> list[Row]:
    """Routed experts of one device: 1 of `moe_ep_size` with its share of experts, 1/`moe_tp_size` of their width.

    Balanced routing activates min(experts, tokens x top-k), spread evenly over the devices.
    """
    tokens, experts, devices = row["num_tokens"], row["num_experts"], row["moe_ep_size"]
    routed, distribution = tokens * row["topk"], str(row["distribution"])
    if distribution in ("balanced", "uniform"):
        active, pairs = max(min(experts, routed) / devices, 1), max(routed / devices, 1)
    elif match := re.fullmatch(r"power_law_([0-9.]+)", distribution):
        active, pairs = busiest(tokens, experts, row["topk"], devices, float(match[1]))
    else:
        raise CalibrationError(f"distribution {distribution!r} is neither balanced nor power_law_ALPHA")
    return [{
        "family": "grouped", "pairs": pairs, "active": active, "hidden": row["hidden_size"],
        "ffn": row["inter_size"] / row["moe_tp_size"], "routed": routed, "experts": experts / devices,
        "top_k": row["topk"], "dtype": DTYPES.get(row["moe_dtype"]),
        "matrices": 2 if "nongated" in row["kernel_source"] else 3,
        "kernel": _kernel(row) + str(row["op_name"]).removeprefix("moe").replace("_", " "),
        "seconds": row["latency"] * 1e-3,
    }]  # fmt: skip


def _attention(row: Row) -> list[Row]:
    kernel = _kernel(row) + (" fp8 math" if str(row["attn_dtype"]).startswith("fp8") else "")
    same = {
        "batch": row["batch_size"], "heads": row["num_heads"], "kv_heads": row["num_key_value_heads"],
        "head_dim": row["head_dim"], "window": row.get("window_size") or 0, "kernel": kernel,
        "dtype": DTYPES.get(row["kv_cache_dtype"]), "seconds": row["latency"] * 1e-3,
    }  # fmt: skip
    if str(row["op_name"]).startswith("context"):
        return [{"family": "attention_prefill", "tokens": row["isl"], "past": row["step"], **same}]
    return [{"family": "attention_decode", "context": row["isl"] + row["step"], **same}]


def _mla(row: Row) -> list[Row]:
    same = {
        "batch": row["batch_size"], "heads": row["num_heads"], "kernel": _kernel(row),
        "dtype": DTYPES.get(row["kv_cache_dtype"]), "seconds": row["latency"] * 1e-3,
    }  # fmt: skip
    if "context" in str(row["op_name"]):
        return [{"family": "mla_prefill", "tokens": row["isl"], "past": row["step"], **same}]
    return [{"family": "mla_decode", "context": row["isl"] + row["step"], **same}]


def _collective(row: Row) -> list[Row]:
    what = COLLECTIVES.get(str(row["op_name"]))
    if what is None:
        raise CalibrationError(f"op_name {row['op_name']!r} is no collective")
    size = {"half": 2, "bfloat16": 2, "int8": 1}[str(row.get("nccl_dtype") or row.get("allreduce_dtype"))]
    return [{
        "family": "collective", "what": what, "nbytes": row["message_size"] * size, "devices": row["num_gpus"],
        "kernel": str(row["kernel_source"]), "seconds": row["latency"] * 1e-3,
    }]  # fmt: skip


def _deepep(row: Row) -> list[Row]:
    """Low-latency dispatch (8-bit) and combine (16-bit) of one node's eight devices; bytes sent per device."""
    pairs = row["num_token"] * row["num_topk"] * row["hidden_size"]
    if row.get("node_num", 1) != 1:
        return []
    return [
        {"family": "collective", "what": "all_to_all", "nbytes": pairs * width, "devices": 8,
         "kernel": f"deepep {part}", "seconds": row[f"{part}_avg_t_us"] * 1e-6}
        for part, width in (("dispatch", 1), ("combine", 2))
    ]  # fmt: skip


def _names(path: Path) -> set[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    if not 0 < file.metadata.num_rows <= MAX_ROWS:
        raise CalibrationError(f"{path}: {file.metadata.num_rows} rows; a table has 1 to {MAX_ROWS}")
    return set(file.schema_arrow.names)


def _columns(path: Path, names: list[str] | None = None) -> list[Row]:
    """Rows with the columns `names`, or all; only the first row where names are given."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if names is None:
            rows: list[Row] = pq.read_table(path).to_pylist()
            return rows
        missing = [name for name in names if name not in pq.read_schema(path).names]
        if missing:
            raise CalibrationError(f"{path}: lacks the column {missing[0]}; this is no table of AIConfigurator")
        head: list[Row] = next(pq.ParquetFile(path).iter_batches(1, columns=names)).to_pylist()
        return head
    except (pa.ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
