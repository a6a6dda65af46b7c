"""What this machine can do, and the next command to run. Only reads: nothing is measured, nothing heavy is loaded."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from moesim import __version__
from moesim.efficiencies import read_table
from moesim.errors import MoesimError
from moesim.machine import catalogue
from moesim.profile import Profile, read_profile_meta, shipped
from moesim.profile_compare import changed, conditions_here
from moesim.units import GIB, MIB, format_size

QUERY = "name,memory.total,memory.free,driver_version,pcie.link.gen.max,pcie.link.width.max"
SHIPPED_TRACE = Path("traces/tiny-moe-8x16.parquet")
MAX_PROFILES = 50
# Words of a card's name that do not tell one of the catalogue from another.
_SAME = re.compile(r"nvidia|geforce|tesla|graphics|blackwell|server|workstation|edition|hbm\w*|pcie|sxm\d*|\d+gb")


def examine(directory: Path) -> dict[str, Any]:
    """Everything found: software, cpu, memory, gpus, drive, profiles in and below `directory`, `can` and `next`."""
    found: dict[str, Any] = {
        "moesim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "memory": _memory(),
        "gpus": _gpus(),
        "drive": {"path": str(directory.resolve()), "free_bytes": shutil.disk_usage(directory).free},
        "extras": _extras(),
        "profiles": _profiles(directory),
        "shipped_profiles": shipped(),
    }
    found["can"] = _can(found)
    return found | {"next": _next(found, directory)}


def _cpu() -> dict[str, Any]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or None
    return {"name": conditions_here()["cpu"], "cores": os.cpu_count(), "usable_cores": usable, "numa_nodes": nodes}


def _memory() -> dict[str, Any]:
    """Bytes in all, free for programs, and what a container allows; None where the system does not say."""
    kilobytes = dict(re.findall(r"(\w+):\s+(\d+) kB", _read(Path("/proc/meminfo"))))
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return {
        "total_bytes": int(kilobytes["MemTotal"]) * 1024 if "MemTotal" in kilobytes else None,
        "available_bytes": int(kilobytes["MemAvailable"]) * 1024 if "MemAvailable" in kilobytes else None,
        "limit_bytes": int(limit) if limit.isdigit() else None,
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpus() -> list[dict[str, Any]]:
    """NVIDIA's cards as the driver lists them; other makers' are not looked for."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(answer)


def parse_gpus(answer: str) -> list[dict[str, Any]]:
    """The lines nvidia-smi prints for QUERY, each with the catalogue's machine it is, if it is there."""
    gpus = []
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(QUERY.split(",")):
            continue
        numbers = [int(cell) if cell.isdigit() else None for cell in cells]
        memory = numbers[1] and numbers[1] * MIB
        gpus.append(
            {
                "name": cells[0],
                "memory_bytes": memory,
                "free_bytes": numbers[2] and numbers[2] * MIB,
                "driver": cells[3],
                "pcie": f"gen{cells[4]} x{cells[5]}" if numbers[4] and numbers[5] else None,
                "machine": machine_named(cells[0], memory),
            }
        )
    return gpus


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


def _extras() -> dict[str, dict[str, str | None]]:
    """Version of every package of every optional part, None where it is not installed."""
    try:
        wanted = importlib.metadata.requires("moesim") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in wanted:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)", requirement)
        if match and match[2] != "test":
            extras.setdefault(match[2], {})[match[1]] = _version(match[1])
    return extras


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _profiles(directory: Path) -> list[dict[str, Any]]:
    """Profiles in `directory` and one level below it, and whether this is still the machine they were measured on."""
    paths = sorted([*directory.glob("meta.yaml"), *directory.glob("*/meta.yaml")])[:MAX_PROFILES]
    found = []
    for path in paths:
        row: dict[str, Any] = {"path": str(path.parent)}
        try:
            meta = read_profile_meta(path.parent)
        except MoesimError as error:
            found.append(row | {"error": str(error)})
            continue
        changes = changed(Profile(str(meta["name"]), meta))
        measured = meta["provenance"] == "measured"
        row |= {"name": str(meta["name"]), "machine": meta["machine"], "provenance": meta["provenance"]}
        found.append(row | {"date": str(meta["date"]), "fresh": measured and not changes, "changes": changes})
    return found


