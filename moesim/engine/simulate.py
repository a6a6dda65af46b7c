"""One run: a workload served by a system on a machine. The only place where the parts meet a clock."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.batch import Batch, Standstill
from moesim.engine.clock import Clock
from moesim.engine.cluster import Cluster
from moesim.engine.events import Device, Knowledge
from moesim.engine.host_tier import HostTier
from moesim.engine.own import OwnScheduling, own_predict, own_split, own_start
from moesim.engine.residency import NEVER, Counts, Slots
from moesim.engine.serve import Limits, Server
from moesim.errors import MemoryBudgetError, PolicyError, nearest
from moesim.policies import FCFS, GreedySLO, Scheduling, split_by_layer
from moesim.policies.own import is_own
from moesim.prediction import Beliefs, History
from moesim.records import Records
from moesim.systems.system import System
from moesim.trace import Trace
from moesim.transforms import calibration_rows
from moesim.workload import Request, Workload

if TYPE_CHECKING:
    from moesim.costs.table import CostTable
    from moesim.engine.compiled.device import CompiledDevice

    AnyDevice = Device | CompiledDevice


@dataclass(frozen=True)
class Setting:
    """What stays the same when systems are compared.

    expert_bytes: device memory for experts. shared_bytes > 0: that memory and the KV cache's are one, of this size.
    host_bytes: host memory for experts; 0 where all of them fit.
    """

    trace: Trace
    table: CostTable
    workload: Workload
    limits: Limits
    expert_bytes: int
    shared_bytes: int
    host_bytes: int
    seed: int
    gpus: int = 1
    others: tuple[CostTable, ...] = ()  # of GPUs unlike the first


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run, before anyone makes numbers of it."""

    records: Records
    counts: Counts
    elapsed_ns: int
    idle_ns: int
    busy_ns: dict[str, int]
    link_bytes: dict[str, int]
    peak_resident_bytes: int
    engine: str = "events"
    devices: dict[str, Any] | None = None  # how several GPUs shared the work, and how evenly
    pools: tuple[Outcome, ...] = ()  # of prompts and of outputs, where each has GPUs of its own


def simulate(
    setting: Setting,
    system: System,
    detail: bool = False,
    beliefs: tuple[Beliefs, ...] | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
    engine: str = "auto",
) -> Outcome:
    """Serve the workload to its end. The same arguments give the same outcome, bit for bit, whichever the engine.

    engine: `auto` is compiled wherever every choice is declarative; PolicyError where `compiled` cannot be.
    """
    if setting.gpus > 1:
        return _simulate_cluster(setting, system, detail, on_tokens)
    system = system.fresh()
    engine, _ = choose_engine(engine, system)
    env = Clock()
    records = Records(detail)
    trace, table, limits = setting.trace, setting.table, setting.limits
    popularity = calibration_popularity(trace)
    if beliefs is None:
        beliefs = own_predict(system.predictor, trace, setting.seed)
    next_use = next_uses(setting) if system.eviction.looks_ahead else None
    expert_bytes = [table.expert_bytes(layer) for layer in range(trace.layers)]
    total = sum(expert_bytes) * trace.info.experts if system.all_resident else setting.expert_bytes
    slots = _slots(total if system.cache else 0, expert_bytes, system, table, trace)
    tier = None
    if setting.host_bytes:
        tier = HostTier(setting.host_bytes, trace.layers, trace.info.experts, expert_bytes)
    slots_of = None
    if setting.shared_bytes and system.cache and not system.all_resident:
        slots_of = _SlotsBeside(setting, system, expert_bytes)
    knowledge = Knowledge(popularity, beliefs, next_use)
    device = _device(engine, env, setting, system, slots, knowledge, records, tier, slots_of)
    _place(device, system, popularity, trace)
    planner = _Planner(setting, system, device)
    server = Server(
        env, device, table.model, setting.workload, _scheduling(system, table), limits, records, planner.admitted,
        on_tokens,
    )  # fmt: skip
    with _no_garbage_collection():
        done = env.process(server.run())
        try:
            env.run(done)
        except (RuntimeError, Standstill) as error:
            if isinstance(error, RuntimeError) and done.triggered:
                raise
            now = error.now if isinstance(error, Standstill) else env.now
            raise PolicyError(f"{system.name}: nothing can go on at {now} ns; {device.waiting()}") from error
    device.finish()
    spent = device.counts.spent
    busy = {"gpu": spent["mixer"] + spent["experts"] + spent["step"]}
    return Outcome(
        records=records,
        counts=device.counts,
        elapsed_ns=int(env.now),
        idle_ns=server.idle_ns,
        busy_ns=busy | {name: busy_ns for name, (busy_ns, _) in device.links.items()},
        link_bytes={name: nbytes for name, (_, nbytes) in device.links.items()},
        peak_resident_bytes=device.peak_resident_bytes,
        engine=engine,
    )


