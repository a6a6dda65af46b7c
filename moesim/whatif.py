"""What would help most: every resource made a little better, or replaced by the next real thing, and run again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moesim.efficiencies import RESOURCES, read_table
from moesim.errors import PolicyError, WorkloadError, nearest
from moesim.machine import Machine, catalogue, load_machine, priced
from moesim.model_error import band
from moesim.output import progress
from moesim.policies.eviction import Eviction
from moesim.policies.own import is_own
from moesim.prediction import Oracle
from moesim.prices import Prices
from moesim.question import Question, on_sample, predict
from moesim.systems import System
from moesim.trace import Trace
from moesim.units import GIB

# Metric: whether more of it is better.
METRICS = {"output_throughput": True, "mean_tpot_ms": False, "mean_ttft_ms": False, "mean_e2el_ms": False}
NOTHING = 5e-4  # a gain that a tenth of a percent would not show
EVICTIONS = {"LRU": "lru", "LFU": "lfu", "FIFO": "fifo", "Belady, which looks ahead": "belady"}


@dataclass(frozen=True)
class Change:
    """One thing made better. kind: `scaled`, `upgrade` (something one can buy) or `policy`; cause: its share of the
    critical path, by the names of `metrics.CAUSES`, "" where none stands for it alone."""

    resource: str
    what: str
    kind: str
    question: Question
    system: System
    cause: str = ""


def whatif(
    trace: Trace, system: System, question: Question, by: float = 0.1, metric: str = "output_throughput",
    shown: bool = True, prices: dict[str, Prices] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`base` and `changes`, those that gain most first, on the leading requests that anchors are measured on too.

    Every change is simulated anew with everything drawn alike, in the middle of the costs and with each resource's at
    both ends of its band, the same for base and change, so that what they share drops out. A gain is relative: 0.05 is
    5 % more tok/s, or 5 % more speed where the metric is a time. `significant`: from P10 to P90 it is a gain, or a
    loss. prices: in place of those that come with moesim. Raises WorkloadError and PolicyError where the question
    makes no sense.
    """
    if metric not in METRICS:
        raise WorkloadError(f"--metric '{metric}': unknown{nearest(metric, METRICS)}")
    if not 0 < by <= 10:
        raise WorkloadError(f"--by {100 * by:g} must be above 0 and at most 1000 %")
    if is_own(system.predictor):
        raise PolicyError(f"whatif runs a system many times, but {system.own_names} may remember; name a built-in one")
    machine = question.machine if isinstance(question.machine, Machine) else load_machine(question.machine)
    machine = priced(machine, prices or {})
    asked = replace(question, machine=replace(machine, measured_on=machine) if machine.profile else machine)
    beliefs = predict(trace, system, question)
    changes = [*_scaled(asked, system, by), *_upgrades(asked, system, prices or {}), *_policies(asked, system, beliefs)]
    runs = 1 + 2 * len(RESOURCES) + (2 if machine.profile else 0)
    with progress("what-ifs", runs * (1 + len(changes)), shown) as advance:
        base = _values(trace, Change("base", "", "", asked, system), metric, beliefs, advance)
        if base["value"] is None:
            if base["requests"]:
                raise WorkloadError(f"--metric {metric}: no request has more than one output token; choose another")
            return {"metric": metric, "base": base, "changes": [], "notes": []}
        rows = []
        for change in changes:
            own = beliefs if change.system.predictor == system.predictor else predict(trace, change.system, question)
            rows.append(_row(change, base, _values(trace, change, metric, own, advance), metric))
    rows.sort(key=lambda row: -(row["gain"] if row["gain"] is not None else -math.inf))
    return {
        "metric": metric,
        "system": system.name,
        "machine": machine.to_dict(),
        "usd_per_hour": machine.usd_per_hour,
        "base": base,
        "changes": rows,
        "notes": _notes(trace, machine, question, system),
    }


