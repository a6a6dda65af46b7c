"""LLMServingSim's bundles: one model's layers on one GPU, `meta.yaml` and CSV files per degree of tensor parallelism.

Times are microseconds. Shapes come from moesim's catalogue of models, and from `DENSE` for models without experts.
Attention, the expert FFN and the dense projections are used; of other layers the families hold no shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moesim.errors import CalibrationError, ModelError
from moesim.model import load_model
from moesim.profile_import import Import, bounded, files, number, read_csv

SOURCE = "github.com/casys-kaist/LLMServingSim"
LICENCE = "MIT"
DTYPES = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8"}

Row = dict[str, Any]


class Shapes(NamedTuple):
    """What the tables' rows leave out; experts have width `expert_ffn`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    dense_ffn: int
    expert_ffn: int = 0
    top_k: int = 0
    ffn_matrices: int = 3


DENSE = {"meta-llama/Llama-3.1-8B": Shapes(4096, 32, 8, 128, 14336)}  # its config.json


def read(path: Path) -> Import:
    """Bundles below `path` of one GPU."""
    import yaml

    bundles = []
    for file in files(path, "meta.yaml"):
        try:
            meta = yaml.safe_load(bounded(file).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CalibrationError(f"{file}: not YAML ({str(error).splitlines()[0]})") from error
        if not isinstance(meta, dict) or not {"gpu", "model", "variant", "vllm_version"} <= set(meta):
            raise CalibrationError(f"{file}: not a bundle's meta.yaml; it lacks gpu, model, variant or vllm_version")
        bundles.append((file.parent, meta))
    gpus = {str(meta["gpu"]) for _, meta in bundles}
    if len(gpus) > 1:
        raise CalibrationError(f"{path}: bundles of several GPUs ({', '.join(sorted(gpus))}); give the folder of one")
    engines = sorted({f"vllm {meta['vllm_version']}" for _, meta in bundles})
    found = Import(gpus.pop(), ", ".join(engines), iter(()))
    found.rows = _rows(bundles, found.notes)
    return found


def _rows(bundles: list[tuple[Path, Row]], notes: list[str]) -> Iterator[list[Row]]:
    """All rows at once: curves span models and degrees of tensor parallelism."""
    rows: list[Row] = []
    for folder, meta in bundles:
        dtype = DTYPES.get(str(meta["variant"]))
        shapes = _shapes(str(meta["model"]))
        if shapes is None:
            notes.append(f"{meta['model']}: not in the catalogue, so its shapes are not known")
            continue
        if dtype is None:
            notes.append(f"{meta['model']}: number format {meta['variant']} is not known")
            continue
        for degree in sorted(folder.glob("tp*")):
            rows += _one(degree, shapes, dtype, int(degree.name.removeprefix("tp")))
    notes.append("layers without matrix shapes: norms, rotary embedding, activation, sampling")
    yield rows


def _shapes(name: str) -> Shapes | None:
    if name in DENSE:
        return DENSE[name]
    try:
        m = load_model(name.removesuffix("-Instruct-2507"))
    except ModelError:
        return None
    return Shapes(m.hidden, m.heads, m.kv_heads, m.head_dim, m.dense_ffn, m.expert_ffn, m.top_k, m.ffn_matrices)


def _one(folder: Path, model: Shapes, dtype: str, split: int) -> list[Row]:
    rows = []
    for name, convert in (("attention.csv", _attention), ("moe.csv", _moe), ("dense.csv", _dense)):
        if (folder / name).is_file():
            rows += convert(bounded(folder / name), model, dtype, split)
    return rows


def _attention(path: Path, model: Shapes, dtype: str, split: int) -> list[Row]:
    """Rows of decoding or of one prefill chunk, not of both. kv_decode is one sequence's context."""
    rows = []
    same = {
        "heads": model.heads // split, "kv_heads": max(model.kv_heads // split, 1), "head_dim": model.head_dim,
        "dtype": dtype, "kernel": "vllm layer",
    }  # fmt: skip
    for i, row in enumerate(read_csv(path, ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"))):
        new, past, batch, context, us = (number(row, c, f"{path}, row {i}") for c in row)
        if new and not batch:
            rows.append({"family": "attention_prefill", "batch": 1, "tokens": new, "past": past, **same})
        elif batch and not new and context:
            rows.append({"family": "attention_decode", "batch": batch, "context": context, **same})
        else:
            continue
        rows[-1]["seconds"] = us * 1e-6
    return rows


def _moe(path: Path, model: Shapes, dtype: str, split: int) -> list[Row]:
    rows = []
    for i, row in enumerate(read_csv(path, ("tokens", "activated_experts", "time_us"))):
        tokens, active, us = (number(row, c, f"{path}, row {i}") for c in ("tokens", "activated_experts", "time_us"))
        pairs = tokens * model.top_k
        rows.append({
            "family": "grouped", "pairs": max(pairs, active), "active": active, "hidden": model.hidden,
            "ffn": model.expert_ffn / split, "routed": pairs, "matrices": model.ffn_matrices, "dtype": dtype,
            "kernel": "vllm layer", "seconds": us * 1e-6,
        })  # fmt: skip
    return rows


def _dense(path: Path, model: Shapes, dtype: str, split: int) -> list[Row]:
    head, kv = model.heads * model.head_dim // split, model.kv_heads * model.head_dim // split
    shapes = {
        "qkv_proj": (head + 2 * kv, model.hidden), "o_proj": (model.hidden, head),
        "gate_up_proj": (2 * model.dense_ffn // split, model.hidden),
        "down_proj": (model.hidden, model.dense_ffn // split),
    }  # fmt: skip
    rows = []
    for i, row in enumerate(read_csv(path, ("layer", "tokens", "time_us"))):
        n, k = shapes.get(row["layer"], (0, 0))
        if n and k:
            tokens, us = number(row, "tokens", f"{path}, row {i}"), number(row, "time_us", f"{path}, row {i}")
            rows.append({
                "family": "gemm", "m": tokens, "n": n, "k": k, "dtype": dtype, "kernel": "vllm layer",
                "seconds": us * 1e-6,
            })  # fmt: skip
    return rows