def _simulate_cluster(setting: Setting, system: System, detail: bool, on_tokens: Callable[[int], None]) -> Outcome:
    """Several GPUs with every expert resident: between exchanges nothing can happen, so a pass is one event."""
    system = system.fresh()
    env, records, trace = Clock(), Records(detail), setting.trace
    popularity = calibration_popularity(trace)
    cluster = Cluster(env, trace, setting.table, system, setting.gpus, popularity, records, setting.others)
    scheduling = _scheduling(system, setting.table)
    server = Server(
        env, cluster, cluster.model, setting.workload, scheduling, setting.limits, records, on_tokens=on_tokens
    )
    with _no_garbage_collection():
        env.run(env.process(server.run()))
    spent = cluster.counts.spent
    gpu = spent["mixer"] + spent["experts"] + spent["step"]
    return Outcome(
        records=records,
        counts=cluster.counts,
        elapsed_ns=int(env.now),
        idle_ns=server.idle_ns,
        busy_ns={"gpu": gpu, "exchange": spent["exchange"]},
        link_bytes={"h2d": 0, "d2h": 0, "nvme": 0},
        peak_resident_bytes=setting.expert_bytes,
        engine="cluster",
        devices=cluster.summary(),
    )


def _scheduling(system: System, table: CostTable) -> Scheduling:
    scheduling = system.scheduling
    if isinstance(scheduling, GreedySLO):
        scheduling = replace(scheduling, token_ns=sum(table.layers_ns([], [1])) + table.step_ns(1, 1))
    return OwnScheduling(scheduling) if is_own(scheduling) else scheduling


ENGINES = ("auto", "events", "compiled")


