"""What a measurement is worth nothing without: hardware, software, and the state they were in under load."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import moesim
from moesim.calibrate.clocks import Clocks
from moesim.calibrate.device import Device
from moesim.hardware import drive
from moesim.units import GIB, MIB

_SCHEMA = 1
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_int8", "neon", "sve", "bf16")


def describe(device: Device) -> dict[str, Any]:
    """Conditions that hold for a whole run. A value that cannot be read is None."""
    import torch

    cpu = _cpuinfo()
    return {
        "schema": _SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "moesim": moesim.__version__,
        "gpu": device.name if device.kind == "cuda" else None,
        "gpus": device.count if device.kind == "cuda" else 0,
        "gpu_free_bytes": device.memory_bytes if device.kind == "cuda" else None,
        "driver": Clocks(device.index).driver() if device.kind == "cuda" else None,
        "cuda": torch.version.cuda if device.kind == "cuda" else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cpu": cpu.get("model name", platform.processor() or platform.machine()),
        "cpu_flags": [flag for flag in _FLAGS if flag in cpu.get("flags", cpu.get("Features", "")).split()],
        "cores": device.cores,
        "compute_threads": 1,
        "last_level_cache_bytes": device.cache_bytes,
        "numa": f"{len(list(Path('/sys/devices/system/node').glob('node[0-9]*'))) or 1} node(s)",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / GIB:.1f} GiB",
        "nvme": drive(tempfile.gettempdir()),
        "link": "PCIe" if device.kind == "cuda" else "copies within main memory stand for the link",
        "seed": device.seed,
        "host": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
    }


def under_load(device: Device) -> dict[str, Any]:
    """clocks (MHz), power_w and pcie while the device computes and copies; an idle link and an idle clock mislead."""
    if device.kind == "cpu":
        return {"clocks": {"cpu_mhz": _cpu_mhz()}, "power_w": None, "pcie": None}
    clocks = Clocks(device.index)
    computing = _while_computing(device, clocks)
    copying = _while_copying(device, clocks)
    if not computing:
        return {"clocks": None, "power_w": None, "pcie": None}
    return {
        "clocks": {name: computing[name] for name in ("sm_mhz", "memory_mhz", "temperature_c")},
        "power_w": computing["power_w"],
        "power_limit_w": computing["power_limit_w"],
        "pcie": f"gen{copying['pcie_gen']} x{copying['pcie_width']}" if copying.get("pcie_gen") else None,
    }


def _while_computing(device: Device, clocks: Clocks) -> dict[str, Any]:
    a, b = device.take("fp32", 4096, 4096), device.take("fp32", 4096, 4096)
    started = time.perf_counter()
    read: dict[str, Any] = {}
    while time.perf_counter() - started < 0.5:
        for _ in range(8):
            a @ b
        read = clocks.conditions()
        device.synchronize()
    return read


def _while_copying(device: Device, clocks: Clocks) -> dict[str, Any]:
    near, far = device.empty("int8", 64 * MIB), device.host(64 * MIB, pinned=True)
    read: dict[str, Any] = {}
    for _ in range(5):
        for _ in range(4):
            near.copy_(far, non_blocking=True)
        read = clocks.conditions()
        device.synchronize()
    return read


def _cpu_mhz() -> float | None:
    """Of the fastest core after a tenth of a second of work."""
    started = time.perf_counter()
    while time.perf_counter() - started < 0.1:
        sum(range(1000))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return max((float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")), default=None)


def _cpuinfo() -> dict[str, str]:
    """Fields of the first core."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
