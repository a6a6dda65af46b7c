"""What hardware this computer has, as its system and drivers say. Only reads: nothing is measured or loaded."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from moesim.efficiencies import read_table
from moesim.machine import catalogue
from moesim.units import MIB

QUERY = "name,memory.total,memory.free,driver_version,pcie.link.gen.max,pcie.link.width.max,uuid"
# Words of a card's name that do not tell one of the catalogue from another.
_SAME = re.compile(r"nvidia|geforce|tesla|graphics|blackwell|server|workstation|edition|hbm\w*|pcie|sxm\d*|\d+gb")


def cpu() -> dict[str, Any]:
    """cores: as programs see them; usable_cores: those they may run on; physical_cores and sockets: of the usable ones,
    None where the system does not say; limit_cores: how many a container may keep busy, None where it may all."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    places = [_place(number) for number in usable]
    known = None not in places
    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(usable),
        "physical_cores": len(set(places)) if known else None,
        "sockets": len({place[0] for place in places if place}) if known else None,
        "limit_cores": _quota(_read(Path("/sys/fs/cgroup/cpu.max"))),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None,
    }


def cpu_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _quota(text: str) -> int | None:
    """Cores of a control group's `quota period`; part of a core counts as a whole one."""
    quota, _, period = text.strip().partition(" ")
    return -(-int(quota) // int(period)) if quota.isdigit() and period.isdigit() else None


def _place(number: int) -> tuple[str, str] | None:
    """(socket, core) of a logical CPU; hyperthreads share one."""
    topology = Path(f"/sys/devices/system/cpu/cpu{number}/topology")
    socket, core = (_read(topology / name).strip() for name in ("physical_package_id", "core_id"))
    return (socket, core) if socket and core else None


def memory() -> dict[str, Any]:
    """Bytes in all, free for programs, and what a container allows; None where the system does not say."""
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", _read(Path("/proc/meminfo"))))
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return {
        "total_bytes": int(kilobytes["MemTotal"]) * 1024 if "MemTotal" in kilobytes else None,
        "available_bytes": int(kilobytes["MemAvailable"]) * 1024 if "MemAvailable" in kilobytes else None,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def drive(directory: str) -> str | None:
    """The drive that holds a directory, as the kernel names it; None for memory and network file systems."""
    device = os.stat(directory).st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not block.exists():
        return None
    disk = block.resolve()
    disk = disk.parent if (disk / "partition").exists() else disk
    model = disk / "device" / "model"
    return f"{disk.name} ({model.read_text().strip() if model.exists() else 'no model name: virtual'})"


def gpus() -> list[dict[str, Any]]:
    """NVIDIA's cards that CUDA_VISIBLE_DEVICES leaves, by nvidia-ml-py or else nvidia-smi; other makers' are not
    looked for."""
    return visible(_by_nvml() or parse_gpus(_nvidia_smi()), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(found: list[dict[str, Any]], devices: str | None) -> list[dict[str, Any]]:
    """As CUDA reads the variable: numbers or beginnings of UUIDs, up to the first that is not there."""
    if devices is None:
        return found
    kept = []
    for name in (part.strip() for part in devices.split(",")):
        if name.isdigit() and int(name) < len(found):
            kept.append(found[int(name)])
        elif match := [gpu for gpu in found if name.startswith("GPU-") and str(gpu["uuid"]).startswith(name)]:
            kept.append(match[0])
        else:
            break
    return kept


def _by_nvml() -> list[dict[str, Any]]:
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        driver = str(nvml.nvmlSystemGetDriverVersion())
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception:  # not installed, no driver, or a container without its library
        return []
    return [_nvml_gpu(nvml, handle, driver) for handle in handles]


def _nvml_gpu(nvml: Any, handle: Any, driver: str) -> dict[str, Any]:
    def ask(name: str) -> Any:
        try:
            return getattr(nvml, name)(handle)
        except Exception:  # a card that does not support the question
            return None

    size = ask("nvmlDeviceGetMemoryInfo")
    return _gpu(
        str(ask("nvmlDeviceGetName")), size and int(size.total), size and int(size.free), driver,
        ask("nvmlDeviceGetMaxPcieLinkGeneration"), ask("nvmlDeviceGetMaxPcieLinkWidth"), ask("nvmlDeviceGetUUID"),
    )  # fmt: skip


def _nvidia_smi() -> str:
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def parse_gpus(answer: str) -> list[dict[str, Any]]:
    """The lines nvidia-smi prints for QUERY, each with the catalogue's machine it is, if it is there."""
    found = []
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERY.split(",")):
            continue
        total, free, generation, width = (int(cells[i]) if cells[i].isdigit() else None for i in (1, 2, 4, 5))
        found.append(_gpu(cells[0], total and total * MIB, free and free * MIB, cells[3], generation, width, cells[6]))
    return found


def _gpu(
    name: str, memory: int | None, free: int | None, driver: str, generation: int | None, width: int | None, uuid: Any
) -> dict[str, Any]:
    return {
        "name": name,
        "memory_bytes": memory,
        "free_bytes": free,
        "driver": driver,
        "pcie": f"gen{generation} x{width}" if generation and width else None,
        "uuid": uuid,
        "machine": machine_named(name, memory),
    }


def machine_named(gpu: str, memory: int | None) -> str | None:
    """The machine of the catalogue with this card: every word of its name fits, no other is left, nor is memory."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    best: tuple[int, str] | None = None
    for row in read_table("machines"):
        for name in (row["name"], *row["aliases"].split()):
            parts = name.split("-")
            fits = all(part in words or (part == "sxm" and any(w.startswith("sxm") for w in words)) for part in parts)
            left = [word for word in words if word not in parts and not _SAME.fullmatch(word)]
            if fits and not left and (best is None or len(name) > best[0]):
                best = len(name), row["name"]
    if best is None:
        return None
    known = catalogue()[best[1]].gpu.memory_bytes
    return best[1] if memory is None or 0.85 < memory / known < 1.1 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
