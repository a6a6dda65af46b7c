"""What is run: a system on a shape, with so many slots, sequences and tokens; and one run of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.own import own_split
from moesim.engine.residency import Slots
from moesim.engine.serve import Limits
from moesim.engine.simulate import Setting, calibration_popularity
from moesim.errors import ValidationError, nearest
from moesim.policies import split_by_layer
from moesim.prediction import Beliefs
from moesim.systems import System, load_system, with_settings
from moesim.trace import Trace
from moesim.units import KIB, format_size
from moesim.workload import Request, Workload, unroll
from validate.live.measured import MeasuredTable
from validate.live.runtime import Cores, Costs, Log, Runtime
from validate.live.weights import HIGH_BITS, LOW_BITS, Backend, Shape, Stage

NO_LIMIT = 1 << 60
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Case:
    """`batch` sequences at a time of `prompt` prompt and `steps` generated tokens, `waves` times; slots per layer.

    group: cases whose times may be compared with one another; the first is what the others are held against.
    """

    group: str
    name: str
    shape: str
    policy: str
    slots: int
    batch: int = 1
    prompt: int = 0
    steps: int = 12
    waves: int = 2
    settings: tuple[str, ...] = ()

    def system(self) -> System:
        return with_settings(load_system(self.policy), self.settings)


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case with everything that is computed before time exists."""

    case: Case
    system: System
    shape: Shape
    trace: Trace
    workload: Workload
    beliefs: tuple[Beliefs, ...]
    popularity: NDArray[np.float64]
    slots: Slots

    @property
    def exact(self) -> bool:
        """Whether decisions are the same however long anything takes: nothing comes before it is asked for."""
        return not self.beliefs

    @property
    def expert_bytes(self) -> int:
        return self.case.slots * self.shape.layers * self.shape.nbytes()

    def buffers(self, bits: int) -> int:
        """Slots of one precision it needs."""
        if bits == LOW_BITS:
            return sum(self.slots.low) // self.shape.nbytes(LOW_BITS)
        return sum(self.slots.per_layer) // self.shape.nbytes() + self.slots.scratch

    def setting(self, table: MeasuredTable, seed: int = 0) -> Setting:
        """The same run, for the simulator."""
        limits = Limits(NO_LIMIT, self.case.batch, 1 << 20, 0, NO_LIMIT)
        costs: Any = table
        return Setting(self.trace, costs, self.workload, limits, self.expert_bytes, 0, 0, seed)


def prepare(case: Case, shape: Shape, trace: Trace, seed: int = 0) -> Prepared:
    """Choose requests that are long enough, and let the system predict."""
    system = case.system()
    served, workload = unroll(trace, _workload(case, trace))
    beliefs = tuple(system.predictor.predict(served, seed))
    return Prepared(
        case, system, shape, served, workload, beliefs, calibration_popularity(served), _slots(case, system, shape)
    )


def _workload(case: Case, trace: Trace) -> Workload:
    wanted = case.batch * case.waves
    lengths = np.diff(trace.first_row)
    prompts = trace.decode_start - trace.first_row[:-1]
    long_enough = np.flatnonzero((prompts >= case.prompt) & (lengths - prompts >= case.steps))
    if not len(long_enough):
        raise ValidationError(
            f"no request of the trace has {case.prompt} prompt and {case.steps} generated tokens, which "
            f"'{case.group}: {case.name}' needs; give a longer --trace"
        )
    requests: list[Request] = []
    for i in np.resize(long_enough, wanted).tolist():
        start, split = int(trace.first_row[i]), int(trace.decode_start[i])
        prefill, decode = np.arange(start, start + case.prompt), np.arange(split, split + case.steps)
        requests.append(Request(f"{len(requests)}", "", 0, case.prompt, prefill, decode))
    return Workload(tuple(requests), "all at time 0")


def _slots(case: Case, system: System, shape: Shape) -> Slots:
    """The memory of the case as the system divides it."""
    high, low = [shape.nbytes()] * shape.layers, [shape.nbytes(LOW_BITS)] * shape.layers
    total = case.slots * sum(high) if system.cache else 0
    kept_low: tuple[int, ...] = ()
    if system.misses.rule == "precision":
        kept_low = split_by_layer(int(total * system.misses.low_share), low)
        total -= sum(kept_low)
    split = own_split(system.capacity, total, high, shape.experts)
    return Slots(split, system.scratch_slots(shape.top_k, shape.experts), kept_low)