def _values(trace: Trace, change: Change, metric: str, beliefs: Any, advance: Any) -> dict[str, Any]:
    """The metric and where the critical path goes in the middle of the costs, and the metric at the ends of each
    resource's."""
    found = on_sample(trace, change.system, change.question, beliefs, advance)
    middle = found[0] if found else {}
    return {
        "value": middle.get(metric),
        "ends": [numbers.get(metric) for numbers in found[1:]],
        "requests": middle.get("requests"),
        "critical_path": middle.get("critical_path"),
    }


def _row(change: Change, base: dict[str, Any], values: dict[str, Any], metric: str) -> dict[str, Any]:
    row: dict[str, Any] = {"resource": change.resource, "what": change.what, "kind": change.kind}
    row |= {"value": values["value"], "critical_share": base["critical_path"].get(change.cause)}
    row |= {"gain": None, "gain_p10_p90": None, "significant": False}
    if values["value"]:
        sign = 1 if METRICS[metric] else -1
        pairs = zip([values["value"], *values["ends"]], [base["value"], *base["ends"]], strict=True)
        gain, *ends = [(changed / before) ** sign - 1 for changed, before in pairs]
        low, high = _gain_band(gain, ends)
        row |= {"gain": gain, "gain_p10_p90": [low, high]}
        row["significant"] = low > NOTHING or high < -NOTHING
    row["usd_per_hour"] = _machine(change.question).usd_per_hour if change.kind == "upgrade" else None
    return row


def _gain_band(gain: float, ends: list[float]) -> tuple[float, float]:
    """P10 and P90: as any prediction's where no end turns a gain into a loss, else the ends' differences as squares."""
    sign = math.copysign(1.0, gain)
    if all(end * sign > 0 for end in ends):
        low, high = sorted(sign * end for end in band(abs(gain), [abs(end) for end in ends]))
        return low, high
    down, up = (math.sqrt(sum((end - gain) ** 2 for end in ends if (end - gain) * side > 0)) for side in (-1, 1))
    return gain - down, gain + up


# -- what may be changed ------------------------------------------------------------------------------------------


def _scaled(question: Question, system: System, by: float) -> Iterator[Change]:
    """Every rate and size times 1 + by; one of which there are whole numbers rounded up."""
    m, more = _machine(question), 1 + by
    text = f"+{100 * by:g} %"

    def changed(resource: str, machine: Machine, cause: str = "", what: str = text) -> Change:
        return Change(resource, what, "scaled", replace(question, machine=machine), system, cause)

    if m.unified:  # one memory: its host follows the GPU
        both = replace(m, gpu=replace(m.gpu, hbm_gbps=m.gpu.hbm_gbps * more))
        yield changed("memory bandwidth", replace(both, host=replace(m.host, dram_gbps=m.host.dram_gbps * more)))
    else:
        duplex = m.pcie.duplex_gbps and m.pcie.duplex_gbps * more
        yield changed("PCIe", replace(m, pcie=replace(m.pcie, gbps=m.pcie.gbps * more, duplex_gbps=duplex)), "pcie")
        yield changed("HBM", replace(m, gpu=replace(m.gpu, hbm_gbps=m.gpu.hbm_gbps * more)))
        yield changed("host DRAM", replace(m, host=replace(m.host, dram_gbps=m.host.dram_gbps * more)))
    cores = math.ceil(m.host.cores * more - 1e-9)
    yield changed("CPU cores", replace(m, host=replace(m.host, cores=cores)), "host", f"{m.host.cores} to {cores}")
    if m.nvme:
        yield changed("NVMe", replace(m, nvme=replace(m.nvme, gbps=m.nvme.gbps * more)), "nvme")
    rates = {n: v * more for n in ("tflops", "fp8_tflops", "fp4_tflops") if (v := getattr(m.gpu, n))}
    yield changed("GPU FLOPs", replace(m, gpu=replace(m.gpu, **rates)))
    yield _more_memory(question, system, more, text)
    if not m.unified:
        memory = round(m.host.memory_bytes * more)
        yield changed("host memory", replace(m, host=replace(m.host, memory_bytes=memory)), "nvme")