def choose_engine(engine: str, system: System) -> tuple[str, str]:
    """(events or compiled, why). Raises PolicyError for an unknown one and for one that cannot run the system."""
    if engine not in ENGINES:
        raise PolicyError(f"--engine '{engine}' must be one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    own = [part for part in ("eviction", "misses", "prefetch") if getattr(system, part).own is not None]
    if not own:
        return ("events", "asked for") if engine == "events" else ("compiled", "every choice is declarative")
    reason = f"{' and '.join(own)} {'is' if len(own) == 1 else 'are'} decided by Python code of the user's"
    if engine == "compiled":
        raise PolicyError(f"{system.name}: {reason}, which only the event engine can ask; use --engine auto or events")
    return "events", reason


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Events and entries die by reference count; the collector would only walk them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _device(
    engine: str,
    env: Clock,
    setting: Setting,
    system: System,
    slots: Slots,
    knowledge: Knowledge,
    records: Records,
    tier: HostTier | None,
    slots_of: Callable[[int], Slots] | None,
) -> AnyDevice:
    kind: Any = Device
    if engine == "compiled":
        from moesim.engine.compiled.device import CompiledDevice as kind
    return kind(env, setting.trace, setting.table, system, slots, knowledge, records, tier, setting.seed, slots_of)


class _SlotsBeside:
    """Slots beside KV caches of so many bytes; their number changes by whole experts, so few divisions are made."""

    def __init__(self, setting: Setting, system: System, expert_bytes: list[int]) -> None:
        self._setting, self._system, self._expert_bytes = setting, system, expert_bytes
        alike = len(set(expert_bytes)) == 1 and system.misses.rule != "precision"
        self._unit = expert_bytes[0] if alike else 1
        self._known: dict[int, Slots] = {}

    def __call__(self, kv_bytes: int) -> Slots:
        left = self._setting.shared_bytes - kv_bytes
        known = self._known.get(left // self._unit)
        if known is None:
            known = _slots(left, self._expert_bytes, self._system, self._setting.table, self._setting.trace)
            self._known[left // self._unit] = known
        return known


def _slots(total: int, expert_bytes: list[int], system: System, table: CostTable, trace: Trace) -> Slots:
    """Device memory as the system divides it: a share for low-precision copies, the rest by layer."""
    experts, misses = trace.info.experts, system.misses
    low: tuple[int, ...] = ()
    if misses.rule == "precision":
        low_bytes = [table.expert_bytes(layer, misses.low_bits) for layer in range(trace.layers)]
        low = split_by_layer(int(total * misses.low_share), low_bytes)
        _check_room(system, "low-precision", low, low_bytes)
        total -= sum(low)
    split = own_split(system.capacity, total, expert_bytes, experts)
    slots = Slots(split, system.scratch_slots(trace.top_k, experts), low)
    if misses.rule == "precision":
        _check_room(system, "full-precision", slots.per_layer, expert_bytes)
    return slots


def _check_room(system: System, kind: str, sizes: tuple[int, ...], one: list[int]) -> None:
    """Every pool must hold at least one expert, or a copy into it would wait for ever."""
    room = min(sizes) if system.eviction.scope == "layer" else sum(sizes)
    if room < max(one):
        raise MemoryBudgetError(
            f"{system.name}: {room / 2**20:.1f} MiB for {kind} copies cannot hold one of {max(one) / 2**20:.1f} MiB; "
            "raise the expert memory or change misses.low_share"
        )


def calibration_popularity(trace: Trace) -> NDArray[np.float64]:
    """Share of each expert in the choices of the first tenth of the requests (at least one): [layers, experts]."""
    counts = trace.popularity(calibration_rows(trace)).astype(np.float64)
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _place(device: AnyDevice, system: System, popularity: NDArray[np.float64], trace: Trace) -> None:
    """Fill the cache before time begins, most popular first, layer by layer in turn."""
    placement = system.placement
    if placement.own is not None:
        for layer, expert in own_start(placement.own, popularity):
            device.place(layer, expert, placement.pinned)
        return
    if placement.start == "empty":
        return
    order = np.argsort(-popularity, axis=1, kind="stable")
    for rank in range(trace.info.experts):
        for layer in range(trace.layers):
            device.place(layer, int(order[layer, rank]), placement.pinned)


class _Planner:
    """Calls for a new plan every `period` requests and hands it to the device once it is computed."""

    def __init__(self, setting: Setting, system: System, device: AnyDevice) -> None:
        self._setting, self._refresh, self._device = setting, system.refresh, device
        self._history = History(setting.trace)
        self._admitted = 0

    def admitted(self, request: Request, running: list[Request]) -> None:
        refresh = self._refresh
        self._device.new_sequence()
        if refresh is None:
            return
        if self._admitted and self._admitted % refresh.period == 0:
            self._plan(running)
        self._admitted += 1
        rows = request.prefill if len(request.prefill) else request.decode
        self._history.observe(request.task, rows)

    def _plan(self, running: list[Request]) -> None:
        refresh, table = self._refresh, self._setting.table
        assert refresh is not None
        tasks: dict[str, float] = {}
        for r in running:
            if r.task not in refresh.insensitive:
                tasks[r.task] = tasks.get(r.task, 0.0) + r.prompt_tokens + refresh.expected_output
        values = self._history.plan(list(tasks.items()))
        if values is None or not values.any():
            return
        calls = self._setting.trace.layers if refresh.per_layer else 1
        prompt = max(running[-1].prompt_tokens, 1)
        delay = calls * table.network_ns(refresh.predictor_params, prompt)
        self._device.plan_later(delay, values)


class _DryRun:
    """A device that only notes which rows each step serves; a step takes as long as its GPU work at least."""

    def __init__(self, env: Clock, table: CostTable) -> None:
        self._env, self._table = env, table
        self.in_order: list[NDArray[np.int64]] = []

    def steps(self, batch: Batch) -> Generator[simpy.Event, Any, list[int]]:
        ends: list[int] = []
        for i in range(batch.passes):
            if i and self._env.now >= batch.until:
                break
            rows = batch.rows_of(i)
            self.in_order.append(rows)
            step_ns = self._table.step_ns(len(rows), batch.sequences)
            yield self._env.timeout(step_ns + sum(self._table.layers_ns(batch.prefill, batch.contexts_of(i))))
            ends.append(self._env.now)
        return ends

    def idle(self, gap: int) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(gap)


def served_steps(setting: Setting) -> list[NDArray[np.int64]]:
    """Trace rows of every step in service order, from a dry run without experts.

    Exact while admission does not depend on time (all requests at hand, first come first served), else close to it.
    """
    env = Clock()
    dry = _DryRun(env, setting.table)
    server = Server(env, dry, setting.table.model, setting.workload, FCFS(), setting.limits, Records(False))
    env.run(env.process(server.run()))
    return dry.in_order


def next_uses(setting: Setting) -> NDArray[np.int32]:
    """Position (step x layers + layer) of the next use of every routed expert: [tokens, layers, k].

    As exact as `served_steps`.
    """
    trace = setting.trace
    in_order = served_steps(setting)
    step_of_row = np.full(trace.tokens, NEVER, dtype=np.int64)
    step_of_row[np.concatenate(in_order)] = np.repeat(np.arange(len(in_order)), [len(rows) for rows in in_order])
    out = np.full(trace.experts.shape, NEVER, dtype=np.int32)
    served = np.flatnonzero(step_of_row < NEVER)
    steps = np.repeat(step_of_row[served], trace.top_k)
    width = len(in_order) + 1
    for layer in range(trace.layers):
        experts = trace.experts[served, layer].ravel().astype(np.int64)
        key = experts * width + steps
        unique = np.unique(key)
        following = np.append(unique[1:], -1)
        same = following // width == unique // width
        after = np.where(same, following % width * trace.layers + layer, NEVER)
        out[served, layer] = after[np.searchsorted(unique, key)].reshape(-1, trace.top_k)
    return out


class _Ideal:
    """A device whose steps take what physics asks: all experts resident, nominal rates, nothing else; several GPUs
    share all bytes and operations evenly."""

    def __init__(self, env: Clock, setting: Setting, hosted: bool) -> None:
        self._env, self._trace, self._hosted = env, setting.trace, hosted
        self._table, self._gpus = (_as_one(setting), 1) if setting.others else (setting.table, setting.gpus)

    def steps(self, batch: Batch) -> Generator[simpy.Event, Any, list[int]]:
        ends: list[int] = []
        for i in range(batch.passes):
            if i and self._env.now >= batch.until:
                break
            chosen = self._trace.experts[batch.rows_of(i)]
            active = [len(np.unique(layer[layer >= 0])) for layer in chosen.transpose(1, 0, 2)]
            alone = self._table.ceiling_step_ns(batch.prefill, batch.contexts_of(i), active, self._hosted)
            yield self._env.timeout(alone // self._gpus)
            ends.append(self._env.now)
        return ends

    def idle(self, gap: int) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(gap)


def _as_one(setting: Setting) -> CostTable:
    """GPUs that are not alike as one with the nominal rates of all."""
    from moesim.costs.roofline import Roofline
    from moesim.costs.table import CostTable

    table, others = setting.table, [one.machine.gpu for one in setting.others]
    gpus = [table.machine.gpu] * (setting.gpus - len(others)) + others
    one = replace(
        gpus[0],
        hbm_gbps=sum(gpu.hbm_gbps for gpu in gpus),
        tflops=sum(gpu.tflops for gpu in gpus),
        fp8_tflops=sum(gpu.fp8_tflops or gpu.tflops for gpu in gpus),
    )
    machine = replace(table.machine, gpu=one, profile="")
    return CostTable(table.model, machine, Roofline(machine), offloaded=False)


def ceiling(setting: Setting, bounded: bool = False, hosted: bool = False) -> Records:
    """The same workload at the physical ceiling of the GPU, and with no bound on KV caches unless `bounded`.

    hosted: where the CPU computes experts too, of GPU and CPU together.
    """
    env, records = Clock(), Records(False)
    limits = setting.limits if bounded else replace(setting.limits, kv_bytes=1 << 62)
    server = Server(env, _Ideal(env, setting, hosted), setting.table.model, setting.workload, FCFS(), limits, records)
    env.run(env.process(server.run()))
    return records
