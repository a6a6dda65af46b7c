"""What this machine can do, and the next command to run. Only reads: nothing is measured, nothing heavy is loaded."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
from pathlib import Path
from typing import Any

from moesim import __version__, hardware
from moesim.errors import MoesimError
from moesim.machine import THIS
from moesim.profile import shipped
from moesim.profile_compare import conditions_here, profiles_in
from moesim.this_machine import this_machine
from moesim.units import GIB, format_size

SHIPPED_TRACE = Path("traces/tiny-moe-8x16.parquet")


def examine(directory: Path) -> dict[str, Any]:
    """Everything found: software, cpu, memory, gpus, drive, profiles in and below `directory`, what `--machine this`
    is, `can` and `next`."""
    gpus = hardware.gpus()
    free = shutil.disk_usage(directory).free
    found: dict[str, Any] = {
        "moesim": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": hardware.cpu(),
        "memory": hardware.memory(),
        "gpus": gpus,
        "drive": {"path": str(directory.resolve()), "free_bytes": free, "name": hardware.drive(str(directory))},
        "extras": _extras(),
        "profiles": profiles_in(directory, conditions_here(gpus)),
        "shipped_profiles": shipped(),
        "this": _this(directory),
    }
    found["can"] = _can(found)
    return found | {"next": _next(found, directory)}


def _this(directory: Path) -> dict[str, str | None]:
    """The machine that `--machine this` stands for in `directory`, or why there is none."""
    try:
        machine = this_machine(directory=directory)
    except MoesimError as error:
        return {"machine": None, "summary": None, "error": str(error)}
    return {"machine": machine.name, "summary": machine.summary, "error": None}


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
    if found["this"]["machine"] and any(p.get("fresh") for p in found["profiles"]):
        return f"moesim plan --model qwen3-30b-a3b --machine {THIS}"
    if found["gpus"]:
        if found["can"][f"calibrate --device {device}"] != "yes":
            return "pip install --force-reinstall torch" if _version("torch") else "pip install 'moesim[gpu]'"
        return f"moesim calibrate --device {device} --budget 5m -o my-box"
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
        f"drive        {format_size(found['drive']['free_bytes'])} free in {found['drive']['path']}"
        + (f", {found['drive']['name']}" if found["drive"]["name"] else ""),
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
    this = found["this"]
    lines.append(f"{THIS:13}{this['error'] or this['summary']}")
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
