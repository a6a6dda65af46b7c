"""`--machine this`: the machine moesim runs on, put together from its hardware, the catalogue and its newest profile.

Rates are the catalogue's (of a known GPU) or measured ones (of host memory, links, drive). What neither knows is asked
for, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesim import hardware
from moesim.costs.families import family
from moesim.efficiencies import read_table
from moesim.errors import MachineError
from moesim.machine import THIS, Gpu, Host, Link, Machine, Nvme, catalogue, load_machine
from moesim.prices import NO_PRICES
from moesim.profile import Profile, read_profile
from moesim.profile_compare import conditions_here, profiles_in
from moesim.units import format_size

PROVENANCE = "this machine"
_UNSET = 1.0  # stands for what a machine file gives, until it does
_PLATFORMS = (
    (r"threadripper|xeon\(r\) w|xeon w", "workstation"),
    (r"epyc|xeon|neoverse|graviton|grace|ampere|power\d", "server"),
)


@dataclass
class _Found:
    """given: keys of the machine file that asks, which need not be found; missing: what is not known, by the key that
    says it; sources: where the rest comes from."""

    given: Collection[str]
    missing: dict[str, str] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)

    def need(self, key: str, value: Any, what: str) -> Any:
        """`value`, or what stands for it until the machine file's own takes its place."""
        if value is not None:
            return value
        if key not in self.given:
            self.missing[key] = what
        return _UNSET


@dataclass(frozen=True)
class Rates:
    """What a profile measured, None where it did not: GB/s of host memory as expert kernels read it with all cores, of
    one direction of the link and of the drive, and the TFLOPS of expert kernels on all cores."""

    dram_gbps: float | None = None
    pcie_gbps: float | None = None
    nvme_gbps: float | None = None
    cpu_tflops: float | None = None


def this_machine(given: Collection[str] = (), directory: Path = Path(".")) -> Machine:
    """The machine this runs on. given: keys that a machine file will set; directory: profiles lie in it or one below.

    Raises MachineError for what cannot be known, by key, with what to do.
    """
    found, gpus = _Found(given), hardware.gpus()
    profile, unused = _newest(directory, gpus)
    rates = measured_rates(profile) if profile else Rates()
    machine = _with_gpus(gpus, found, rates) if gpus else _without_gpu(found, rates)
    if found.missing:
        raise MachineError(_lacks(found, bool(gpus), unused))
    if profile is None:
        found.assumed.append("no fresh profile of `moesim calibrate` here" + unused)
    elif gpus:  # of a CPU they are one core's
        machine = replace(machine, profile=profile.meta["path"])
    source, assumed = ("; ".join(dict.fromkeys(facts)) for facts in (found.sources, found.assumed))
    return replace(machine, provenance=PROVENANCE, source=f"this machine: {source}", assumed=assumed)


def _newest(directory: Path, gpus: list[dict[str, Any]]) -> tuple[Profile | None, str]:
    """The last profile measured on this machine as it is, and why the others are not used."""
    rows = profiles_in(directory, conditions_here(gpus))
    fitting = [row for row in rows if row.get("fresh") and bool(row["gpu"]) == bool(gpus)]
    if fitting:
        path = max(fitting, key=lambda row: row["date"])["path"]
        profile = read_profile(path)
        return replace(profile, meta={**profile.meta, "path": path}), ""
    stale = [f"{row['path']}: {row['changes'][0]}" for row in rows if row.get("changes")]
    return None, f" ({'; '.join(stale)})" if stale else ""


def measured_rates(profile: Profile) -> Rates:
    """The best of its samples; of the link and the drive what their curves say, as the costs take them."""
    experts = [row for row in profile.samples if row["family"] == "host_expert"]
    works = [(family("host_expert").work(row), row["threads"] / row["seconds"]) for row in experts]
    copies = [c for c in profile.of_family("copy") if c.variant == ("h2d", 1, 1, 1, 0)]
    cold = [c for c in profile.of_family("read") if c.variant[0] == 1]
    return Rates(
        max((nbytes * rate / 1e9 for (nbytes, _), rate in works), default=None),
        copies[0].physics.bandwidth / 1e9 if copies else None,
        max((c.physics.bandwidth / 1e9 for c in cold), default=None),
        max((flops * rate / 1e12 for (_, flops), rate in works), default=None),
    )


