"""The device that is measured, and inputs on it that no cache holds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesim.errors import CalibrationError
from moesim.units import GIB, MIB

_POOL_CACHES = 4  # a pool of so many cache sizes: an input comes round again only after the caches held others
_MAX_POOL = GIB
_BLOCK = 16 << 20  # random numbers drawn; a larger pool repeats them, farther apart than any cache is large
_RUNS = 2500  # a budget must hold so many of the longest runs, or too few points would fit in it


@dataclass
class Device:
    """kind is `cuda` or `cpu`; where: torch's name for it; flops and gbps: rough rates that only bound which points
    are worth their time; cache_bytes: the last-level cache."""

    kind: str
    name: str
    where: str
    cache_bytes: int
    memory_bytes: int
    flops: float
    gbps: float
    cores: int
    capability: tuple[int, int] = (0, 0)
    count: int = 1
    index: int = 0
    seed: int = 0
    _pools: dict[str, Any] = field(default_factory=dict)

    def take(self, dtype: str, *shape: int) -> Any:
        """A random tensor: the next stretch of a pool larger than the caches, so none of it is in them."""
        size = 1
        for extent in shape:
            size *= extent
        pool = self._pools.get(dtype)
        if pool is None or pool.size < 2 * size:
            pool = self._pools[dtype] = Pool(self, dtype, 2 * size)
        return pool.take(size).view(shape)

    def empty(self, dtype: str, *shape: int) -> Any:
        """An uninitialised tensor, for results."""
        import torch

        return torch.empty(shape, dtype=torch_dtype(dtype), device=self.where)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given; a CPU has."""
        if self.kind == "cuda":
            import torch

            torch.cuda.synchronize(self.index)

    def apart(self, run: Callable[[], Any]) -> Callable[[], None]:
        """Start `run` on a stream of its own; what is returned waits for that stream. A CPU runs it at once."""
        if self.kind != "cuda":
            run()
            return lambda: None
        import torch

        side = torch.cuda.Stream(self.index)
        with torch.cuda.stream(side):
            run()
        return side.synchronize

    def wait_for(self, run: Callable[[], Any]) -> None:
        """`run` on a stream of its own, waited for; other streams go on."""
        self.apart(run)()

    def host(self, nbytes: int, pinned: bool) -> Any:
        """A buffer in host memory, every page touched."""
        import torch

        return torch.ones(nbytes, dtype=torch.int8, pin_memory=pinned)

    def affords(self, seconds_of_budget: float, flops: float = 0.0, nbytes: float = 0.0) -> bool:
        """Whether one run is short enough to be repeated within a budget, and its data fit the device."""
        run = flops / self.flops + nbytes / (self.gbps * 1e9)
        return run <= seconds_of_budget / _RUNS and nbytes <= self.memory_bytes / 4


class Pool:
    """Random numbers on a device, handed out stretch by stretch, round and round."""

    def __init__(self, device: Device, dtype: str, size: int) -> None:
        import torch

        target = torch_dtype(dtype)
        itemsize = torch.empty((), dtype=target).element_size()
        wanted = min(_MAX_POOL, max(64 * MIB, _POOL_CACHES * device.cache_bytes)) // itemsize
        self.size = max(wanted, size)
        generator = None if device.where == "meta" else torch.Generator(device.where).manual_seed(device.seed)
        if target in (torch.int8, torch.uint8):
            words = torch.empty(-(-self.size // 8), dtype=torch.int64, device=device.where)
            self._flat = words.random_(generator=generator).view(target)
        else:
            # Small and centred on zero: products of the widths measured stay finite in every dtype.
            fill = torch.float32 if itemsize == 1 else target
            block = torch.empty(min(_BLOCK, self.size), dtype=fill, device=device.where)
            block = block.normal_(0, 0.05, generator=generator).to(target)
            self._flat = block.repeat(-(-self.size // len(block)))
        self._at = 0

    def take(self, size: int) -> Any:
        if self._at + size > self.size:
            self._at = 0
        start = self._at
        self._at += -(-size // 64) * 64  # tensors start where allocations would: on a cache line
        return self._flat[start : start + size]


_DTYPES = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn",
           "int8": "int8", "int4": "uint8"}  # fmt: skip


def torch_dtype(dtype: str) -> Any:
    """torch's type for a name in a row; int4 is packed two to a byte."""
    import torch

    return getattr(torch, _DTYPES[dtype])


def open_device(name: str | None, seed: int = 0) -> Device:
    """`cuda:0`, `cpu`, or None: the first GPU where there is one. Raises CalibrationError for one that is not there."""
    try:
        import torch
    except ImportError:
        raise CalibrationError("calibrate needs torch, which is not installed; pip install 'moesim[gpu]'") from None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda:0" if found else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise CalibrationError(f"--device '{name}': not a device; write cpu, cuda or cuda:0")
    if name == "cpu":
        return _cpu(torch, seed)
    index = int(match[1] or 0)
    if not found:
        raise CalibrationError(f"--device {name}: torch {torch.__version__} sees no CUDA GPU here; use --device cpu")
    if index >= found:
        raise CalibrationError(f"--device {name}: this machine has {found} CUDA GPU(s), counted from cuda:0")
    return _cuda(torch, index, found, seed)


def _cpu(torch: Any, seed: int) -> Device:
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", "cpu", "cpu", last_level_cache(), memory, flops=4e10, gbps=5, cores=cores, seed=seed)


def _cuda(torch: Any, index: int, count: int, seed: int) -> Device:
    torch.cuda.set_device(index)
    facts = torch.cuda.get_device_properties(index)
    capability = (facts.major, facts.minor)
    cores = len(os.sched_getaffinity(0))
    cache = getattr(facts, "L2_cache_size", 64 * MIB)
    memory = torch.cuda.mem_get_info(index)[0]
    return Device("cuda", facts.name, f"cuda:{index}", cache, memory, flops=5e13, gbps=300, cores=cores,
                  capability=capability, count=count, index=index, seed=seed)  # fmt: skip


def last_level_cache() -> int:
    """Bytes of the largest cache of core 0; 32 MiB where the kernel does not say."""
    sizes = [_size(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 * MIB)


def _size(path: Path) -> int:
    text = path.read_text().strip()
    return int(text.rstrip("KM")) * (1024 if text.endswith("K") else MIB if text.endswith("M") else 1)
