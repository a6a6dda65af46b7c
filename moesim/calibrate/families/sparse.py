"""Structured-sparse products, each with the dense one beside it at the same shape."""

from __future__ import annotations

from itertools import product
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.samoyeds import encode, multiply, parse, prune_2_4
from moesim.calibrate.timing import Timer, Timing, Work, measure

_SAMOYEDS = "samoyeds-1,2,128"  # the configuration its authors release
_CUDA_AXES = (
    (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    (1536, 2048, 4096, 14336),
    (1536, 2048, 4096, 7168, 14336),
)
_CPU_AXES = ((1, 4, 16, 64, 256), (256, 768, 1408, 2048), (256, 768, 1408, 2048))


def points(device: Device, budget_s: float) -> list[Point]:
    """Shapes that both formats and the dense product can take."""
    axes, dtypes = (_CUDA_AXES, ("bf16", "fp16")) if device.kind == "cuda" else (_CPU_AXES, ("fp32",))
    return [
        {"m": m, "n": n, "k": k, "dtype": dtype, "format": name}
        for name, dtype, m, n, k in product(("2:4", _SAMOYEDS), dtypes, *axes)
        # the reference kernel stores partial products of every stripe and unpacks its weight at each call
        if device.affords(budget_s, 2 * m * n * k, 8 * n * k + 4 * m * n * k // 128)
        and not (name == _SAMOYEDS and dtype == "fp16")
    ]


def runnable(device: Device, point: Point) -> str | None:
    """2:4 is a property of tensor cores; the Samoyeds reference kernel runs everywhere."""
    if point["format"] != "2:4":
        return None
    if device.kind == "cpu":
        return "2:4 products need Sparse Tensor Cores (a CUDA GPU of sm_80 or later)"
    if device.capability < (8, 0):
        return f"2:4 products need sm_80 or later; {device.name} is sm_{device.capability[0]}{device.capability[1]}"
    return None


def measure_sparse(point: Point, device: Device, timer: Timer) -> Timing:
    """Weights are packed before the clock runs; everything after is timed."""
    m, n, k = number(point, "m", "n", "k")
    dtype = str(point["dtype"])
    x, weight = device.take(dtype, m, k), device.take(dtype, n, k)
    name = str(point["format"])
    return measure(_semi_structured(x, weight) if name == "2:4" else _samoyeds(x, weight, name), timer)


def dense(point: Point) -> tuple[str, Point]:
    """The same product without zeros left out."""
    return "gemm", {name: value for name, value in point.items() if name != "format"}


def _semi_structured(x: Any, weight: Any) -> Work:
    """torch's semi-structured tensors, which are cuSPARSELt's where it is there."""
    import torch

    packed = torch.sparse.to_sparse_semi_structured(prune_2_4(weight))
    return Work(lambda: torch.nn.functional.linear(x, packed))


def _samoyeds(x: Any, weight: Any, name: str) -> Work:
    encoded = encode(weight, *parse(name))
    return Work(lambda: multiply(encoded, x))


SPARSE_GEMM = Family("sparse_gemm", "sparse", points, measure_sparse, runnable, dense, share=1.5)
