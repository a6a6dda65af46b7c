"""Small kernels bound by memory or by being launched at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.family import Family, Point, number
from moesim.calibrate.timing import Timer, Timing, Work, measure
from moesim.units import KIB, MIB

_HIDDEN, _HEAD, _EXPERTS, _TOP_K, _VOCABULARY = 4096, 128, 128, 8, 131072


def small_points(device: Device, budget_s: float) -> list[Point]:
    """Bytes in powers of two; a router's and a sampler's rows have their own widths."""
    largest = 256 * MIB if device.kind == "cuda" else 32 * MIB
    sizes = [KIB << i for i in range(20) if KIB << i <= largest]
    least = {"norm": 2 * _HIDDEN, "rope": 2 * _HEAD, "router": 2 * _EXPERTS, "permute": 2 * _HIDDEN,
             "sampling": _VOCABULARY}  # fmt: skip
    itemsize = _itemsize(device)
    # Sampling sorts nothing here but still walks a vocabulary per sequence: 64 sequences are plenty.
    most = {"sampling": 64 * _VOCABULARY * itemsize}
    return [
        {"nbytes": size, "what": what}
        for what, smallest in least.items()
        for size in sizes
        if smallest * itemsize <= size <= most.get(what, largest) and device.affords(budget_s, 0, 4 * size)
    ]


def measure_small(point: Point, device: Device, timer: Timer) -> Timing:
    """nbytes counts what a kernel must read and write once: input and output, not weights or indices."""
    return measure(_SMALL[str(point["what"])](device, number(point, "nbytes")[0]), timer)


def _norm(device: Device, nbytes: int) -> Work:
    import torch

    rows = nbytes // (2 * _HIDDEN * _itemsize(device))
    weight = device.take(_dtype(device), _HIDDEN)
    norm = torch.nn.functional.rms_norm
    return Work(lambda x: norm(x, (_HIDDEN,), weight, 1e-6), lambda: (device.take(_dtype(device), rows, _HIDDEN),))


def _rope(device: Device, nbytes: int) -> Work:
    import torch

    rows = nbytes // (2 * _HEAD * _itemsize(device))
    cos, sin = (device.take(_dtype(device), rows, _HEAD // 2) for _ in range(2))

    def run(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return Work(run, lambda: (device.take(_dtype(device), rows, _HEAD),))


def _router(device: Device, nbytes: int) -> Work:
    rows = nbytes // (2 * _EXPERTS * _itemsize(device))

    def run(logits: Any) -> Any:
        weights, experts = logits.softmax(-1).topk(_TOP_K, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts

    return Work(run, lambda: (device.take(_dtype(device), rows, _EXPERTS),))


def _permute(device: Device, nbytes: int) -> Work:
    """Rows gathered into expert order; going back is the same copy."""
    import torch

    rows = nbytes // (2 * _HIDDEN * _itemsize(device))
    generator = torch.Generator().manual_seed(device.seed)
    order = torch.randperm(rows, generator=generator).to(device.where)
    return Work(lambda x: x.index_select(0, order), lambda: (device.take(_dtype(device), rows, _HIDDEN),))


def _sampling(device: Device, nbytes: int) -> Work:
    """Gumbel-max: one draw per row without sorting the vocabulary."""
    rows = nbytes // (_VOCABULARY * _itemsize(device))

    def run(logits: Any) -> Any:
        probabilities = logits.softmax(-1)
        return (probabilities / logits.new_empty(logits.shape).exponential_()).argmax(-1)

    return Work(run, lambda: (device.take(_dtype(device), rows, _VOCABULARY),))


_SMALL: dict[str, Callable[[Device, int], Work]] = {
    "norm": _norm, "rope": _rope, "router": _router, "permute": _permute, "sampling": _sampling,
}  # fmt: skip


def launch_points(device: Device, budget_s: float) -> list[Point]:
    """Chains of kernels, launched one by one and as one graph."""
    return [{"graph": graph, "kernels": kernels} for graph in (0, 1) for kernels in (1, 2, 4, 8, 16, 64, 256, 1024)]


def launch_runnable(device: Device, point: Point) -> str | None:
    """Graphs are CUDA's."""
    return "CUDA graphs need a CUDA GPU" if point["graph"] and device.kind != "cuda" else None


def measure_launch(point: Point, device: Device, timer: Timer) -> Timing:
    """A chain of additions to one number. By the wall clock, as launching keeps the host busy, not the device."""
    kernels = number(point, "kernels")[0]
    x = device.take("fp32", 1).clone()

    def run() -> None:
        for _ in range(kernels):
            x.add_(1.0)

    def run_and_wait() -> None:
        run()
        device.synchronize()

    if point["graph"] or device.kind == "cpu":
        return measure(Work(run, graph=bool(point["graph"])), timer)
    return measure(Work(run_and_wait, wall=True), timer)


def _dtype(device: Device) -> str:
    return "bf16" if device.kind == "cuda" else "fp32"


def _itemsize(device: Device) -> int:
    return 2 if device.kind == "cuda" else 4


SMALL = Family("small", "small", small_points, measure_small, share=1.2)
LAUNCH = Family("launch", "small", launch_points, measure_launch, launch_runnable, share=0.3)