def _with_gpus(gpus: list[dict[str, Any]], found: _Found, rates: Rates) -> Machine:
    ones = [_with_gpu(gpu, found, rates, first=i == 0) for i, gpu in enumerate(gpus)]
    first, others = ones[0], tuple(one for one in ones if one != ones[0])
    name = "+".join(dict.fromkeys(one.name for one in ones))
    alike = f"{len(ones)}x" if len(ones) > 1 and not others else ""
    return replace(first, name=f"local-{alike}{name}", gpus=len(ones), others=others)


def _with_gpu(gpu: dict[str, Any], found: _Found, rates: Rates, first: bool) -> Machine:
    name, memory = gpu["name"], gpu["memory_bytes"]
    if gpu["machine"]:
        known = load_machine(gpu["machine"])
        found.sources.append(f"GPU {name}, rates of {known.name} in the catalogue")
        if "tflops" in known.assumed:
            found.assumed.append(f"of {known.name}, {known.assumed.removesuffix('; host')}")
    elif first:
        size = "" if memory is None else f" ({format_size(memory)})"
        known = replace(catalogue()["rtx-4090"], name="gpu", profile="")
        hbm = found.need("gpu.hbm_gbps", None, f"GPU '{name}'{size} is not in the catalogue: its memory's GB/s")
        tflops = found.need("gpu.tflops", None, "its dense bf16 TFLOPS")
        memory = found.need("gpu.memory", memory, f"the memory of GPU '{name}'")
        known = replace(known, gpu=Gpu(name, int(memory), hbm, tflops))
        found.sources.append(f"GPU {name}")
    else:
        raise MachineError(
            f"machine '{THIS}': GPU '{name}' beside the first is not in the catalogue; leave it out with "
            "CUDA_VISIBLE_DEVICES, or write a machine file"
        )
    if known.unified:
        host = _host(found, known.gpu.hbm_gbps, memory="gpu.memory")
        card = replace(known.gpu, memory_bytes=host.memory_bytes)
        return replace(known, gpu=card, host=host, nvme=_drive(found, rates), prices=NO_PRICES)
    card = replace(known.gpu, memory_bytes=memory or known.gpu.memory_bytes)
    machine = replace(known, gpu=card, pcie=_link(gpu["pcie"], known, found, rates), prices=NO_PRICES)
    return _measured(machine, found, rates)


def _measured(machine: Machine, found: _Found, rates: Rates) -> Machine:
    """With the host's own memory, cores and drive; what its expert kernels read is measured, so no share of it."""
    dram = found.need("host.dram_gbps", rates.dram_gbps, "the rate of host memory is not known")
    host = _host(found, dram)
    terms: tuple[tuple[str, float], ...] = ()
    if rates.dram_gbps and "host.dram_gbps" not in found.given:
        found.sources.append(f"host memory {dram:.3g} GB/s as measured expert kernels read it")
        terms = ((f"dram_{host.platform}", 1.0), *([("numa_split", 1.0)] if host.sockets > 1 else []))
    return replace(machine, host=host, nvme=_drive(found, rates), efficiencies=terms)


def _without_gpu(found: _Found, rates: Rates) -> Machine:
    """The cores stand where a GPU would, and main memory is its memory; kernels' fixed times stay a GPU's."""
    hbm = found.need("gpu.hbm_gbps", rates.dram_gbps, "the rate of main memory is not known")
    tflops = found.need("gpu.tflops", rates.cpu_tflops, "the TFLOPS of all cores are not known")
    host = _host(found, hbm, memory="gpu.memory")
    found.sources.insert(0, f"no NVIDIA GPU, so {host.name} serves alone")
    found.assumed.append("fixed times of kernels are a GPU's")
    terms = []
    if rates.dram_gbps and "gpu.hbm_gbps" not in found.given:
        found.sources.append(f"main memory {hbm:.3g} GB/s as measured expert kernels read it")
        terms += ["hbm", "hbm_grouped", f"dram_{host.platform}", *(["numa_split"] if host.sockets > 1 else [])]
    if rates.cpu_tflops and "gpu.tflops" not in found.given:
        found.sources.append(f"{tflops:.3g} TFLOPS as measured expert kernels reach on all cores")
        terms += ["mfu", "mfu_grouped"]
    return Machine(
        name="local-cpu",
        gpu=Gpu(host.name, host.memory_bytes, hbm, tflops),
        host=host,
        pcie=Link(hbm),
        nvme=_drive(found, rates),
        unified=True,
        cpu_only=True,
        efficiencies=tuple((name, 1.0) for name in terms),
    )


