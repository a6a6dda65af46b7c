"""One question answered: this model, on this machine, under this workload, served this way."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim import __version__, metrics
from moesim.costs.fitted import Fitted, costs_of
from moesim.costs.roofline import Roofline
from moesim.costs.shard import slices
from moesim.costs.table import CostTable
from moesim.efficiencies import RESOURCES, terms
from moesim.engine.pools import outputs_of, prompts_of, simulate_pools
from moesim.engine.serve import Limits
from moesim.engine.simulate import Outcome, Setting, ceiling, choose_engine, simulate
from moesim.errors import MemoryBudgetError, MoesimError, PolicyError, WorkloadError, nearest
from moesim.files import atomic, write_text
from moesim.machine import THIS, Machine, load_machine
from moesim.memory import KV_BLOCK, Ledger, largest_expert, plan_memory
from moesim.model import Model, load_model
from moesim.output import progress, to_json
from moesim.policies.own import is_own
from moesim.prediction import Beliefs
from moesim.records import Records
from moesim.systems import System, load_system, with_settings
from moesim.trace import PREFILL, Trace
from moesim.trace.io import check_matches
from moesim.transforms.transform import Shares, Transformed, apply_all, chain, nothing
from moesim.units import format_size
from moesim.workload import Workload, first, from_trace, read_workload, unroll, with_arrivals, with_slo

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PREEMPTION = ("none", "recompute")
ENOUGH = 20  # requests below which a queue says nothing about load
# Anchors and error bars are measured on at most so many expert lookups, so that they cost seconds.
SAMPLE_LOOKUPS = 120_000
CEILING_BASIS = "all experts resident, nominal bandwidth and peak rates, no overheads"
ANCHORS = {"all_resident": "all-resident", "no_cache": "on-demand", "lru": "LRU", "oracle": "oracle"}


@dataclass(frozen=True)
class Question:
    """What is asked, apart from the trace and the policy; None means: work it out."""

    model: str | Model | None = None
    machine: str | Machine = "rtx-4090"
    expert_memory: int | None = None  # bytes
    slots_per_layer: int | None = None
    workload: Path | None = None
    request_rate: float | None = None  # requests/s
    burstiness: float = 1.0
    max_concurrency: int | None = None  # None: 1 where requests have no times of their own, else no limit
    max_num_seqs: int = 256
    num_prompts: int | None = None
    slo_ms: float | None = None
    goodput: tuple[tuple[str, float], ...] = ()  # (ttft, tpot or e2el; ms)
    max_batch_tokens: int = 8192
    chunk: int = 0
    preemption: str = "none"  # recompute
    prefix_cache: bool = False
    disaggregate: tuple[int, int] | None = None  # GPUs for prompts, GPUs for outputs
    seed: int = 0
    engine: str = "auto"  # events | compiled

    def __post_init__(self) -> None:
        if isinstance(self.machine, str) and THIS in self.machine.split("+"):  # answers name what it is, wherever read
            object.__setattr__(self, "machine", load_machine(self.machine))
        least_of = {"max_concurrency": 1, "max_num_seqs": 1, "max_batch_tokens": 1, "chunk": 0, "seed": 0}
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise WorkloadError(f"--{name.replace('_', '-')} {value} must be at least {least}")
        if self.preemption not in PREEMPTION:
            raise WorkloadError(
                f"--preemption {self.preemption}: must be one of {', '.join(PREEMPTION)}"
                f"{nearest(self.preemption, PREEMPTION)}"
            )
        if self.disaggregate and (self.prefix_cache or self.preemption != "none"):
            raise WorkloadError("--disaggregate goes without --prefix-cache and --preemption; leave those out")
        for name, ms in self.goodput:
            if name not in metrics.GOODPUT:
                raise WorkloadError(f"--goodput {name}: unknown metric{nearest(name, metrics.GOODPUT)}")
            if not 0 < ms < math.inf:
                raise WorkloadError(f"--goodput {name}:{ms:g} must be a number of ms above 0")

    @property
    def fixes_experts(self) -> bool:
        """Whether it says what of the memory cached experts get; else they share it with the KV caches."""
        return self.expert_memory is not None or self.slots_per_layer is not None


def parse_slo(text: str) -> tuple[str, float]:
    """`tpot:50` as vLLM writes it, in ms. Raises WorkloadError."""
    name, _, ms = text.partition(":")
    try:
        return name, float(ms)
    except ValueError:
        raise WorkloadError(f"--goodput '{text}': write METRIC:MS, such as ttft:2000") from None


def parse_pools(text: str) -> tuple[int, int]:
    """`5:3`: GPUs for prompts and for outputs. Raises WorkloadError."""
    prompts, _, outputs = text.partition(":")
    if not (prompts.isdecimal() and outputs.isdecimal() and int(prompts) and int(outputs)):
        raise WorkloadError(f"--disaggregate '{text}': write GPUs for prompts:GPUs for outputs, such as 5:3")
    return int(prompts), int(outputs)


@dataclass(frozen=True, eq=False)
class Run:
    """A summary fit for JSON, and what it was computed from."""

    summary: dict[str, Any]
    records: Records
    request_ids: tuple[str, ...]

    def to_pandas(self, table: str = "requests") -> Any:
        """`requests`, `steps`, and with detail also `layers`, `transfers` and `kernels`; times in ns.

        `steps` has the requests waiting and running when each began.
        """
        return self._table(table).to_pandas()

    def _table(self, name: str) -> Any:
        """An Arrow table."""
        table = getattr(self.records, name).to_arrow()
        if name == "steps" and len(self.records.requests):
            times = self._columns("requests", metrics.QUEUE)
            depths = metrics.queue_depth(times, self.records.steps.column("start"))
            for column, depth in zip(("waiting", "running"), depths, strict=True):
                table = table.append_column(column, [depth])
        return table

    def plot(self, what: str = "latency") -> Figure:
        """A plotly figure: `critical path`, `anchors`, `memory`, `latency`, `steps`, `queue`; with detail `layers`."""
        from moesim.run_figures import figures_of

        found = dict(figures_of(self.summary, self._columns))
        if what not in found:
            raise MoesimError(f"plot '{what}': this run has {', '.join(found)}{nearest(what, found)}")
        return found[what]

    def _columns(self, table: str, names: tuple[str, ...]) -> dict[str, Any]:
        rows = getattr(self.records, table)
        return {name: rows.column(name) for name in names} if len(rows) else {}

    def save(self, directory: Path) -> None:
        """summary.json and one Parquet file per table; no table, nor one of an older run, where nothing was served."""
        import pyarrow.parquet as pq

        write_text(directory / "summary.json", to_json(self.summary) + "\n")
        for name in ("requests", "steps", "layers", "transfers", "kernels"):
            if not self.records.requests:
                (directory / f"{name}.parquet").unlink(missing_ok=True)
                continue
            with atomic(directory / f"{name}.parquet") as temporary:
                pq.write_table(self._table(name), temporary, compression="zstd")


class Scene:
    """A trace on a machine under a workload: what every system compared on it shares."""

    def __init__(self, trace: Trace, question: Question) -> None:
        self.trace, self.question = trace, question
        named = question.model or trace.info.model
        self.model: Model = named if isinstance(named, Model) else load_model(named)
        check_matches(trace, self.model)
        given = question.machine
        self.machine: Machine = given if isinstance(given, Machine) else load_machine(given)
        self._costs: dict[tuple[str, bool, bool, bool], Roofline] = {}
        self.workload = _workload(trace, question)
        self._shared_rows = bool(question.workload)
        timed = question.request_rate is not None or any(r.arrival_ns for r in self.workload.requests)
        self.concurrency = question.max_concurrency or (len(self.workload.requests) if timed else 1)
        self.given = self.model, self.trace  # as they come, before any transform
        self.transformed: Transformed | None = None
        if question.disaggregate:
            self._check_pools(*question.disaggregate)

    def _check_pools(self, prompts: int, outputs: int) -> None:
        machine, requests = self.machine, self.workload.requests
        if prompts + outputs != machine.gpus or machine.others:
            raise WorkloadError(
                f"--disaggregate {prompts}:{outputs} divides {prompts + outputs} GPUs that are alike, but "
                f"{machine.name} has {machine.gpus}{' that are not' if machine.others else ''}"
            )
        if machine.hosts > 1:
            raise WorkloadError(
                f"--disaggregate: {machine.name} has {machine.hosts} hosts; KV caches go over NVLink only"
            )
        if self.concurrency < len(requests):
            raise WorkloadError(
                "--disaggregate: prompts must not wait for outputs of others; leave out --max-concurrency, and give "
                "--request-rate where requests have no times of their own"
            )
        if not all(len(r.prefill) for r in requests) or not any(len(r.decode) for r in requests):
            raise WorkloadError("--disaggregate: requests need prompts, and some more than one output token")

    def pools(self, system: System) -> tuple[Scene, Scene]:
        """The GPUs that serve prompts, and those that serve outputs, each as a scene of its own."""
        assert self.question.disaggregate
        if not system.all_resident:
            raise PolicyError(f"--disaggregate: {system.name} has an expert cache; take all-resident, EPLB or HEXA-MoE")
        pools = copy.copy(self), copy.copy(self)
        for pool, part, gpus in zip(pools, (prompts_of, outputs_of), self.question.disaggregate, strict=True):
            pool.question = replace(self.question, disaggregate=None)
            pool.machine = replace(self.machine, gpus=gpus)
            pool.workload = part(self.workload)
        return pools

    def under(self, system: System) -> Scene:
        """The scene after the system's transforms: what it serves, and all that it knows."""
        if not system.transforms:
            return self if system.all_resident else self.unrolled()
        scene = self.unrolled()
        done = apply_all(system.transforms, *scene.given, self.question.seed)
        together = min(self.concurrency, self.question.max_num_seqs, len(self.workload.requests))
        if done.sequences is not None and together > done.sequences:
            raise PolicyError(
                f"{system.name} keeps merged experts for {done.sequences} sequences, but {together} are served at a "
                "time; give it more sequences, or lower --max-concurrency"
            )
        scene = copy.copy(scene)
        scene.model, scene.trace, scene.transformed = done.model, done.trace, done
        return scene

    def unrolled(self) -> Scene:
        """The same scene with a row of the trace for every token served, as all but resident experts ask for."""
        if not self._shared_rows:
            return self
        scene = copy.copy(self)
        scene.trace, scene.workload = unroll(self.trace, self.workload)
        scene.given, scene._shared_rows = (self.model, scene.trace), False
        return scene

    def untransformed(self) -> Scene:
        """The same workload on model and trace as they come: what anchors are measured on."""
        scene = copy.copy(self)
        (scene.model, scene.trace), scene.transformed = self.given, None
        return scene

    def altered(self, system: System) -> Shares | None:
        """Shares of routed weight that the system alters before serving; None where it alters none."""
        shares = self.transformed.altered if self.transformed else None
        if system.expert_bits is None or system.expert_bits >= self.model.expert_bits:
            return shares
        none = nothing(self.trace)
        return chain(shares or none, none | {"lower_precision": none["skipped"] + 1})

    def ledger(self, system: System) -> Ledger:
        """Where every byte of GPU, host and drive goes under `system`.

        The KV cache is reserved for all sequences that may be in service; where that leaves no room for experts, or
        less than was set aside for them, for as many as do, since the engine admits requests by KV memory. Of two pools
        it is the tighter one's.
        """
        if self.question.disaggregate:
            return min((pool.ledger(system) for pool in self.pools(system)), key=lambda ledger: ledger.gpu["free"])
        sequences = self._together(system)
        while sequences > 1:
            try:
                ledger = self._ledger(system, sequences)
            except MemoryBudgetError:  # said where not even one sequence has room
                pass
            else:
                if ledger.verdict not in ("OOM", "CACHE_DISABLED"):
                    return ledger
            sequences = -(-sequences // 2)
        return self._ledger(system, 1)

    def at_once(self, system: System) -> int:
        """Requests that one GPU, or all that share their KV caches, serve at once: those whose caches fit, or one."""
        longest = max(r.prompt_tokens + len(r.decode) for r in self.workload.requests)
        room = self._kv_bytes(system, self.ledger(system)) // self.model.kv_bytes(-(-longest // KV_BLOCK) * KV_BLOCK)
        return max(min(self._together(system), room), 1)

    def beside(self, system: System, share: float) -> Ledger | None:
        """With all that is left for cached experts beside the KV caches of a share of the sequences that may be in
        service; None where no experts are cached."""
        if system.all_resident or not system.cache:
            return None
        alone = copy.copy(self)
        alone.question = replace(self.question, expert_memory=None, slots_per_layer=None)
        return alone._ledger(system, max(math.ceil(share * self._together(system)), 1))

    def wanted(self, system: System) -> Ledger:
        """With the KV caches of all sequences that may be in service, whether they fit or not."""
        return self._ledger(system, self._together(system))

    def _together(self, system: System) -> int:
        """Sequences that one GPU, or all that share their KV caches, may serve at once."""
        together = min(self.concurrency, len(self.workload.requests))
        return min(-(-together // self._apart(system)), self.question.max_num_seqs)

    def _step_tokens(self, sequences: int) -> int:
        """The most tokens one step can hold: every sequence decodes, and prompts or chunks fill the budget."""
        q, prompts = self.question, [len(r.prefill) for r in self.workload.requests]
        prompt = sequences * q.chunk if q.chunk else sum(sorted(prompts)[-sequences:])
        alone = 0 if q.chunk else max(prompts)  # a whole prompt goes in even above the budget
        return max(sequences, min(prompt + sequences, q.max_batch_tokens), alone)

    def _ledger(self, system: System, sequences: int) -> Ledger:
        """Of one GPU that serves so many sequences."""
        parallel, gpus = system.parallel, self.machine.gpus
        model, held = self._served(system), None
        if gpus > 1:
            if not system.all_resident:
                raise PolicyError(
                    f"{system.name} on {self.machine.name}: an expert cache needs a machine with one GPU; several take "
                    "all-resident, EPLB or HEXA-MoE"
                )
            held = model.experts if parallel.sliced else parallel.slots(model.experts, gpus) // gpus
        plans = [self._plan(system, sequences, *part, held) for part in self._parts(system, model)]
        return min(plans, key=lambda plan: plan.gpu["free"])

    def _parts(self, system: System, model: Model) -> list[tuple[Machine, Model]]:
        """(machine with its GPU, its slice of the model) of each GPU that is unlike those before it."""
        machine, parallel = self.machine, system.parallel
        if machine.gpus == 1:
            return [(machine, model)]
        costs = [self.costs(graph=system.graph)] * (machine.gpus - len(machine.others)) + self._others(
            graph=system.graph
        )
        _, models = slices(model, costs, parallel.shares, parallel.attention == "tensor", parallel.sliced)
        gpus = [one.gpu for one in machine.each]
        return list(dict.fromkeys((replace(machine, gpu=g), m) for g, m in zip(gpus, models, strict=True)))

    def _plan(self, system: System, sequences: int, machine: Machine, model: Model, held: int | None) -> Ledger:
        """Of one GPU. One that gathers experts keeps room for a whole layer of them."""
        q, requests = self.question, self.workload.requests
        scratch = system.scratch_slots(self.trace.top_k, self.trace.info.experts)
        if machine.gpus > 1 and system.parallel.gathers:
            scratch = -(-model.experts * largest_expert(self._served(system)) // largest_expert(model))
        return plan_memory(
            model,
            machine,
            expert_memory=None if system.all_resident or not system.cache else q.expert_memory,
            slots_per_layer=None if system.all_resident or not system.cache else q.slots_per_layer,
            max_sequences=sequences,
            max_context=max(r.prompt_tokens + len(r.decode) for r in requests),
            max_batch_tokens=self._step_tokens(sequences),
            all_resident=system.all_resident,
            cache=system.cache,
            scratch_experts=scratch,
            experts_held=held,
            native=system.native,
        )

    def _served(self, system: System) -> Model:
        bits = system.expert_bits
        return self.model if bits is None else self.model.with_precision(expert_bits=bits)

    def costs(
        self, scale: str = "default", graph: bool = True, repacked: bool = True, native: bool = False
    ) -> Roofline:
        """What the machine's primitives cost; a profile is read once."""
        key = scale, graph, repacked, native
        if key not in self._costs:
            self._costs[key] = costs_of(self.machine, *key)
        return self._costs[key]

    def _others(self, scale: str = "default", graph: bool = True) -> list[Roofline]:
        """Costs of the GPUs that are unlike the first."""
        return [costs_of(other, scale, graph) for other in self.machine.others]

    def setting(self, system: System, ledger: Ledger, scale: str = "default") -> Setting:
        """What the engine needs; `scale` low or high takes every cost at one end of its band."""
        costs = self.costs(scale, system.graph, system.repacked, system.native)
        pinned = system.placement.pinned and ledger.expert_bytes >= self._served(system).total_expert_bytes
        held = system.all_resident or pinned  # nothing is ever absent
        changing = system.cache and not system.placement.pinned

        def offloaded(prompts: bool, tokens: int) -> bool:
            # Where absent experts run on the CPU, the hand-off brings the routing down; only a changing cache asks too.
            return not held and (changing or system.misses.rule_of(prompts, tokens) != "host")

        table = CostTable(self._served(system), self.machine, costs, offloaded, system.kernel)
        q = self.question
        apart = self._apart(system)
        shared = 0 if q.fixes_experts or system.all_resident or not system.cache else ledger.shared_bytes
        if shared and q.prefix_cache:
            raise PolicyError(
                f"--prefix-cache: {system.name} divides GPU memory between experts and KV caches as it goes, so "
                "nothing is set aside for prefixes; give --expert-memory or --slots-per-layer"
            )
        one_slot_each = sum(table.expert_bytes(layer) for layer in range(self.trace.layers))
        return Setting(
            trace=self.trace,
            table=table,
            workload=self.workload,
            limits=Limits(
                clients=self.concurrency,
                sequences=q.max_num_seqs * apart,
                batch_tokens=q.max_batch_tokens * apart,
                chunk=q.chunk,
                kv_bytes=shared - one_slot_each if shared else self._kv_bytes(system, ledger) * apart,
                preempts=q.preemption != "none",
                prefixes=q.prefix_cache,
            ),
            expert_bytes=ledger.expert_bytes,
            shared_bytes=shared,
            host_bytes=ledger.host_expert_bytes,
            seed=q.seed,
            gpus=self.machine.gpus,
            others=tuple(
                CostTable(self._served(system), one.machine, one, offloaded, system.kernel)
                for one in self._others(scale, system.graph)
            ),
        )

    def _apart(self, system: System) -> int:
        """GPUs that have sequences of their own; each has the limits that one server has."""
        return self.machine.gpus if system.parallel.attention == "data" else 1

    def _kv_bytes(self, system: System, ledger: Ledger) -> int:
        """For KV caches of one GPU: what it reserved, and what is free where experts take a fixed part."""
        fixed = system.cache and self.question.fixes_experts
        free = ledger.gpu["free"] if system.all_resident or fixed else 0
        return ledger.kv_bytes + max(free, 0)


def _workload(trace: Trace, q: Question) -> Workload:
    workload = read_workload(q.workload, trace, q.seed) if q.workload else from_trace(trace)
    if q.num_prompts is not None:
        workload = first(workload, q.num_prompts)
    if q.request_rate is not None:
        if q.workload and any(r.arrival_ns for r in workload.requests):
            raise WorkloadError(
                f"--workload {q.workload} brings its own arrivals; leave out --request-rate {q.request_rate:g}"
            )
        workload = with_arrivals(workload, q.request_rate, q.burstiness, q.seed)
    if q.prefix_cache and not any(r.blocks for r in workload.requests):
        raise WorkloadError(
            "--prefix-cache: no request says which blocks its prompt begins with; give a --workload that does, such as "
            "Mooncake's JSON lines with hash_ids"
        )
    if q.preemption != "none" and not all(len(r.prefill) for r in workload.requests):
        raise WorkloadError(
            f"--preemption {q.preemption}: the trace has no rows for prompts, so none can be computed again; give a "
            "trace with prompts, or leave it out"
        )
    return workload if q.slo_ms is None else with_slo(workload, q.slo_ms)


def run(
    trace: Trace,
    policy: str | System,
    question: Question = Question(),
    settings: list[str] | tuple[str, ...] = (),
    anchors: bool = True,
    detail: bool = False,
    beliefs: tuple[Beliefs, ...] | None = None,
    shown: bool = True,
) -> Run:
    """Replay `trace` under `policy`. Raises a MoesimError where the question makes no sense.

    beliefs: what `predict` returned for the same arguments, where it is known already; shown: with progress bars.
    """
    system = compose(policy, settings)
    scene = Scene(trace, question).under(system)
    ledger = scene.ledger(system)
    if not _runs(system, ledger):
        return Run(_infeasible(scene, system, ledger), Records(False), ())
    if beliefs is None and not is_own(system.predictor):  # a user's object may remember what it was asked
        beliefs = system.predictor.predict(scene.trace, question.seed)
    outcome = _simulate(scene, system, ledger, detail, shown=shown, beliefs=beliefs)
    summary = _summary(scene, system, ledger, outcome)
    if anchors:
        summary |= _anchors(scene, system, ledger, summary["metrics"], beliefs, shown)
    summary["notes"] = _notes(scene, system)
    return Run(summary, outcome.records, tuple(r.request_id for r in scene.workload.requests))


def estimate(trace: Trace, policy: str | System, question: Question) -> dict[str, Any]:
    """What is known without simulating: whether it fits, where every byte goes, and the ceiling of one request.

    at_once: requests whose KV caches have room; most_slots: of cached experts per layer, beside one request's KV cache.
    """
    system = compose(policy)
    scene = Scene(trace, replace(question, num_prompts=question.num_prompts or len(trace.requests))).under(system)
    ledger = scene.ledger(system)
    found: dict[str, Any] = {"status": ledger.verdict, "status_reason": ledger.reason, "memory": ledger.to_dict()}
    if _runs(system, ledger):
        if (most := scene.beside(system, 0.0)) is not None:
            found["at_once"] = scene.at_once(system)
            found["most_slots"] = most.slots_per_layer
        scene.workload = first(scene.workload, 1)
        top = metrics.throughput_metrics(ceiling(scene.setting(system, ledger)))["output_throughput"]
        found["ceiling"] = {"output_throughput": top, "basis": "one request, " + CEILING_BASIS}
    return found


def predict_band(
    trace: Trace, policy: str | System, question: Question, settings: tuple[str, ...] = ()
) -> tuple[str, list[dict[str, Any]], str]:
    """(status, metrics, what limits it). Metrics: with every cost as expected, then pairs with one resource's costs at
    their slow and at their fast end, for every resource, and for the curves of a profile.

    Errors of one resource go together, those of different ones are independent: a band adds their squares.
    Without metrics where it cannot run; then the last is the reason.
    """
    system = compose(policy, settings)
    scene = Scene(trace, question).under(system)
    ledger = scene.ledger(system)
    if not _runs(system, ledger):
        return ledger.verdict, [], ledger.reason
    beliefs = system.predictor.predict(scene.trace, question.seed)
    middle, *ends = _banded(scene, system, ledger, beliefs)
    limit = _limits(middle)["explanation"]
    return ledger.verdict, [_numbers(outcome) for outcome in (middle, *ends)], limit


def _banded(scene: Scene, system: System, ledger: Ledger, beliefs: tuple[Beliefs, ...]) -> Iterator[Outcome]:
    """With every cost as expected, then each resource's costs at their slow and at their fast end."""
    yield _simulate(scene, system, ledger, beliefs=beliefs)
    for varied in _varied(scene):
        for scale, one in zip(("low", "high"), varied, strict=True):
            at = scale if one is scene else "default"
            yield _simulate(one, system, ledger, scale=at, beliefs=beliefs)


def _limits(outcome: Outcome) -> dict[str, Any]:
    return metrics.bottleneck(outcome.counts, outcome.idle_ns, outcome.busy_ns, outcome.elapsed_ns)


def _varied(scene: Scene) -> list[tuple[Scene, Scene]]:
    """The scene with one resource's costs slow and fast; the scene itself where a profile's curves are to be so."""
    known, given = terms(), dict(scene.machine.efficiencies)
    pairs = []
    for names in RESOURCES.values():
        ends = []
        for end in ("low", "high"):
            moved = tuple((name, getattr(known[name], end)) for name in names if name not in given)
            one = copy.copy(scene)
            one.machine = replace(scene.machine, efficiencies=(*scene.machine.efficiencies, *moved))
            one._costs = {}
            ends.append(one)
        pairs.append((ends[0], ends[1]))
    return [*pairs, (scene, scene)] if scene.machine.profile else pairs


def compose(policy: str | System, settings: list[str] | tuple[str, ...] = ()) -> System:
    """The system of that name with `settings` changed. Raises PolicyError where they make no sense."""
    system = load_system(policy) if isinstance(policy, str) else policy
    if settings:
        system = with_settings(system, settings)
        system = replace(system, name=f"{system.name} with {', '.join(settings)}")
    return system


def predict(trace: Trace, system: System, question: Question) -> tuple[Beliefs, ...]:
    """What `system` believes of `trace` under `question`; machine, memory and concurrency have no part in it."""
    model, trace = Scene(trace, question).unrolled().given
    if system.transforms:
        trace = apply_all(system.transforms, model, trace, question.seed).trace
    return system.predictor.predict(trace, question.seed)


def replay(trace: Trace | Path | str, policy: str | System = "LRU", **options: Any) -> Run:
    """`replay("trace.parquet", "eMoE", slots_per_layer=8)`: options are those of `Question` and `run`."""
    from moesim.trace.io import read

    own = {name: options.pop(name) for name in ("settings", "anchors", "detail") if name in options}
    return run(trace if isinstance(trace, Trace) else read(trace), policy, Question(**options), **own)


def _simulate(
    scene: Scene, system: System, ledger: Ledger, detail: bool = False, scale: str = "default", shown: bool = False,
    beliefs: tuple[Beliefs, ...] | None = None,
) -> Outcome:  # fmt: skip
    rows = sum(len(r.prefill) + len(r.decode) for r in scene.workload.requests)
    with progress(f"{system.name}: tokens", rows, shown) as advance:
        if scene.question.disaggregate:
            prompts, outputs = (pool.setting(system, pool.ledger(system), scale) for pool in scene.pools(system))
            return simulate_pools(scene.workload, prompts, outputs, system, advance, scene.question.engine)
        setting = scene.setting(system, ledger, scale)
        return simulate(setting, system, detail, beliefs, on_tokens=advance, engine=scene.question.engine)


def _summary(scene: Scene, system: System, ledger: Ledger, outcome: Outcome) -> dict[str, Any]:
    numbers = _numbers(outcome)
    if scene.question.goodput:
        tasks = [r.task for r in scene.workload.requests]
        numbers |= metrics.goodput_metrics(outcome.records, dict(scene.question.goodput), tasks)
    machine = scene.machine
    energy = metrics.busy_share_energy(machine, outcome.busy_ns["gpu"], numbers)
    q = scene.question
    numbers |= metrics.kv_metrics(outcome.records, q.prefix_cache, q.preemption != "none")
    numbers |= metrics.queue_metrics(outcome.records) | metrics.cost_metrics(machine, numbers)
    numbers["joules_per_output_token"] = energy.pop("joules_per_output_token")
    altered = scene.altered(system)
    status, reason = _status(scene, system, ledger, outcome, numbers)
    extrapolated, _ = _beyond(scene)
    if extrapolated:
        reason = "; ".join(filter(None, [reason, f"EXTRAPOLATED beyond what was measured: {', '.join(extrapolated)}"]))
    summary: dict[str, Any] = {
        "status": status,
        "status_reason": reason,
        "inputs": _inputs(scene, system),
        "engine": dict(zip(("used", "because"), _engine(scene, system), strict=True)),
        "metrics": numbers,
        "routing_fidelity": metrics.routing_fidelity(
            scene.given[1], scene.trace, scene.workload, outcome.counts, altered
        ),
        "published_quality": system.quality and asdict(system.quality),
        "bottleneck": _limits(outcome),
        "price": {
            "usd_per_hour": machine.usd_per_hour,
            "date": machine.prices.date,
            "source": machine.prices.source or "no price is known; --prices FILE gives one",
        },
        "energy": energy,
        "memory": ledger.to_dict() | {"peak_resident_expert_bytes": outcome.peak_resident_bytes},
    }
    if outcome.devices:
        summary["devices"] = outcome.devices
    return summary


def _engine(scene: Scene, system: System) -> tuple[str, str]:
    if scene.question.disaggregate:
        return "pools", "prompts, then outputs, each on GPUs of their own"
    if scene.machine.gpus > 1:
        return "cluster", "several GPUs in step: nothing can happen between their exchanges"
    return choose_engine(scene.question.engine, system)


def _beyond(scene: Scene) -> tuple[list[str], list[str]]:
    """Curves that were asked beyond what was measured, and what the specification sheet had to answer."""
    costs = scene.costs()
    if not isinstance(costs, Fitted):
        return [], []
    return sorted(costs.extrapolated), sorted(costs.assumed)


def _numbers(outcome: Outcome) -> dict[str, Any]:
    records, counts = outcome.records, outcome.counts
    throughput = metrics.throughput_metrics(records)
    moved = outcome.link_bytes
    cache = metrics.cache_metrics(counts, moved["h2d"], moved["d2h"], moved["nvme"], throughput["total_output_tokens"])
    return throughput | metrics.latency_metrics(records) | cache


def _infeasible(scene: Scene, system: System, ledger: Ledger) -> dict[str, Any]:
    return {
        "status": ledger.verdict,
        "status_reason": ledger.reason,
        "inputs": _inputs(scene, system),
        "metrics": {},
        "memory": ledger.to_dict(),
        "notes": _notes(scene, system),
    }


def _status(scene: Scene, system: System, ledger: Ledger, outcome: Outcome, numbers: dict[str, Any]) -> tuple[str, str]:
    """The memory's verdict, or what only the run could show."""
    for part in outcome.pools or (outcome,):
        if tail := _growing_wait(part.records):
            return "OVERLOADED", f"the last quarter of the requests waited {tail / 1e9:.3g} s to be admitted"
    for name in ("prefill", "decode") if outcome.pools else ():
        pool = (outcome.devices or {})[name]
        if pool["kv_most_bytes"] > pool["kv_room_bytes"]:
            return "OVERLOADED", (
                f"KV caches of the {name} pool would take {format_size(pool['kv_most_bytes'])} of its "
                f"{format_size(pool['kv_room_bytes'])}; these are the times as if there were room"
            )
    if ledger.verdict == "FITS" and system.cache and not system.all_resident:
        steps = max(len(outcome.records.steps), 1)
        unique = numbers["lookups"] / steps / scene.trace.layers
        slots = ledger.expert_bytes / max(scene.trace.layers * scene._served(system).expert_bytes(), 1)
        if unique > slots:
            return "THRASH", f"a step needs {unique:.1f} experts per layer, the cache holds {slots:.1f}"
    return ledger.verdict, ledger.reason


def _growing_wait(records: Records) -> float:
    """ns that the last quarter of the requests waited to be admitted, where the queue only grew; else 0."""
    requests = records.requests
    arrivals = requests.column("arrival")
    span = int(arrivals.max() - arrivals.min())
    order = requests.column("request").argsort()
    waited = (requests.column("admitted") - requests.column("sent"))[order]
    quarter = len(waited) // 4
    tail = float(waited[-quarter:].mean()) if quarter else 0.0
    growing = len(waited) >= ENOUGH and tail > 2 * waited[:quarter].mean()
    return tail if span and growing and tail > 0.25 * span else 0.0


def _inputs(scene: Scene, system: System) -> dict[str, Any]:
    """Everything the answer depends on, resolved."""
    q, trace, workload = scene.question, scene.trace, scene.workload
    arguments = asdict(q) | {"workload": str(q.workload) if q.workload else None}
    if q.request_rate is not None and math.isinf(q.request_rate):
        arguments["request_rate"] = "inf"
    return {
        "moesim_version": __version__,
        "trace": {
            "sha256": trace.content_hash,
            "model": trace.info.model,
            "provenance": trace.info.provenance,
            "requests": len(trace.requests),
            "tokens": trace.tokens,
        },
        "model": asdict(scene.given[0]),
        "model_size": {
            "params": scene.given[0].total_params,
            "bytes": scene.given[0].total_bytes,
            "expert_bytes": scene.given[0].total_expert_bytes,
        },
        "machine": scene.machine.to_dict(),
        "costs": scene.costs().label,
        "system": system.parts(),
        "workload": {
            "requests": len(workload.requests),
            "arrivals": workload.arrivals,
            "routing": workload.routing,
            "sha256": hashlib.sha256(q.workload.read_bytes()).hexdigest() if q.workload else None,
            "max_concurrency": scene.concurrency,
        },
        "arguments": arguments,
        "seed": q.seed,
    }


def _notes(scene: Scene, system: System) -> list[str]:
    """What a reader must know before believing a number."""
    notes = [*scene.machine.notes, *system.notes, *(scene.transformed.notes if scene.transformed else ())]
    if tell := getattr(system.predictor, "notes", None):
        notes += tell(scene.trace)
    _, assumed = _beyond(scene)
    if assumed:
        notes.append(f"not in the {scene.costs().label}, so from the specification sheet: {', '.join(assumed)}")
    if scene.trace.info.provenance != "real":
        notes.append("synthetic routing: the trace was drawn, not recorded")
    if scene.workload.routing != "as recorded":
        notes.append(f"routing of {scene.workload.routing} with seed {scene.question.seed}")
    if scene.question.disaggregate:
        notes.append("two pools of GPUs: TTFT is the prefill pool's; shares of time are means over all GPUs")
    if not (scene.trace.phase == PREFILL).any():
        notes.append("decode-only trace: prompts are not simulated, so TTFT is the first decode step")
    if system.own:
        notes.append(f"{', '.join(part for part, _ in system.own)}: decided by {system.own_names}, not by moesim")
    if getattr(system.predictor, "provenance", "own") == "assumed":
        notes.append("the predictor's accuracy is stated, not learned from the trace")
        if scene.trace.experts is not scene.given[1].experts:
            notes.append("that accuracy was stated for other routers: transforms changed the routing, so state it anew")
    if outweighed := system.eviction.outweighed:
        notes.append(outweighed)
    if system.misses.rule == "precision" and scene.trace.weights is None:
        notes.append("precision goes by rank alone: the trace has no gate weights, so all ranks weigh the same")
    if system.misses.rule == "reroute" and scene.trace.probabilities is None:
        notes.append("reroute order is by popularity: the trace has no gate probabilities")
    if system.misses.changes_outputs or scene.altered(system):
        notes.append("outputs change: quality is not modelled, see routing_fidelity")
    if system.refresh and not any(scene.trace.requests.task):
        notes.append("the trace has no task labels: all requests count as one task")
    return notes


# -- anchors and error bars ---------------------------------------------------------------------------------------


def _anchors(
    scene: Scene,
    system: System,
    ledger: Ledger,
    numbers: dict[str, Any],
    beliefs: tuple[Beliefs, ...] | None,
    shown: bool,
) -> dict[str, Any]:
    """The four anchors, the physical ceiling and the cost band, on the first requests of the workload."""
    sample = _sample(scene)
    whole = len(sample.workload.requests) == len(scene.workload.requests)
    base = numbers if whole else _numbers(_simulate(sample, system, ledger, beliefs=beliefs))
    found: dict[str, Any] = {}
    with progress("anchors and error bar", len(ANCHORS) + 3, shown) as advance:
        for name, policy in ANCHORS.items():
            found[name] = anchor(sample, policy, system.native)
            advance()
        band = {}
        for scale in ("low", "high"):
            band[scale] = _numbers(_simulate(sample, system, ledger, scale=scale, beliefs=beliefs))
            advance()
        top = metrics.throughput_metrics(ceiling(sample.setting(system, ledger)))["output_throughput"]
        advance()
    found["of_sample"] = {"requests": len(sample.workload.requests), "policy": _brief(base)}
    return {
        "anchors": found,
        "ceiling": {
            "output_throughput": top,
            "reached": base["output_throughput"] / top,
            "basis": CEILING_BASIS,
        },
        "uncertainty": {
            "basis": f"every {scene.costs().label} cost at the slow and at the fast end of its band, on the sample",
            **{
                name: sorted(numbers[name] * band[scale][name] / base[name] for scale in band)
                for name in ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")
                if base[name]
            },
        },
    }


def _sample(scene: Scene) -> Scene:
    """The same scene with only as many leading requests as the sample allows (at least one)."""
    per_token = scene.trace.layers * scene.given[1].top_k
    room, count = SAMPLE_LOOKUPS, 0
    for request in scene.workload.requests:
        room -= (len(request.prefill) + len(request.decode)) * per_token
        if room < 0 and count:
            break
        count += 1
    if count == len(scene.workload.requests):
        return scene
    sample = object.__new__(Scene)
    sample.__dict__.update(scene.__dict__, workload=first(scene.workload, count))
    return sample


def on_sample(
    trace: Trace, system: System, question: Question, beliefs: tuple[Beliefs, ...], advance: Callable[[], None]
) -> list[dict[str, Any]]:
    """Metrics, and `critical_path`, of the leading requests anchors are measured on, as `predict_band` orders them;
    empty where memory is too small. `advance` is called after each."""
    scene = _sample(Scene(trace, question).under(system))
    ledger = scene.ledger(system)
    if not _runs(system, ledger):
        return []
    found = []
    for outcome in _banded(scene, system, ledger, beliefs):
        own = {"requests": len(scene.workload.requests), "critical_path": _limits(outcome)["critical_path"]}
        found.append(_numbers(outcome) | own)
        advance()
    return found


def anchor(scene: Scene, name: str, native: bool = False) -> dict[str, Any]:
    """What the system `name` makes of the scene as it comes; all experts resident also where they do not fit.

    native: in an engine that is a compiled program, as that of the system it is an anchor for.
    """
    scene = scene.untransformed().unrolled()
    system = replace(load_system(name), native=native)
    try:
        ledger = scene.ledger(system)
        fits = ledger.verdict != "OOM"
        if not fits and system.all_resident:
            ledger = scene.wanted(system)  # as if the memory were there for the KV caches too
        elif not _runs(system, ledger):
            return {"error": f"{ledger.verdict}: {ledger.reason}"}
        return _brief(_numbers(_simulate(scene, system, ledger))) | {"fits": fits}
    except (MemoryBudgetError, PolicyError) as error:
        return {"error": str(error)}


def _runs(system: System, ledger: Ledger) -> bool:
    """Whether a plan has room to make progress: one slot per layer, or one for all layers together."""
    per_layer = system.cache and system.misses.keep and system.eviction.scope == "layer"
    return ledger.verdict != "OOM" and not (ledger.verdict == "CACHE_DISABLED" and per_layer)


def _brief(numbers: dict[str, Any]) -> dict[str, Any]:
    names = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms", "hit_rate", "h2d_bytes_per_token")
    return {name: numbers[name] for name in names}