def _more_memory(question: Question, system: System, more: float, text: str) -> Change:
    """GPU memory, or what was set aside of it for experts where the question says how much."""
    if question.slots_per_layer:
        slots = math.ceil(question.slots_per_layer * more - 1e-9)
        what = f"{question.slots_per_layer} to {slots} slots per layer"
        return Change("GPU memory", what, "scaled", replace(question, slots_per_layer=slots), system)
    if question.expert_memory:
        asked = replace(question, expert_memory=round(question.expert_memory * more))
        return Change("GPU memory", f"{text} for experts", "scaled", asked, system)
    m = _machine(question)
    memory = round(m.gpu.memory_bytes * more)
    host = replace(m.host, memory_bytes=memory) if m.unified else m.host
    asked = replace(question, machine=replace(m, gpu=replace(m.gpu, memory_bytes=memory), host=host))
    return Change("GPU memory", text, "scaled", asked, system)


def _upgrades(question: Question, system: System, prices: dict[str, Prices]) -> Iterator[Change]:
    """The next link, a second drive, twice the host memory, the next host and the next GPU of the catalogue."""
    m = _machine(question)

    def changed(resource: str, what: str, machine: Machine, cause: str = "") -> Change:
        return Change(resource, what, "upgrade", replace(question, machine=machine), system, cause)

    if m.nvme:
        two = replace(m.nvme, gbps=2 * m.nvme.gbps)
        yield changed("NVMe", f"two drives: {two.gbps:g} GB/s", replace(m, nvme=two), "nvme")
    if not m.unified:
        links = [(float(row["gbps"]), row["name"]) for row in read_table("links") if row["name"].startswith("pcie")]
        better = min(((rate, name) for rate, name in links if rate > 1.05 * m.pcie.gbps), default=None)
        if better:
            link = replace(m.pcie, gbps=better[0], duplex_gbps=None)
            yield changed("PCIe", f"{better[1]}: {better[0]:g} GB/s", replace(m, pcie=link), "pcie")
        size = 2 * m.host.memory_bytes
        what = f"twice: {size / GIB:.0f} GiB"
        yield changed("host memory", what, replace(m, host=replace(m.host, memory_bytes=size)), "nvme")
        yield from _next_host(question, system)
    yield from _next_gpu(question, system, prices)


def _next_host(question: Question, system: System) -> Iterator[Change]:
    """The slowest host of the catalogue whose memory is faster than this one's."""
    m = _machine(question)
    hosts = [other.host for other in catalogue().values() if not other.unified and other.host.name != "grace"]
    faster = [host for host in hosts if host.dram_gbps > m.host.dram_gbps and host.memory_bytes >= m.host.memory_bytes]
    if faster:
        host = min(faster, key=lambda host: host.dram_gbps)
        what = f"{host.name}: {host.dram_gbps:g} GB/s, {host.cores} cores"
        yield Change("host", what, "upgrade", replace(question, machine=replace(m, host=host)), system)


def _next_gpu(question: Question, system: System, prices: dict[str, Prices]) -> Iterator[Change]:
    """The GPU of the catalogue that is better in memory or its bandwidth and worse in nothing, by the least step.

    It keeps this machine's host and link.
    """
    m = _machine(question)
    if m.unified:
        return

    def worth(machine: Machine) -> tuple[float, float, float]:
        return machine.gpu.memory_bytes, machine.gpu.hbm_gbps, machine.gpu.tflops

    own = worth(m)
    better = [
        other for other in catalogue().values()
        if not other.unified and all(a >= b for a, b in zip(worth(other), own, strict=True)) and worth(other) > own
    ]  # fmt: skip
    if better:
        other = min(better, key=lambda x: math.prod(a / b for a, b in zip(worth(x), own, strict=True)))
        machine = replace(m, gpu=other.gpu, prices=priced(other, prices).prices)
        what = f"{other.name}: {other.gpu.memory_bytes / GIB:.0f} GiB at {other.gpu.hbm_gbps:g} GB/s"
        yield Change("GPU", what, "upgrade", replace(question, machine=machine), system)