def _host(found: _Found, dram_gbps: float, memory: str = "host.memory") -> Host:
    """memory: the key of its size."""
    cpu, sizes = hardware.cpu(), hardware.memory()
    known = [size for size in (sizes["total_bytes"], sizes["limit_bytes"]) if size is not None]
    size = int(found.need(memory, min(known, default=None), "the size of main memory is not known"))
    sockets = cpu["sockets"] or 1
    cores = min(n for n in (cpu["physical_cores"] or cpu["usable_cores"], cpu["limit_cores"]) if n)
    platform = _platform(cpu["name"], sockets)
    host = Host(cpu["name"], platform, size, dram_gbps, cores=-(-cores // sockets), sockets=sockets)
    found.sources.append(f"{cpu['name']}, {cores} cores, {format_size(size)}")
    found.assumed.append(f"a {platform} by the CPU's name; {format_size(host.reserve_bytes)} kept by the system")
    return host


def _platform(cpu: str, sockets: int) -> str:
    known = next((name for pattern, name in _PLATFORMS if re.search(pattern, cpu.lower())), "desktop")
    return "server" if sockets > 1 else known


def _link(pcie: str | None, known: Machine, found: _Found, rates: Rates) -> Link:
    """As measured, else the catalogue's rate of its generation and width."""
    rows = {row["name"]: float(row["gbps"]) for row in read_table("links")}
    if rates.pcie_gbps:
        found.sources.append(f"PCIe {pcie or 'link'}, {rates.pcie_gbps:.3g} GB/s measured")
        return Link(rates.pcie_gbps)
    if known.pcie.gbps == rows["nvlink-c2c"]:
        return known.pcie
    generation, width = re.findall(r"\d+", pcie or "") or ("", "")
    of_16 = rows.get(f"pcie{generation}-x16")
    gbps = found.need(
        "pcie.gbps", of_16 and of_16 * int(width) / 16, f"the rate of PCIe {pcie or '(generation and width unknown)'}"
    )
    if of_16:
        found.sources.append(f"PCIe {pcie}: {width}/16 of {of_16:g} GB/s, as measured on another machine's x16")
    return Link(gbps)


def _drive(found: _Found, rates: Rates) -> Nvme | None:
    """None where no rate is known: a plan that needs the drive then does not fit, instead of being guessed."""
    if rates.nvme_gbps:
        found.sources.append(f"drive {rates.nvme_gbps:.3g} GB/s of cold reads measured")
        return Nvme(rates.nvme_gbps)
    if not any(key.startswith("nvme") for key in found.given):
        found.assumed.append("no drive to read experts from: its rate was not measured (nvme.gbps in a file)")
    return None


def _lacks(found: _Found, gpus: bool, unused: str) -> str:
    """Every unknown, and what to do."""
    measured = "gpu.memory", "pcie.gbps", "host.dram_gbps", *(() if gpus else ("gpu.hbm_gbps", "gpu.tflops"))
    device = "cuda:0" if gpus else "cpu"
    remedy = f"run `moesim calibrate --device {device} --budget 5m -o my-box` in this folder"
    keys = ", ".join(f"{key}: ..." for key in found.missing)
    file = f"write a machine file with 'from: {THIS}' and {keys}, and name it instead"
    either = f"{remedy}, or {file}" if all(key in measured for key in found.missing) else file
    return f"machine '{THIS}': {', and '.join(found.missing.values())}; {either}{unused}"