def _can(found: dict[str, Any]) -> dict[str, str]:
    """What may be asked of this machine: `yes`, or what lacks."""
    torch = _version("torch")
    plots = "yes" if _version("plotly") else "no plotly: pip install 'moesim[plots]'"
    missing = None if torch else "no torch: pip install 'moesim[gpu]'"
    if torch and torch.endswith("+cpu"):
        unable = f"torch {torch} is built for CPUs alone: install one for CUDA (pytorch.org)"
    else:
        unable = missing or "yes"
    cuda = unable if found["gpus"] else "no NVIDIA GPU (nvidia-smi lists none)"
    return {
        "replay, compare, sweep, whatif": "yes",
        "plots and reports": plots,
        "calibrate --device cpu": missing or "yes",
        "calibrate --device cuda:0": cuda,
        "validate live --device cpu": missing or "yes",
        "validate live --device cuda": cuda,
    }


def _next(found: dict[str, Any], directory: Path) -> str:
    """The one command that brings most now."""
    device = "cuda:0" if found["gpus"] else "cpu"
    trace = str(SHIPPED_TRACE) if (directory / SHIPPED_TRACE).is_file() else "TRACE.parquet"
    fresh = [p["path"] for p in found["profiles"] if p.get("fresh") and p["machine"]]
    if fresh:
        return f"moesim replay {trace} --policy LRU --slots-per-layer 8 --machine {fresh[0]}"
    if found["gpus"]:
        if found["can"][f"calibrate --device {device}"] != "yes":
            return "pip install --force-reinstall torch" if _version("torch") else "pip install 'moesim[gpu]'"
        return f"moesim calibrate --device {device} --budget 5m -o my-machine"
    if trace != "TRACE.parquet":
        return f"moesim replay {trace} --policy LRU --slots-per-layer 8 --machine rtx-4090"
    return "moesim trace synth --model Qwen3-30B-A3B --requests 8 -o TRACE.parquet"


def format_doctor(found: dict[str, Any]) -> str:
    """The page `moesim doctor` prints."""
    cpu, memory = found["cpu"], found["memory"]
    nodes = f", {cpu['numa_nodes']} NUMA node(s)" if cpu["numa_nodes"] else ""
    limit = memory["limit_bytes"]
    lines = [
        f"moesim {found['moesim']}, Python {found['python']}, {found['system']}",
        f"CPU          {cpu['name']}, {cpu['usable_cores']} of {cpu['cores']} cores usable{nodes}",
        f"memory       {_size(memory['total_bytes'])}, {_size(memory['available_bytes'])} available"
        + (f", this container may use {format_size(limit)}" if limit else ""),
        f"drive        {format_size(found['drive']['free_bytes'])} free in {found['drive']['path']}",
        *(_gpu_line(gpu) for gpu in found["gpus"]),
    ]
    if not found["gpus"]:
        lines.append("GPU          no NVIDIA GPU found; machines of the catalogue can be simulated all the same")
    for name, packages in found["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        have = ", ".join(f"{package} {version}" for package, version in packages.items() if version)
        lack = f"without {', '.join(missing)}: pip install 'moesim[{name}]'" if missing else ""
        lines.append(f"[{name}]".ljust(13) + "; ".join(part for part in (have, lack) if part))
    lines += [_profile_line(row) for row in found["profiles"]]
    if not found["profiles"]:
        lines.append(f"profiles     none here; shipped: {', '.join(found['shipped_profiles'])}")
    lines += ["", *(f"{what:32}{answer}" for what, answer in found["can"].items()), "", f"next: {found['next']}"]
    return "\n".join(lines)


def _size(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / GIB:.1f} GiB"


def _gpu_line(gpu: dict[str, Any]) -> str:
    known = f"machine {gpu['machine']}" if gpu["machine"] else "not in the catalogue: write a machine file"
    free = f" ({_size(gpu['free_bytes'])} free)" if gpu["free_bytes"] else ""
    link = f"PCIe {gpu['pcie']}, " if gpu["pcie"] else ""
    return f"GPU          {gpu['name']}, {_size(gpu['memory_bytes'])}{free}, {link}driver {gpu['driver']}; {known}"


def _profile_line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"profile      {row['error']}"
    state = "imported" if row["provenance"] == "imported" else "fresh" if row["fresh"] else "; ".join(row["changes"])
    return f"profile      {row['path']}, {row['date'][:10]}: {state}"
