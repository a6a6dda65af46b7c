"""Dense and dequantising matrix products: `[m, k] x [k, n]`, from GEMV (m = 1) to prefill."""

from __future__ import annotations

from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.timing import Timer, Timing, Work, measure

GROUP = 128  # weights that share an int4 scale

_CPU_AXES = (
    (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    (256, 512, 768, 1408, 2048, 4096),
    (256, 512, 768, 1408, 2048, 4096),
)
_CUDA_AXES = (
    (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192),
    (512, 1024, 1536, 2048, 4096, 6144, 7168, 14336, 28672),
    (512, 768, 1536, 2048, 4096, 7168, 14336),
)
_WEIGHT_BYTES = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1, "int4": 0.5}


def points(device: Device, budget_s: float) -> list[Point]:
    """Every shape whose product is short enough; unpacking costs a pass over the unpacked weights besides."""
    rows, columns, inner = _CUDA_AXES if device.kind == "cuda" else _CPU_AXES
    found: list[Point] = []
    for dtype, weight_bytes in _WEIGHT_BYTES.items():
        for m in rows:
            for n in columns:
                for k in inner:
                    flops = 2 * m * n * k * (4 if dtype == "fp32" and device.kind == "cuda" else 1)
                    unpacked = 12 * n * k if dtype.startswith("int") else 0
                    if device.affords(budget_s, flops, n * k * weight_bytes + unpacked):
                        found.append({"m": m, "n": n, "k": k, "dtype": dtype})
    return found


def runnable(device: Device, point: Point) -> str | None:
    """Which number formats multiply here."""
    dtype = point["dtype"]
    if device.kind == "cpu":
        if dtype in ("tf32", "fp8"):
            return f"{dtype} products need a CUDA GPU"
        return "fp16 products are emulated on CPUs, at a rate no engine would use" if dtype == "fp16" else None
    if dtype == "fp8" and device.capability < (8, 9):
        return f"fp8 needs sm_89 or later; {device.name} is sm_{device.capability[0]}{device.capability[1]}"
    if dtype in ("tf32", "bf16") and device.capability < (8, 0):
        return f"{dtype} needs sm_80 or later; {device.name} is sm_{device.capability[0]}{device.capability[1]}"
    return None


def measure_gemm(point: Point, device: Device, timer: Timer) -> Timing:
    """One product; tf32 and fp32 differ in what the matrix units may round."""
    import torch

    m, n, k = number(point, "m", "n", "k")
    dtype = str(point["dtype"])
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        return measure(_work(device, dtype, m, n, k), timer)
    finally:
        torch.set_float32_matmul_precision("highest")


def _work(device: Device, dtype: str, m: int, n: int, k: int) -> Work:
    import torch

    linear = torch.nn.functional.linear
    if dtype == "fp8":
        x, one = device.take("fp8", m, k), torch.ones((), device=device.where)

        def scaled(w: Any) -> Any:
            return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)

        return Work(scaled, lambda: (device.take("fp8", n, k),))
    if dtype in ("int8", "int4"):
        return _dequantising(device, dtype, m, n, k)
    x = device.take(dtype, m, k)
    return Work(lambda w: linear(x, w), lambda: (device.take(dtype, n, k),))


def _dequantising(device: Device, dtype: str, m: int, n: int, k: int) -> Work:
    """Unpack the weights to the type computed in, then multiply: what runs where there is no fused kernel."""
    import torch

    compute = "bf16" if device.kind == "cuda" else "fp32"
    x = device.take(compute, m, k)
    unpack = unpack_int8 if dtype == "int8" else unpack_int4
    width, scales = (k, 1) if dtype == "int8" else (k // 2, k // GROUP)

    def run(packed: Any, scale: Any) -> Any:
        return torch.nn.functional.linear(x, unpack(packed, scale))

    return Work(run, lambda: (device.take(dtype, n, width), device.take(compute, n, scales)))


def unpack_int8(packed: Any, scale: Any) -> Any:
    """int8 [n, k] times one scale per row [n, 1]."""
    return packed.to(scale.dtype) * scale


def unpack_int4(packed: Any, scale: Any) -> Any:
    """uint8 [n, k/2], low four bits first, offset 8, times one scale per GROUP weights [n, k/GROUP] -> [n, k]."""
    import torch

    low, high = packed & 15, packed >> 4
    values = torch.stack((low, high), dim=-1).view(packed.shape[0], -1, GROUP).to(scale.dtype) - 8
    return (values * scale.unsqueeze(-1)).view(packed.shape[0], -1)


GEMM = Family("gemm", "gemm", points, measure_gemm, runnable, share=4.0)