def play(prepared: Prepared, stage: Stage, costs: Costs, where: Cores, pace_gbps: float, seed: int = 0) -> Log:
    """One run for real, in the order of service of docs/design.md: wave after wave, step after step."""
    p = prepared
    runtime = Runtime(p.trace, stage, p.system, p.slots, p.popularity, p.beliefs, costs, where, pace_gbps, seed)
    try:
        if p.system.placement.start != "empty":
            runtime.place(_by_popularity(p.popularity))
        requests = p.workload.requests
        for first in range(0, len(requests), p.case.batch):
            with runtime.lock:
                runtime.memory.new_sequence()
            for rows, following in _steps(requests[first : first + p.case.batch]):
                runtime.step(rows, following)
    finally:
        runtime.close()
    return runtime.log


def _by_popularity(popularity: NDArray[np.float64]) -> Iterator[tuple[int, int]]:
    """Most popular first, layer by layer in turn."""
    order = np.argsort(-popularity, axis=1, kind="stable")
    layers, experts = order.shape
    for rank in range(experts):
        for layer in range(layers):
            yield layer, int(order[layer, rank])


def _steps(requests: tuple[Request, ...]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(rows, rows of the step after) of requests of the same lengths: all prompts at once, then a token of each."""
    tokens = list(np.stack([r.decode for r in requests], axis=1))
    if len(requests[0].prefill):
        tokens.insert(0, np.concatenate([r.prefill for r in requests]))
    yield from zip(tokens, [*tokens[1:], np.empty(0, dtype=np.int64)], strict=True)


def cases(quick: bool = False) -> list[Case]:
    """The cases of a run; quick: a handful on one shape, for tests."""
    if quick:
        return [
            Case("decode", "LRU, a quarter", "small", "LRU", 4, steps=3),
            Case("decode", "LRU, half", "small", "LRU", 8, steps=3),
            Case("decode", "static, half", "small", "static", 8, steps=3),
            Case("decode", "on the host", "small", "LRU", 8, steps=3, settings=("misses.rule=host",)),
            Case("decode", "prefetch, good", "small", "LRU", 8, steps=3, settings=("predictor=oracle(recall=0.9)",)),
        ]
    one, many, prompts, big, sparse = "batch 1", "batch 32", "prefill", "big experts", "2:4 experts"
    good, bad = ("predictor=oracle(recall=0.9)",), ("predictor=oracle(recall=0.3)",)
    hobbit = ("misses.low_bits=16",)
    return [
        Case(one, "LRU, a quarter", "small", "LRU", 4),
        Case(one, "LRU, starved", "small", "LRU", 1),
        Case(one, "LRU, half", "small", "LRU", 8),
        Case(one, "LRU, three quarters", "small", "LRU", 12),
        Case(one, "all resident", "small", "static", 16),
        Case(one, "LFU, global", "small", "LFU(scope='global')", 4),
        Case(one, "no cache", "small", "on-demand", 4),
        Case(one, "static", "small", "static", 4),
        Case(one, "eMoE before its first plan", "small", "eMoE", 4, settings=("scheduling=fcfs",)),
        Case(one, "HOBBIT, 16-bit low copies, no prefetch", "small", "HOBBIT(ahead=0)", 4, settings=hobbit),
        Case(one, "HOBBIT, 16-bit low copies", "small", "HOBBIT", 4, settings=hobbit),
        Case(one, "AdapMoE", "small", "AdapMoE", 4),
        Case(one, "fMoE", "small", "fMoE", 4),
        Case(one, "LRU, prefetch of recall 0.9", "small", "LRU", 4, settings=good),
        Case(one, "LRU, prefetch of recall 0.3", "small", "LRU", 4, settings=bad),
        Case(one, "LRU, misses on the host", "small", "LRU", 4, settings=("misses.rule=host",)),
        Case(one, "LRU, cheaper of both", "small", "LRU", 4, settings=("misses.rule=cheaper",)),
        Case(one, "Fiddler", "small", "Fiddler", 4),
        Case(many, "LRU, half", "small", "LRU", 8, 32, steps=3, waves=1),
        Case(many, "LRU, a quarter", "small", "LRU", 4, 32, steps=3, waves=1),
        Case(many, "static", "small", "static", 8, 32, steps=3, waves=1),
        Case(many, "all resident", "small", "static", 16, 32, steps=3, waves=1),
        Case(many, "LRU, prefetch of recall 0.9", "small", "LRU", 8, 32, steps=3, waves=1, settings=good),
        Case(many, "LRU, misses on the host", "small", "LRU", 8, 32, steps=3, waves=1, settings=("misses.rule=host",)),
        Case(prompts, "LRU, half", "small", "LRU", 8, 1, 64, 1, 2),
        Case(prompts, "LRU, a quarter", "small", "LRU", 4, 1, 64, 1, 2),
        Case(prompts, "static", "small", "static", 8, 1, 64, 1, 2),
        Case(big, "LRU, a quarter", "big", "LRU", 4, steps=6),
        Case(big, "LRU, half", "big", "LRU", 8, steps=6),
        Case(big, "static", "big", "static", 8, steps=6),
        Case(big, "LRU, prefetch of recall 0.9", "big", "LRU", 8, steps=6, settings=good),
        Case(sparse, "LRU, half", "2:4", "LRU", 8, steps=6),
        Case(sparse, "static", "2:4", "static", 8, steps=6),
        Case(sparse, "all resident", "2:4", "static", 16, steps=6),
        Case(sparse, "LRU, half, batch 32", "2:4", "LRU", 8, 32, steps=3, waves=1),
    ]


def chosen(quick: bool, only: str | None, device: str = "cuda") -> list[Case]:
    """Those of the groups named in `only`, separated by commas; all that the device can run where it is None."""
    known = cases(quick)
    if only is None:
        return [case for case in known if case.shape != "2:4" or device != "cpu"]
    groups = list(dict.fromkeys(case.group for case in known))
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in groups:
            raise ValidationError(f"--only: unknown group '{name}'{nearest(name, groups)}")
    if device == "cpu" and "2:4 experts" in wanted:
        raise ValidationError("--only: '2:4 experts' needs Sparse Tensor Cores; add --device cuda or leave them out")
    return [case for case in known if case.group in wanted]


def shapes(trace: Trace, quick: bool) -> dict[str, Shape]:
    """Experts of 6 and 18 MiB (96 KiB where quick) for the layers and experts of the trace."""
    sizes = {"small": (64, 128)} if quick else {"small": (512, 1024), "big": (768, 2048), "2:4": (1024, 2048)}
    return {
        name: Shape(name, trace.layers, trace.info.experts, trace.top_k, hidden, ffn, name == "2:4")
        for name, (hidden, ffn) in sizes.items()
    }


def slots_for(shape: Shape, prepared: list[Prepared]) -> dict[int, int]:
    """Slots by precision for the largest of the shape's cases."""
    mine = [p for p in prepared if p.shape == shape]
    return {bits: max(p.buffers(bits) for p in mine) for bits in (HIGH_BITS, LOW_BITS)}


def check_memory(by_shape: dict[str, Shape], prepared: list[Prepared], on_disk: bool) -> None:
    """Weights and slots must fit what memory is free, or the machine would swap."""
    needed = 0
    for shape in by_shape.values():
        for bits, count in slots_for(shape, prepared).items():
            copies = shape.experts * (1 if on_disk else shape.layers) if count else 0
            needed += (copies + count) * shape.nbytes(bits)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _MEMINFO.exists():  # counts what the page cache would give back
        free = int(_MEMINFO.read_text().split("MemAvailable:")[1].split()[0]) * KIB
    if needed > 0.9 * free:
        raise ValidationError(
            f"{format_size(needed)} of weights and slots do not fit the {format_size(free)} of memory that are free; "
            "give a --trace of fewer layers or experts, or --disk"
        )


def stage_for(shape: Shape, prepared: list[Prepared], backend: Backend, on_disk: bool) -> Stage:
    """Slots and rows for the largest of its cases."""
    mine, slots = [p for p in prepared if p.shape == shape], slots_for(shape, prepared)
    rows = max(p.case.batch * max(p.case.prompt, 1) for p in mine)
    return Stage(shape, backend, slots[HIGH_BITS], slots[LOW_BITS], rows, on_disk)
