"""Machine: devices, memories and links, as specification sheets and users state them.

Memory is in bytes, rates in decimal GB/s (bytes per ns), tensor rates in dense TFLOPS at bf16.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from moesim.efficiencies import read_table
from moesim.errors import MachineError, nearest
from moesim.prices import NO_PRICES, Prices, shipped_prices
from moesim.units import GIB, format_size

PROVENANCE = "specification-sheet"
THIS = "this"  # the machine moesim runs on
MAX_GPUS = 1024
_SEVERAL = re.compile(r"(\d+)x(?=[a-zA-Z])(.+)")
PLATFORMS = ("desktop", "workstation", "server")  # how far a CPU's expert kernels get with its DRAM


@dataclass(frozen=True)
class Gpu:
    """tflops: dense bf16 (fp16 before Ampere); None where no source states a rate."""

    name: str
    memory_bytes: int
    hbm_gbps: float
    tflops: float
    fp8_tflops: float | None = None
    fp4_tflops: float | None = None
    sm: str = ""
    tdp_w: float | None = None
    idle_w: float | None = None  # drawn while nothing computes; no catalogue row has it
    nvlink_gbps: float | None = None  # one direction


@dataclass(frozen=True)
class Host:
    """dram_gbps is what one socket's memory sustains when measured (mlc, STREAM), not channels x speed; cores are
    one socket's, memory_bytes all sockets'.

    numa_duplicated: every socket holds all experts, which multiplies their memory; pinned: expert copies start from
    page-locked memory; reserve_bytes: what the operating system and other programs keep.
    """

    name: str
    platform: str
    memory_bytes: int
    dram_gbps: float
    cores: int
    sockets: int = 1
    numa_duplicated: bool = False
    pinned: bool = True
    reserve_bytes: int = 4 * GIB


@dataclass(frozen=True)
class Link:
    """One direction's sustained rate; None stands for the term in terms.csv: time per transfer, both directions."""

    gbps: float
    overhead_us: float | None = None
    duplex_gbps: float | None = None


@dataclass(frozen=True)
class Nvme:
    """Cold reads of expert size, several at a time."""

    gbps: float
    overhead_us: float | None = None


