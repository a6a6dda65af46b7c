"""How much of a machine's nominal rates real engines reach: every term with its default, band and source."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources

from moesim.errors import MachineError, nearest

SCALES = ("low", "default", "high")  # ends of speed: `low` holds the pessimistic value of every term


@dataclass(frozen=True)
class Efficiencies:
    """One value per term. Shares are of a nominal or measured rate, `_us` fields are microseconds."""

    hbm: float
    hbm_grouped: float
    hbm_attention: float
    mfu: float
    mfu_grouped: float
    mfu_attention: float
    kernel_us: float
    grouped_us: float
    attention_us: float
    layer_us: float
    eager_us: float
    launch_us: float
    route_us: float
    step_us: float
    step_native_us: float
    sample_us: float
    handoff_us: float
    dram_desktop: float
    dram_workstation: float
    dram_server: float
    core_gweights: float
    core_plain: float
    core_gflops: float
    core_server: float
    numa_duplicated: float
    numa_split: float
    numa_cores: float
    link: float
    copy_us: float
    duplex: float
    pageable: float
    nvme: float
    nvme_us: float
    exchange: float
    exchange_host: float
    exchange_us: float
    network: float
    network_us: float


RESOURCES = {  # whose terms err together
    "gpu": (
        "hbm", "hbm_grouped", "hbm_attention", "mfu", "mfu_grouped", "mfu_attention", "kernel_us", "grouped_us",
        "attention_us", "layer_us",
    ),
    "engine": ("eager_us", "launch_us", "route_us", "step_us", "step_native_us", "sample_us", "handoff_us"),
    "host": (
        "dram_desktop", "dram_workstation", "dram_server", "core_gweights", "core_plain", "core_gflops",
        "core_server", "numa_duplicated", "numa_split", "numa_cores",
    ),
    "links": (
        "link", "copy_us", "duplex", "pageable", "nvme", "nvme_us", "exchange", "exchange_host", "exchange_us",
        "network", "network_us",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Term:
    """A row of data/terms.csv. `low` is the slow end, `high` the fast one, whatever the sign of the effect."""

    name: str
    unit: str
    default: float
    low: float
    high: float
    meaning: str
    source: str


@cache
def terms() -> dict[str, Term]:
    """Every term by name, in the order of `Efficiencies`."""
    return {row["name"]: _term(row) for row in read_table("terms")}


def _term(row: dict[str, str]) -> Term:
    low, default, high = (float(row[scale]) for scale in SCALES)
    return Term(row["name"], row["unit"], default, low, high, row["meaning"], row["source"])


def efficiencies(scale: str = "default", given: Iterable[tuple[str, float]] = ()) -> Efficiencies:
    """The terms at one end of their bands or in the middle; a term `given` for a machine has no band.

    Raises MachineError for an unknown term or a value that cannot be.
    """
    if scale not in SCALES:
        raise MachineError(f"scale '{scale}': unknown{nearest(scale, SCALES)}")
    values = {name: float(getattr(term, scale)) for name, term in terms().items()}
    for name, value in given:
        values[name] = check_term(name, value)
    return Efficiencies(**values)


def check_term(name: str, value: float) -> float:
    """`value` as a number this term may have, or MachineError."""
    known = [f.name for f in fields(Efficiencies)]
    if name not in known:
        raise MachineError(f"efficiencies.{name}: unknown term{nearest(name, known)}")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and terms()[name].unit != "us"):
        raise MachineError(f"efficiencies.{name}: {value!r} is not a positive number")
    if terms()[name].unit == "share" and value > 1.1:
        raise MachineError(f"efficiencies.{name}: {value} is a share of a rate; write 0.8 for 80 %")
    if name == "duplex" and not 1 <= value <= 2:
        raise MachineError(
            f"efficiencies.duplex: {value} must be from 1 (half duplex) to 2 (both directions at full rate)"
        )
    return float(value)


def read_table(name: str) -> list[dict[str, str]]:
    """The rows of a CSV file shipped with the package."""
    text = resources.files("moesim").joinpath("data", f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