def _policies(question: Question, system: System, beliefs: Any) -> Iterator[Change]:
    """A predictor that is never wrong, as early as the system's own, and other rules of eviction."""
    if beliefs and system.predictor.provenance != "none":
        first = beliefs[0].distance
        ahead = f"{first} layer{'s'[: first > 1]} ahead" if first else "all layers when a step starts"
        oracle = Oracle(distance=beliefs[0].distance, wraps=beliefs[0].wraps)
        if oracle != system.predictor:
            certain = replace(system, predictor=oracle)
            yield Change("predictor recall", f"never wrong, {ahead}", "policy", question, certain)
    if not (system.cache and system.misses.keep and system.eviction.own is None) or system.all_resident:
        return
    for name, feature in EVICTIONS.items():
        eviction = Eviction(score=((feature, 1.0),), scope=system.eviction.scope)
        if eviction.score != system.eviction.score:
            yield Change("eviction", name, "policy", question, replace(system, eviction=eviction))


def _machine(question: Question) -> Machine:
    assert isinstance(question.machine, Machine)
    return question.machine


def _notes(trace: Trace, machine: Machine, question: Question, system: System) -> list[str]:
    notes = [*machine.notes, *system.notes]
    if trace.info.provenance != "real":
        notes.append("synthetic routing: the trace was drawn, not recorded")
    if machine.profile:
        notes.append(
            f"measured curves ({machine.profile}): their bytes and operations were made faster as the part was, their "
            "fixed costs were not"
        )
    if question.request_rate is None:
        return notes
    return [*notes, "requests arrive at a given rate: where the machine keeps up, no change can add tok/s"]


def format_whatif(result: dict[str, Any]) -> str:
    """A tornado in text: what gains most first, with P10 to P90."""
    base, metric = result["base"], result["metric"]
    if base["value"] is None:
        return "the base does not run: memory is too small; 'moesim replay' says what lacks"
    paths = sorted(base["critical_path"].items(), key=lambda item: -item[1])
    price = f", ${result['usd_per_hour']:.2f}/h" if result["usd_per_hour"] else ""
    lines = [
        f"{result['system']} on {result['machine']['name']}{price}: {metric} {base['value']:.4g} "
        f"on the first {base['requests']} requests",
        "critical path " + ", ".join(f"{name} {share:.0%}" for name, share in paths if share >= 0.005),
        "",
    ]
    wide = max(len(f"{row['resource']}: {row['what']}") for row in result["changes"])
    top = max((abs(row["gain"]) for row in result["changes"] if row["gain"] is not None), default=0) or 1
    lines.append(f"{'change':{wide}} {metric:>18}   gain          P10 to P90")
    lines += [_line(row, wide, top) for row in result["changes"]]
    lines += ["", "(=) no difference that holds from P10 to P90"] if _unsure(result) else []
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def _unsure(result: dict[str, Any]) -> bool:
    return any(row["gain"] is not None and not row["significant"] for row in result["changes"])


def _line(row: dict[str, Any], wide: int, top: float) -> str:
    name = f"{row['resource']}: {row['what']}"
    if row["gain"] is None:
        return f"{name:{wide}} {'does not run':>18}"
    low, high = row["gain_p10_p90"]
    bar = ("-" if row["gain"] < 0 else "#") * round(20 * abs(row["gain"]) / top)
    mark = "" if row["significant"] else "(=)"
    price = f"  ${row['usd_per_hour']:.2f}/h" if row["usd_per_hour"] and row["resource"] == "GPU" else ""
    over = f"{low:+.1%} to {high:+.1%}"
    return f"{name:{wide}} {row['value']:18.4g} {row['gain']:+7.1%}  {over:>20} {mark:3} {bar}{price}".rstrip()
