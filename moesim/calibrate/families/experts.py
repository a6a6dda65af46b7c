"""Routed experts: many as one grouped computation on the device, one alone on the CPU."""

from __future__ import annotations

from itertools import product
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.timing import Timer, Timing, Work, measure

# hidden, ffn, experts of the layer: small as in Qwen3-30B and DeepSeek, large as in Mixtral
_CUDA_SHAPES = ((2048, 768, 128), (2048, 1408, 64), (7168, 2048, 32), (4096, 14336, 8))
_CPU_SHAPES = ((512, 256, 64), (1024, 512, 64), (2048, 768, 64), (1024, 3584, 8))
_HOST_SHAPES = ((512, 256), (1024, 512), (2048, 768), (2048, 1408), (1024, 3584), (4096, 1536))
_MATRICES = 3  # gate, up, down


def grouped_points(device: Device, budget_s: float) -> list[Point]:
    """Pairs from decoding to prefill, over few experts and all; evenly spread, and skewed as routing is."""
    on_gpu = device.kind == "cuda"
    pair_counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, *((2048, 8192, 32768) if on_gpu else ()))
    kernels = ("loop", "loop-skewed", "grouped_mm") if on_gpu else ("loop", "loop-skewed")
    found: list[Point] = []
    for (hidden, ffn, experts), pairs, kernel, dtype in product(
        _CUDA_SHAPES if on_gpu else _CPU_SHAPES, pair_counts, kernels, ("bf16",) if on_gpu else ("fp32", "bf16")
    ):
        for active in (1, 2, 4, 8, 16, 32, 64, 128):
            if active > min(pairs, experts) or (kernel == "loop-skewed" and (active < 4 or pairs < 4 * active)):
                continue
            params = _MATRICES * hidden * ffn
            held = (experts if kernel == "grouped_mm" else active) * params * _itemsize(dtype)
            read = active * params * _itemsize(dtype)
            if device.affords(budget_s, 2 * pairs * params, read) and held < device.memory_bytes / 8:
                found.append(
                    {"pairs": pairs, "active": active, "experts": experts, "hidden": hidden, "ffn": ffn,
                     "matrices": _MATRICES, "dtype": dtype, "kernel": kernel}
                )  # fmt: skip
    return found


def grouped_runnable(device: Device, point: Point) -> str | None:
    """torch's grouped product is new and needs recent GPUs."""
    import torch

    if device.kind == "cuda" and device.capability < (8, 0):
        return f"bf16 needs sm_80 or later; {device.name} is sm_{device.capability[0]}{device.capability[1]}"
    if point["kernel"] == "grouped_mm" and not hasattr(torch.nn.functional, "grouped_mm"):
        return f"grouped_mm needs torch 2.10 or later; this is {torch.__version__}"
    if point["kernel"] == "grouped_mm" and device.capability < (9, 0):
        return f"grouped_mm needs sm_90 or later; {device.name} is sm_{device.capability[0]}{device.capability[1]}"
    return None


def measure_grouped(point: Point, device: Device, timer: Timer) -> Timing:
    """Gate, up, activation and down of every active expert over its tokens, which already lie together."""
    pairs, active, hidden = number(point, "pairs", "active", "hidden")
    counts = token_counts(pairs, active, skewed=point["kernel"] == "loop-skewed")
    x = device.take(str(point["dtype"]), pairs, hidden)
    make = _grouped_mm if point["kernel"] == "grouped_mm" else _loop
    return measure(make(point, device, x, counts), timer)


def token_counts(pairs: int, active: int, skewed: bool) -> list[int]:
    """Tokens of each active expert, `pairs` in all, at least one each: even, or falling as 1/rank."""
    weights = [1 / (rank + 1) if skewed else 1.0 for rank in range(active)]
    left = pairs - active
    counts = [1 + int(left * weight / sum(weights)) for weight in weights]
    for rank in range(pairs - sum(counts)):
        counts[rank % active] += 1
    return counts