@dataclass(frozen=True)
class Machine:
    """`unified`: CPU and GPU share one memory and its bandwidth, there is no PCIe hop and `pcie` is not used.

    hosts: which the GPUs are spread over evenly; network_gbps: what each GPU reaches other hosts with, one direction.
    cpu_only: there is no GPU, the cores stand where it would be.
    assumed: what no source states; efficiencies: terms measured on this machine, which then have no band; profile: name
    or directory of the profile its costs come from, "" for the specification sheet; measured_on: the machine as it was
    when that was measured, where a part has been made faster since; others: whose GPUs stand beside the first, where
    they are not alike (their hosts count for nothing).
    """

    name: str
    gpu: Gpu
    host: Host
    pcie: Link
    nvme: Nvme | None = None
    gpus: int = 1
    hosts: int = 1
    network_gbps: float | None = None
    unified: bool = False
    cpu_only: bool = False
    provenance: str = PROVENANCE
    efficiencies: tuple[tuple[str, float], ...] = ()
    prices: Prices = NO_PRICES
    assumed: str = ""
    source: str = ""
    profile: str = ""
    measured_on: Machine | None = None
    others: tuple[Machine, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain values."""
        return asdict(self)

    @property
    def usd_per_hour(self) -> float | None:
        """Of all its GPUs; None where no price is known."""
        known = [machine.prices.known for machine in self.each]
        return None if None in known else math.fsum(price or 0.0 for price in known)

    @property
    def each(self) -> list[Machine]:
        """A machine for every GPU: this one for those alike, then the others."""
        return [self] * (self.gpus - len(self.others)) + list(self.others)

    @property
    def notes(self) -> list[str]:
        """What a result must say of it: nothing of a machine of the catalogue, all of one that was put together."""
        if self.provenance == PROVENANCE:
            return []
        return [f"{self.name}: {self.source}", *([f"{self.name}, assumed: {self.assumed}"] if self.assumed else [])]

    @property
    def summary(self) -> str:
        """One line: `1 x rtx-4090, 24 GiB at 1008 GB/s; host 128 GiB at 77 GB/s; PCIe 25.5 GB/s`."""
        gpu, host = self.gpu, self.host
        text = f"{self.gpus - len(self.others)} x {gpu.name}, {format_size(gpu.memory_bytes)} at {gpu.hbm_gbps:g} GB/s"
        if self.hosts > 1:
            text += f", in {self.hosts} hosts joined at {self.network_gbps:g} GB/s per GPU"
        for other in self.others:
            text += f" + {other.gpu.name}, {format_size(other.gpu.memory_bytes)} at {other.gpu.hbm_gbps:g} GB/s"
        if self.cpu_only:
            return f"{host.name}, {host.cores * host.sockets} cores without a GPU, {text.partition(', ')[2]}"
        if self.unified:
            return f"{text}, shared with {host.cores} CPU cores"
        host_text = f"host {format_size(host.memory_bytes)} at {host.dram_gbps:g} GB/s, {host.cores} cores"
        return f"{text}; {host_text}; PCIe {self.pcie.gbps:g} GB/s"


def load_machine(spec: str | Path) -> Machine:
    """A machine of the catalogue by name or alias, a YAML or JSON file that changes one, or a profile's machine.

    `8xh200` is the host of that machine with eight of its GPUs, `rtx-4090+rtx-3090` that of the first with one of each,
    `this` the machine moesim runs on (this_machine.py).

    Raises MachineError for an unknown name, an unreadable file, or a value that cannot be.
    """
    text = str(spec)
    if text == THIS:
        from moesim.this_machine import this_machine

        return this_machine()
    if "+" in text and not Path(text).exists():
        return _unlike([load_machine(one) for one in text.split("+")], text)
    if several := _SEVERAL.match(text):
        gpus, one = int(several[1]), load_machine(several[2])
        if not 1 <= gpus <= MAX_GPUS or one.gpus > 1 or one.unified:
            raise MachineError(f"machine '{text}': write 1 to {MAX_GPUS} GPUs of a machine with one and a PCIe link")
        return one if gpus == 1 else replace(one, name=f"{gpus}x{one.name}", gpus=gpus)
    if Path(text).suffix.lower() in (".yaml", ".yml", ".json"):
        from moesim.machine_file import read_machine

        return read_machine(Path(text))
    if (Path(text) / "meta.yaml").is_file():
        from moesim.profile import machine_of

        return machine_of(Path(text))
    if text in _measured_profiles():
        from moesim.profile import SHIPPED, machine_of

        return replace(machine_of(SHIPPED / text), profile=text)
    known = catalogue()
    names = {_key(name): name for name in known}
    for row in read_table("machines"):
        names.update({_key(alias): row["name"] for alias in row["aliases"].split()})
    if _key(text) not in names:
        hint = nearest(text, [*known, *(a for row in read_table("machines") for a in row["aliases"].split())])
        raise MachineError(f"machine '{text}': not in the catalogue{hint} (or write a YAML file)")
    machine = known[names[_key(text)]]
    return replace(machine, profile=_shipped_profiles().get(machine.name, ""))


def _unlike(machines: list[Machine], text: str) -> Machine:
    """The first one's host with all their GPUs; those that are as the first are counted, not listed."""
    ones = [replace(m, gpus=1, name=m.name.removeprefix(f"{m.gpus}x")) for m in machines for _ in range(m.gpus)]
    if any(m.unified or m.others for m in ones) or len(ones) > MAX_GPUS:
        raise MachineError(f"machine '{text}': write up to {MAX_GPUS} GPUs of machines with a PCIe link, joined by +")
    others = tuple(m for m in ones if m != ones[0])
    return replace(ones[0], name="+".join(m.name for m in machines), gpus=len(ones), others=others)


@cache
def _shipped_profiles() -> dict[str, str]:
    """Profiles that come with moesim, by the machine whose costs they are.

    They hold the kernels of serving engines; one of torch's kernels, measured by moesim itself, is asked for by name.
    """
    from moesim.profile import read_profile_meta, shipped

    metas = {name: read_profile_meta(name) for name in shipped()}
    return {str(meta["machine"]): name for name, meta in metas.items() if meta["provenance"] == "imported"}


@cache
def _measured_profiles() -> list[str]:
    from moesim.profile import read_profile_meta, shipped

    return [name for name in shipped() if read_profile_meta(name)["provenance"] == "measured"]


def _key(name: str) -> str:
    """Names are matched without case, blanks and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


@cache
def catalogue() -> dict[str, Machine]:
    """Every known machine by name: one GPU in a host of its class."""
    hosts = {row["name"]: row for row in read_table("hosts")}
    links = {row["name"]: Link(float(row["gbps"])) for row in read_table("links")}
    return {row["name"]: _from_row(row, hosts[row["host"]], links) for row in read_table("machines")}


def _from_row(row: dict[str, str], host: dict[str, str], links: dict[str, Link]) -> Machine:
    gpu = Gpu(
        name=row["name"],
        memory_bytes=int(row["memory_bytes"]),
        hbm_gbps=float(row["hbm_gbps"]),
        tflops=float(row["tflops"]),
        fp8_tflops=_number(row["fp8_tflops"]),
        fp4_tflops=_number(row["fp4_tflops"]),
        sm=row["sm"],
        tdp_w=_number(row["tdp_w"]),
        nvlink_gbps=_number(row["nvlink_gbps"]),
    )
    unified = row["unified"] == "yes"
    memory = gpu.memory_bytes if unified else int(host["memory_gib"]) * GIB
    return Machine(
        name=row["name"],
        gpu=gpu,
        host=Host(
            name=host["name"],
            platform=host["platform"],
            memory_bytes=memory,
            dram_gbps=gpu.hbm_gbps if unified else float(host["dram_gbps"]),
            cores=int(host["cores"]),
            reserve_bytes=int(host["reserve_gib"]) * GIB,
        ),
        pcie=Link(gpu.hbm_gbps) if unified else links[row["link"]],
        nvme=Nvme(float(host["nvme_gbps"])),
        unified=unified,
        prices=shipped_prices().get(row["name"], NO_PRICES),
        assumed=row["assumed"],
        source=row["source"],
    )


def priced(machine: Machine, prices: dict[str, Prices]) -> Machine:
    """`machine` at the price of its name, else of its GPU's, else as it is; unlike GPUs each at its own."""
    machine = replace(machine, others=tuple(priced(other, prices) for other in machine.others))
    return replace(machine, prices=prices.get(machine.name) or prices.get(machine.gpu.name) or machine.prices)


def _number(text: str) -> float | None:
    return float(text) if text else None
