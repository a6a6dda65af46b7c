"""Machine files: a catalogue machine and what is different about yours, in YAML or JSON."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from moesim.efficiencies import Efficiencies, check_term
from moesim.errors import MachineError, MoesimError, nearest
from moesim.machine import PLATFORMS, THIS, Machine, Nvme, load_machine
from moesim.prices import Prices
from moesim.units import format_size, parse_size

MAX_BYTES, MAX_KEYS = 1 << 16, 100


def read_machine(path: Path) -> Machine:
    """The machine of a file that starts `from: NAME` and overrides fields such as `host.memory: 128GiB`.

    Nested mappings and dotted keys mean the same. Raises MachineError by file, key, value, rule and remedy.
    """
    settings = _flatten(_load(path), str(path))
    base = settings.pop("from", None)
    if not isinstance(base, str):
        raise MachineError(f"{path}: starts from no machine; add a line such as 'from: rtx-4090'")
    if Path(base).suffix:
        raise MachineError(f"{path}: from: '{base}' must be a name of the catalogue, not a file")
    try:
        machine = changed(base, {"name": path.stem} | settings)
        return replace(machine, source=f"{path.name}, from {machine.source if base == THIS else base}")
    except MachineError as error:
        raise MachineError(f"{path}: {error}") from error


def changed(base: str, settings: dict[str, Any]) -> Machine:
    """A machine of the catalogue with fields changed, by dotted key; it has no profile unless that is one of them.

    The machine moesim runs on keeps its own, and need not know what `settings` says.
    """
    if base == THIS:
        from moesim.this_machine import this_machine

        machine = this_machine(settings)
    else:
        machine = replace(load_machine(base), profile="")
    if "prices.usd_per_hour" in settings:  # one's own price is not that of the catalogue's source
        machine = replace(machine, prices=Prices(source="machine file"))
    for key, value in settings.items():
        machine = _set(machine, key, value)
    return _consistent(machine, settings)


def _load(path: Path) -> dict[str, Any]:
    import yaml

    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror})") from error
    if len(text) > MAX_BYTES:
        raise MachineError(f"{path}: larger than {MAX_BYTES} bytes; a machine file is a handful of lines")
    try:
        data = yaml.safe_load(text)  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise MachineError(f"{path}: not YAML or JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise MachineError(f"{path}: must be a mapping such as 'from: rtx-4090'")
    return data


def _flatten(data: dict[Any, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; a key given twice, once each way, is an error, and so are too many."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        inner = _flatten(value, where, f"{key}.") if isinstance(value, dict) and key.count(".") < 3 else {key: value}
        for item in inner.items():
            if item[0] in flat:
                raise MachineError(f"{where}: {item[0]} is given twice; keep one")
            flat[item[0]] = item[1]
        if len(flat) > MAX_KEYS:
            raise MachineError(f"{where}: more than {MAX_KEYS} keys; a machine file is a handful of lines")
    return flat


def _set(machine: Machine, key: str, value: Any) -> Machine:
    """`machine` with one field changed."""
    part, _, field = key.rpartition(".")
    if part == "efficiencies":
        return replace(machine, efficiencies=(*machine.efficiencies, (field, check_term(field, value))))
    if key == "nvme" and value is None:
        return replace(machine, nvme=None)
    if key not in KEYS:
        known = [*KEYS, "nvme: null", "from", *(f"efficiencies.{name}" for name in Efficiencies.__dataclass_fields__)]
        raise MachineError(f"unknown key '{key}'{nearest(key, known)}")
    try:
        checked = KEYS[key](value)
    except (ValueError, OverflowError) as error:
        raise MachineError(f"{key}: {value!r} {error}") from error
    field = {"memory": "memory_bytes", "reserve": "reserve_bytes"}.get(field, field)
    if not part:
        return replace(machine, **{field: checked})
    if part == "nvme" and machine.nvme is None:
        machine = replace(machine, nvme=Nvme(1.0))
    return replace(machine, **{part: replace(getattr(machine, part), **{field: checked})})


def _consistent(machine: Machine, settings: dict[str, Any]) -> Machine:
    """Check what depends on two fields; a unified machine's host follows its GPU."""
    gpu, host, pcie = machine.gpu, machine.host, machine.pcie
    if machine.gpus % machine.hosts:
        raise MachineError(
            f"hosts: {machine.hosts} hosts cannot share {machine.gpus} GPUs evenly; set gpus to a multiple"
        )
    if machine.hosts > 1 and machine.network_gbps is None:
        raise MachineError(
            "network_gbps: missing; say what each GPU reaches other hosts with, in GB/s and one direction (400 Gb/s "
            "are 50)"
        )
    if machine.unified:
        for key in settings:
            if key.startswith("pcie.") or key in ("host.memory", "host.dram_gbps"):
                raise MachineError(
                    f"{key}: this machine has one memory and no PCIe hop; set gpu.memory or gpu.hbm_gbps"
                )
        return replace(machine, host=replace(host, memory_bytes=gpu.memory_bytes, dram_gbps=gpu.hbm_gbps))
    if host.reserve_bytes >= host.memory_bytes:
        raise MachineError(f"host.reserve: {format_size(host.reserve_bytes)} must be below host.memory")
    if pcie.duplex_gbps is not None and not pcie.gbps <= pcie.duplex_gbps <= 2 * pcie.gbps:
        raise MachineError(
            f"pcie.duplex_gbps: {pcie.duplex_gbps:g} must be from pcie.gbps ({pcie.gbps:g}) to twice that"
        )
    return machine


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError("must be a number above 0")
    return float(value)


def _time(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError("must be a number of microseconds, 0 or more")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 65536:
        raise ValueError("must be a whole number from 1 to 65536")
    return value


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("must be a size such as 128GiB")
    try:
        size = parse_size(str(value))
    except MoesimError as error:
        raise ValueError("must be a size such as 128GiB") from error
    if not 0 < size < 1 << 60:
        raise ValueError("must be a size such as 128GiB, above 0")
    return size


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 80:
        raise ValueError("must be a name of 1 to 80 characters")
    return value


def _day(value: Any) -> str:
    try:
        return date.fromisoformat(str(value)).isoformat()  # YAML makes a date of it
    except ValueError:
        raise ValueError("must be a day such as 2026-11-21") from None


def _platform(value: Any) -> str:
    if value not in PLATFORMS:
        raise ValueError(f"must be one of {', '.join(PLATFORMS)}")
    return str(value)


KEYS: dict[str, Callable[[Any], Any]] = {
    "name": _name,
    "gpus": _count,
    "hosts": _count,
    "network_gbps": _positive,
    "gpu.name": _name,
    "gpu.memory": _size,
    "gpu.hbm_gbps": _positive,
    "gpu.tflops": _positive,
    "gpu.fp8_tflops": _positive,
    "gpu.fp4_tflops": _positive,
    "gpu.tdp_w": _positive,
    "gpu.idle_w": _positive,
    "gpu.nvlink_gbps": _positive,
    "host.name": _name,
    "host.platform": _platform,
    "host.memory": _size,
    "host.dram_gbps": _positive,
    "host.cores": _count,
    "host.sockets": _count,
    "host.numa_duplicated": _flag,
    "host.pinned": _flag,
    "host.reserve": _size,
    "pcie.gbps": _positive,
    "pcie.overhead_us": _time,
    "pcie.duplex_gbps": _positive,
    "nvme.gbps": _positive,
    "nvme.overhead_us": _time,
    "prices.usd_per_hour": _positive,
    "prices.date": _day,
    "prices.source": _name,
    "profile": _name,
}