def _loop(point: Point, device: Device, x: Any, counts: list[int]) -> Work:
    """Expert after expert, three products each; the launches of a GPU are replayed as one graph."""
    import torch

    hidden, ffn = number(point, "hidden", "ffn")
    dtype, active = str(point["dtype"]), len(counts)

    def run(up: Any, down: Any) -> Any:
        rows = x.split(counts)
        return torch.cat([expert_ffn(rows[e], up[e], down[e]) for e in range(active)])

    def fresh() -> tuple[Any, ...]:
        return device.take(dtype, active, 2 * ffn, hidden), device.take(dtype, active, hidden, ffn)

    return Work(run, fresh, graph=True)


def _grouped_mm(point: Point, device: Device, x: Any, counts: list[int]) -> Work:
    """torch's grouped product over every expert of the layer, of which `active` have tokens."""
    import torch

    hidden, ffn, experts = number(point, "hidden", "ffn", "experts")
    dtype, active = str(point["dtype"]), len(counts)
    padded = [0] * experts  # the experts with tokens are spread over the layer, as routing spreads them
    for e, count in enumerate(counts):
        padded[e * experts // active] = count
    offsets = torch.tensor(padded).cumsum(0).to(torch.int32).to(device.where)
    grouped = torch.nn.functional.grouped_mm
    silu = torch.nn.functional.silu

    def run(up: Any, down: Any) -> Any:
        gate, value = grouped(x, up.transpose(1, 2), offs=offsets).chunk(2, dim=-1)
        return grouped((silu(gate) * value).contiguous(), down.transpose(1, 2), offs=offsets)

    def fresh() -> tuple[Any, ...]:
        return device.take(dtype, experts, 2 * ffn, hidden), device.take(dtype, experts, hidden, ffn)

    return Work(run, fresh)


def expert_ffn(x: Any, up: Any, down: Any) -> Any:
    """x [t, hidden], up [2 ffn, hidden] (gate above value), down [hidden, ffn] -> [t, hidden]."""
    import torch

    gate, value = torch.nn.functional.linear(x, up).chunk(2, dim=-1)
    return torch.nn.functional.linear(torch.nn.functional.silu(gate) * value, down)


def host_points(device: Device, budget_s: float) -> list[Point]:
    """One expert on the CPU, over tokens and threads, whatever the device."""
    threads = sorted({1, 2, 4, 8, 16, 32, 64, device.cores})
    found: list[Point] = []
    for (hidden, ffn), tokens, count, dtype in product(
        _HOST_SHAPES, (1, 2, 4, 8, 16, 32, 64, 128, 256), threads, ("fp32", "bf16")
    ):
        params = _MATRICES * hidden * ffn
        seconds = 2 * tokens * params / 4e10 + params * _itemsize(dtype) / 5e9
        if count <= device.cores and seconds <= budget_s / 2500:
            found.append(
                {"tokens": tokens, "hidden": hidden, "ffn": ffn, "matrices": _MATRICES, "threads": count,
                 "dtype": dtype}
            )  # fmt: skip
    return found


def measure_host(point: Point, device: Device, timer: Timer) -> Timing:
    """One expert's FFN in main memory; several threads can only be timed by the wall clock."""
    import torch

    from moesim.calibrate.host import host_side

    tokens, hidden, ffn, threads = number(point, "tokens", "hidden", "ffn", "threads")
    dtype = str(point["dtype"])
    host, clock = host_side(device, timer)
    x = host.take(dtype, tokens, hidden)

    def fresh() -> tuple[Any, ...]:
        return x, host.take(dtype, 2 * ffn, hidden), host.take(dtype, hidden, ffn)

    torch.set_num_threads(threads)
    try:
        return measure(Work(expert_ffn, fresh, wall=threads > 1, threads=threads), clock)
    finally:
        torch.set_num_threads(1)


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "fp32" else 2


GROUPED = Family("grouped", "experts", grouped_points, measure_grouped, grouped_runnable, share=2.5)
HOST_EXPERT = Family("host_expert", "experts", host_points, measure_host, share=2.5)
