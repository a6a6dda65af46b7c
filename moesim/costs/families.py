"""Families of measured things: what describes one, and the bytes and operations it needs.

A row of a profile belongs to one family. Its *variant* columns choose a curve; its *shape* columns are what the curve
is a function of. docs/calibration.md has the list in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import CalibrationError, nearest

Row = Mapping[str, Any]

# Bytes per element of (weights, activations); integer weights are unpacked and multiply 16-bit activations.
BYTES = {
    "fp32": (4, 4), "tf32": (4, 4), "bf16": (2, 2), "fp16": (2, 2), "fp8": (1, 1), "fp8_block": (1, 1),
    "int8": (1, 2), "int4": (0.5, 2), "mxfp4": (0.53125, 2), "nvfp4": (0.5625, 0.5625),
}  # fmt: skip
ACTIVITIES = ("h2d", "host", "disk", "gpu")  # that share a machine: copies, CPU experts, drive reads, GPU products
MLA_LATENT, MLA_ROPE, MLA_NOPE, MLA_VALUE = 512, 64, 128, 128  # DeepSeek-V2 and V3, arXiv 2405.04434


@dataclass(frozen=True)
class Family:
    """`shape` columns are numbers, above 0 but for `past`; `variant` columns are text or flags.

    work(row) is (bytes moved, operations). `constant` holds the value of a column the rows leave out. `axes` are what a
    curve is a function of, where that is not the shape itself: place(row) gives their values, row_at(values) a row with
    the same work. `tiled` is the axis along which kernels compute whole tiles. hint(row) gives what else libraries
    choose kernels by, as numbers above 0, which only curves of large tables look at.
    """

    name: str
    shape: tuple[str, ...]
    variant: tuple[str, ...]
    work: Callable[[Row], tuple[float, float]]
    what: str
    constant: Mapping[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    place: Callable[[Row], tuple[float, ...]] | None = None
    row_at: Callable[[Sequence[float]], Row] | None = None
    hint: Callable[[Row], tuple[float, ...]] | None = None
    tiled: str = ""
    link: bool = False

    @property
    def axis_names(self) -> tuple[str, ...]:
        return self.axes or self.shape

    def key(self, row: Row) -> tuple[Any, ...]:
        """The variant a row belongs to."""
        return tuple(_plain(self.value(row, column)) for column in self.variant)

    def value(self, row: Row, column: str) -> Any:
        """A column of a row, or what stands for it where the row leaves it out."""
        found = row.get(column)
        if found is None:
            found = self.constant.get(column)
        if found is None:
            raise CalibrationError(f"{self.name}: a row has no '{column}'; it needs {', '.join(self.columns)}")
        return found

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.shape, *self.variant)


def family(name: str) -> Family:
    """The family called `name`, or CalibrationError."""
    if name not in FAMILIES:
        raise CalibrationError(f"family '{name}': unknown{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def element_bytes(dtype: str) -> tuple[float, float]:
    """Bytes of one weight and of one activation, or CalibrationError."""
    if dtype not in BYTES:
        raise CalibrationError(f"dtype '{dtype}': unknown{nearest(dtype, BYTES)}")
    return BYTES[dtype]


def sparse_weight_bytes(n: float, k: float, dtype: str, form: str) -> float:
    """Bytes of an n x k matrix kept sparse, metadata included.

    2:4 keeps half the values and 2 bits for the position of each (NVIDIA, PTX ISA, `mma.sp`). Samoyeds (N, M, V) keeps
    N of M rows in every block of V columns, 2:4 within them, and four bytes per kept block for its row (its kernel).
    """
    weight, _ = element_bytes(dtype)
    density, blocks = _density(form)
    kept = n * k * density
    return kept * weight + kept / 4 + 4 * n * k * blocks


def _density(form: str) -> tuple[float, float]:
    """Share of values kept, and kept blocks per value."""
    if form == "2:4":
        return 0.5, 0.0
    match = re.fullmatch(r"samoyeds-(\d+),(\d+),(\d+)", form)
    if match is None or not 0 < int(match[1]) <= int(match[2]) or int(match[3]) < 1:
        raise CalibrationError(f"sparse format '{form}': unknown; write 2:4 or samoyeds-N,M,V with N <= M")
    kept, of, columns = map(int, match.groups())
    return 0.5 * kept / of, kept / of / columns


def attention_pairs(tokens: float, past: float, window: float = 0) -> float:
    """(query, key) pairs of `tokens` causal queries after `past` cached tokens; a window caps the keys if not 0."""
    inside = tokens if not window else max(0.0, min(tokens, window - past))
    return inside * past + inside * (inside + 1) / 2 + (tokens - inside) * window


def _plain(value: Any) -> Any:
    """Flags and small numbers as int, so that 1, 1.0 and True choose the same curve after Parquet."""
    return value if isinstance(value, str) else int(value)


def _gemm(r: Row) -> tuple[float, float]:
    weight, activation = element_bytes(r["dtype"])
    m, n, k = r["m"], r["n"], r["k"]
    return weight * n * k + activation * m * k + max(activation, 2) * m * n, 2.0 * m * n * k


def _sparse(r: Row) -> tuple[float, float]:
    _, activation = element_bytes(r["dtype"])
    m, n, k = r["m"], r["n"], r["k"]
    weights = sparse_weight_bytes(n, k, r["dtype"], r["format"])
    return weights + activation * m * (n + k), 2.0 * m * n * k * _density(r["format"])[0]


def _grouped(r: Row) -> tuple[float, float]:
    weight, activation = element_bytes(r["dtype"])
    params = r["matrices"] * r["hidden"] * r["ffn"]
    moved = r["pairs"] * max(activation, 2) * (2 * r["hidden"] + r["matrices"] * r["ffn"])
    elsewhere = max(
        (r.get("routed") or 0) - r["pairs"], 0
    )  # pairs computed by other devices: their rows are still summed
    moved += elsewhere * 2 * r["hidden"]
    return r["active"] * params * weight + moved, 2.0 * r["pairs"] * params


def _prefill(r: Row) -> tuple[float, float]:
    kv, activation = element_bytes(r["dtype"])[0], 2
    past, batch, size = r.get("past") or 0, r["batch"], r["head_dim"]
    pairs = attention_pairs(r["tokens"], past, r.get("window") or 0)
    moved = 2 * r["tokens"] * r["heads"] * activation + 2 * (r["tokens"] + past) * r["kv_heads"] * kv
    return batch * size * moved, 4.0 * batch * r["heads"] * size * pairs


def _decode(r: Row) -> tuple[float, float]:
    kv, activation = element_bytes(r["dtype"])[0], 2
    batch, size = r["batch"], r["head_dim"]
    seen = min(r["context"], r.get("window") or r["context"])
    moved = 2 * seen * r["kv_heads"] * kv + 2 * r["heads"] * activation
    return batch * size * moved, 4.0 * batch * r["heads"] * size * seen


def _mla_prefill(r: Row) -> tuple[float, float]:
    width = MLA_NOPE + MLA_ROPE + MLA_VALUE
    pairs = attention_pairs(r["tokens"], r.get("past") or 0)
    return 4.0 * r["batch"] * r["tokens"] * r["heads"] * width, 2.0 * r["batch"] * r["heads"] * width * pairs


def _mla_decode(r: Row) -> tuple[float, float]:
    kv, latent = element_bytes(r["dtype"])[0], MLA_LATENT + MLA_ROPE
    moved = r["context"] * latent * kv + 2.0 * r["heads"] * (latent + MLA_LATENT)
    return r["batch"] * moved, 2.0 * r["batch"] * r["context"] * r["heads"] * (latent + MLA_LATENT)


def _bytes(r: Row) -> tuple[float, float]:
    return r["nbytes"], 0.0


def _host(r: Row) -> tuple[float, float]:
    """Bytes and operations that fall to one thread."""
    weight, activation = element_bytes(r["dtype"])
    params = r["matrices"] * r["hidden"] * r["ffn"]
    moved = r["tokens"] * activation * (2 * r["hidden"] + r["matrices"] * r["ffn"])
    return (params * weight + moved) / r["threads"], 2.0 * r["tokens"] * params / r["threads"]


def _place_host(r: Row) -> tuple[float, ...]:
    """The share of the work that falls to a thread: times rise along every axis of a curve."""
    return r["tokens"], r["hidden"], r["ffn"], 1 / r["threads"]


def _host_at(x: Sequence[float]) -> Row:
    return {"tokens": x[0], "hidden": x[1], "ffn": x[2], "threads": 1 / x[3]}


def _place_handoff(r: Row) -> tuple[float, ...]:
    return (_handoff_bytes(r),)


def _handoff_bytes(r: Row) -> float:
    """16-bit activations down and up."""
    return 4.0 * r["tokens"] * r["hidden"]


def _place_together(r: Row) -> tuple[float, ...]:
    """Bytes, and 2 for every other activity that runs beside this one, else 1."""
    return r["nbytes"], *(1 + int(bool(r[name]) and name != r["what"]) for name in ACTIVITIES)


def _together_at(x: Sequence[float]) -> Row:
    """A row of an activity that the flags do not name; with `what` filled in, its own flag does not matter."""
    return {"nbytes": x[0], **{name: round(on) - 1 for name, on in zip(ACTIVITIES, x[1:], strict=True)}}


def _place_grouped(r: Row) -> tuple[float, ...]:
    return (
        r["pairs"] / r["active"],
        r["active"],
        r["hidden"],
        r["ffn"],
        max(r.get("routed") or 0, r["pairs"]) / r["pairs"],
    )


def _hint_grouped(r: Row) -> tuple[float, ...]:
    """Experts held by the device and choices per token; where a row does not say: all active, and eight."""
    return r.get("experts") or r["active"], r.get("top_k") or 8


def _hint_streams(r: Row) -> tuple[float, ...]:
    return r["batch"], r["kv_heads"]


def _grouped_at(x: Sequence[float]) -> Row:
    pairs = x[0] * x[1]
    return {"pairs": pairs, "active": x[1], "hidden": x[2], "ffn": x[3], "routed": pairs * x[4]}


def _place_prefill(r: Row) -> tuple[float, ...]:
    return r["batch"] * r["kv_heads"], r["tokens"], r.get("past") or 0, r["heads"] / r["kv_heads"], r["head_dim"]


def _prefill_at(x: Sequence[float]) -> Row:
    batch, kv_heads = _split_streams(x[0])
    return {
        "batch": batch, "kv_heads": kv_heads, "tokens": x[1], "past": x[2], "heads": kv_heads * x[3], "head_dim": x[4],
    }  # fmt: skip


def _place_decode(r: Row) -> tuple[float, ...]:
    seen = min(r["context"], r.get("window") or r["context"])
    return r["batch"] * r["kv_heads"], seen, r["heads"] / r["kv_heads"], r["head_dim"]


def _decode_at(x: Sequence[float]) -> Row:
    batch, kv_heads = _split_streams(x[0])
    return {"batch": batch, "kv_heads": kv_heads, "context": x[1], "heads": kv_heads * x[2], "head_dim": x[3]}


def _split_streams(streams: float) -> tuple[float, float]:
    """(Sequences, KV heads): eight heads, the commonest, where there are as many streams."""
    kv_heads = min(8.0, streams)
    return streams / kv_heads, kv_heads


_KERNEL = {"kernel": "default"}
FAMILIES = {
    f.name: f
    for f in (
        Family("gemm", ("m", "n", "k"), ("dtype", "kernel"), _gemm, "dense matrix multiplication", _KERNEL, tiled="m"),
        Family(
            "sparse_gemm", ("m", "n", "k"), ("dtype", "format"), _sparse,
            "sparse weights times dense activations", tiled="m",
        ),
        Family(
            "grouped", ("pairs", "active", "hidden", "ffn", "routed"), ("dtype", "kernel", "matrices"), _grouped,
            "routed experts of one layer, from sorting to combining",
            {**_KERNEL, "matrices": 3, "routed": 0},
            ("rows_per_expert", "active", "hidden", "ffn", "routed_per_pair"),
            _place_grouped, _grouped_at, _hint_grouped,
        ),
        Family(
            "attention_prefill", ("batch", "tokens", "past", "heads", "kv_heads", "head_dim"),
            ("dtype", "kernel", "window"), _prefill, "attention of new tokens, projections excluded",
            {**_KERNEL, "window": 0, "past": 0},
            ("streams", "tokens", "past", "heads_per_kv", "head_dim"), _place_prefill, _prefill_at, _hint_streams,
        ),
        Family(
            "attention_decode", ("batch", "context", "heads", "kv_heads", "head_dim"), ("dtype", "kernel", "window"),
            _decode, "attention of one new token per sequence", {**_KERNEL, "window": 0},
            ("streams", "context", "heads_per_kv", "head_dim"), _place_decode, _decode_at, _hint_streams,
        ),
        Family(
            "mla_prefill", ("batch", "tokens", "past", "heads"), ("dtype", "kernel"), _mla_prefill,
            "latent attention of new tokens, projections excluded", {**_KERNEL, "past": 0},
        ),
        Family(
            "mla_decode", ("batch", "context", "heads"), ("dtype", "kernel"), _mla_decode,
            "latent attention of one new token per sequence, projections excluded", _KERNEL,
        ),
        Family("small", ("nbytes",), ("what",), _bytes, "memory-bound small kernels"),
        Family("launch", ("kernels",), ("graph",), lambda r: (r["kernels"], 0.0), "a chain of empty kernels"),
        Family(
            "copy", ("nbytes",), ("direction", "pinned", "concurrent", "parts", "both"), _bytes, "memory copies",
            {"concurrent": 1, "parts": 1, "both": 0}, link=True,
        ),
        Family("read", ("nbytes",), ("direct", "depth"), _bytes, "drive to host memory", {"depth": 1}, link=True),
        Family(
            "host_expert", ("tokens", "hidden", "ffn", "threads"), ("dtype", "matrices"), _host,
            "one expert on the CPU, rates per thread", {"matrices": 3},
            ("tokens", "hidden", "ffn", "share_of_thread"), _place_host, _host_at,
        ),
        Family(
            "handoff", ("tokens", "hidden"), (), lambda r: (_handoff_bytes(r), 0.0),
            "activations of a layer down to the host and back", {},
            ("nbytes",), _place_handoff, lambda x: {"tokens": 1, "hidden": x[0] / 4},
        ),
        Family(
            "together", ("nbytes", *ACTIVITIES), ("what",), _bytes, "an activity while others run", {},
            ("nbytes", *(f"with_{name}" for name in ACTIVITIES)), _place_together, _together_at, link=True,
        ),
        Family(
            "collective", ("nbytes",), ("what", "devices", "kernel"), _bytes, "exchange between devices", _KERNEL,
            link=True,
        ),
    )
}  # fmt: skip
