"""What to run a model on and how: a small space searched whole, but for what provably cannot win."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from moesim.engine.simulate import ceiling
from moesim.errors import MoesimError, WorkloadError, nearest
from moesim.machine import Machine
from moesim.metrics import latency_metrics, throughput_metrics
from moesim.model import Model
from moesim.policies import FCFS
from moesim.published import band
from moesim.question import ANCHORS, Question, Scene, anchor, predict_band, run
from moesim.systems import System, load_system
from moesim.trace import Trace
from moesim.trace.assumed import distinct_routing, local_routing

# Systems that leave the model's outputs as they are and whose code is public. As many experts on the GPU as fit.
POLICIES = ("all-resident", "llama.cpp", "KTransformers", "KTransformers(gpu_experts=1024)", "LRU", "Fiddler")
OBJECTIVES = {"throughput": True, "latency": False, "cost": False}  # whether more is better
ATTAINED = 0.9  # share of requests that must keep the SLOs


@dataclass(frozen=True)
class Choice:
    """One way to serve the model."""

    machine: Machine
    bits: float  # per weight, of experts and of the rest
    policy: str
    concurrency: int


@dataclass(frozen=True)
class Asked:
    """What is planned for: equally long requests, promises, and what to make best."""

    prompt: int
    output: int
    goodput: tuple[tuple[str, float], ...] = ()
    objective: str = "throughput"
    usd_per_hour: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise WorkloadError(
                f"--objective: unknown objective '{self.objective}'{nearest(self.objective, OBJECTIVES)}"
            )
        if min(self.prompt, self.output) < 1:
            raise WorkloadError(f"{self.prompt} prompt and {self.output} output tokens: plan for at least one of each")


def plan(
    model: Model,
    choices: Sequence[Choice],
    asked: Asked,
    prune: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`candidates` (simulated, best first), `best`, `pareto` and `excluded` with reasons.

    Those that may be fastest are simulated first. One is left out where even its own batches with all experts resident,
    at nominal bandwidth and peak rates and with no overheads, are beaten by one already found in throughput, TPOT and
    price: then neither the best nor the Pareto front can have it. `prune=False` simulates them all.
    """
    choices = _different(model, choices)
    traces: dict[tuple[bool, int], Trace] = {}
    found: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    for bound, choice, out in _by_promise(model, choices, asked, traces):
        row, reason = None, out
        if reason is None and prune:
            reason = _beaten(bound, choice, found)
        if reason is None:
            row, reason = _simulated(model, choice, asked, traces)
        if row is not None:
            found.append(row)
        else:
            excluded.append(_named(choice) | {"reason": reason})
        advance()
    found.sort(key=lambda row: _rank(row, asked))
    best = found[0] if found and found[0]["keeps_slos"] else None
    front = _pareto(found)
    second = next((row for row in found if best and row["keeps_slos"] and _rank(row, asked) > _rank(best, asked)), None)
    choice_of = {tuple(_named(choice).values()): choice for choice in choices}
    ends: dict[int, list[dict[str, Any]]] = {}
    for row in [*front, *(row for row in (best, second) if row is not None and row not in front)]:
        choice = choice_of[tuple(_name_of(row).values())]
        ends[id(row)] = _sure(row, model, choice, asked, traces)
    if best is not None:
        best |= _explained(model, choice_of[tuple(_name_of(best).values())], asked, traces)
        best["ahead"] = second and _ahead(best, second, ends, asked)
    return {
        "model": model.name,
        "objective": asked.objective,
        "workload": {"prompt": asked.prompt, "output": asked.output, "routing": "synthetic: drawn, not recorded"},
        "slos_ms": dict(asked.goodput),
        "best": best,
        "candidates": found,
        "pareto": [_name_of(row) for row in front],
        "excluded": excluded,
    }


def space(
    machines: Sequence[Machine], bits: Sequence[float], policies: Sequence[str], concurrency: Sequence[int]
) -> list[Choice]:
    return [Choice(*values) for values in product(machines, bits, policies, concurrency)]


def _price(machine: Machine) -> float | None:
    """$ per hour of all its GPUs."""
    known = machine.prices.known
    return None if known is None else known * machine.gpus


def _different(model: Model, choices: Sequence[Choice]) -> list[Choice]:
    """Once each: more bits than the model is published with are those it is published with."""
    native = round(model.expert_bits, 2)
    return list(dict.fromkeys(replace(choice, bits=min(choice.bits, native)) for choice in choices))


def _named(choice: Choice) -> dict[str, Any]:
    return {
        "machine": choice.machine.name,
        "bits": choice.bits,
        "policy": choice.policy,
        "concurrency": choice.concurrency,
    }


def _name_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("machine", "bits", "policy", "concurrency")}


def _trace(model: Model, choice: Choice, asked: Asked, traces: dict[tuple[bool, int], Trace]) -> Trace:
    """Requests for two rounds, so that they overlap as they end; drawn once."""
    system = load_system(choice.policy)
    cached = system.cache and not system.all_resident and system.misses.keep
    key = cached, choice.concurrency
    if key not in traces:
        make = local_routing if cached else distinct_routing
        traces[key] = make(model, 2 * choice.concurrency, asked.prompt, asked.output - 1, asked.seed)
    return traces[key]


def _question(choice: Choice, asked: Asked) -> Question:
    return Question(machine=choice.machine, max_concurrency=choice.concurrency, goodput=asked.goodput, seed=asked.seed)


def _stored(model: Model, choice: Choice) -> Model:
    if choice.bits >= round(model.expert_bits, 2):
        return model
    return model.with_precision(expert_bits=choice.bits, weight_bits=choice.bits)


@dataclass(frozen=True)
class Bound:
    """What physics allows at most: tokens per second, and at least: ms per output token."""

    throughput: float
    tpot_ms: float


NOTHING, ANYTHING = Bound(0.0, math.inf), Bound(math.inf, 0.0)


def _by_promise(
    model: Model, choices: Sequence[Choice], asked: Asked, traces: dict[tuple[bool, int], Trace]
) -> Iterator[tuple[Bound, Choice, str | None]]:
    """(bound, choice, why it is out already), the most promising first."""
    bounds: dict[tuple[Any, ...], Bound] = {}
    rows: list[tuple[Bound, int, Choice, str | None]] = []
    for i, choice in enumerate(choices):
        price = _price(choice.machine)
        if asked.usd_per_hour is not None and (price is None or price > asked.usd_per_hour):
            dear = "no price is known" if price is None else f"${price:g} per hour is over the budget"
            rows.append((NOTHING, i, choice, dear))
            continue
        bound, refused = _bound(model, choice, asked, traces, bounds)
        rows.append((bound, i, choice, refused))
    for bound, _, choice, reason in sorted(rows, key=lambda row: (-row[0].throughput, row[1])):
        yield bound, choice, reason


def _bound(
    model: Model, choice: Choice, asked: Asked, traces: dict[tuple[bool, int], Trace], known: dict[Any, Bound]
) -> tuple[Bound, str | None]:
    """The ceiling of the very batches that `choice` serves, or why it serves none.

    All requests are there from the beginning and are admitted as earlier ones leave, so which tokens a step holds
    depends on the KV memory alone, not on how long steps take; no step is quicker than its ceiling.
    """
    trace, system = _trace(model, choice, asked, traces), load_system(choice.policy)
    if not isinstance(system.scheduling, FCFS) or system.transforms or system.misses.changes_outputs:
        return ANYTHING, None  # its steps hold other tokens, or less work
    try:
        scene = Scene(trace, replace(_question(choice, asked), model=_stored(model, choice)))
        ledger = scene.ledger(system)
        if ledger.verdict == "OOM":
            return NOTHING, f"OOM: {ledger.reason}"
        setting = scene.setting(system, ledger)
        own = setting.limits.sequences, min(setting.limits.kv_bytes, 2 * choice.concurrency * _kv_bytes(scene))
        key = choice.machine.name, choice.bits, choice.concurrency, id(trace), own
        if key not in known:
            records = ceiling(setting, bounded=True)
            tpot = latency_metrics(records)["mean_tpot_ms"]
            known[key] = Bound(throughput_metrics(records)["output_throughput"], tpot or 0.0)
        return known[key], None
    except MoesimError as error:
        return NOTHING, str(error)


def _kv_bytes(scene: Scene) -> int:
    return max(scene.model.kv_bytes(r.prompt_tokens + len(r.decode)) for r in scene.workload.requests)


def _beaten(bound: Bound, choice: Choice, found: Sequence[dict[str, Any]]) -> str | None:
    """Which row with the SLOs kept is better than `choice` can be in every respect, if one is."""
    price = _price(choice.machine) or 0.0
    for row in found:
        tpot = row["mean_tpot_ms"] or 0.0
        worse = row["output_throughput"] > bound.throughput and tpot <= bound.tpot_ms
        if row["keeps_slos"] and worse and (row["usd_per_hour"] or 0.0) <= price:
            return (
                f"cannot win: {bound.throughput:.4g} tok/s and {bound.tpot_ms:.3g} ms a token at its physical ceiling, "
                f"and {row['policy']} on {row['machine']} is better and costs no more"
            )
    return None


def _simulated(
    model: Model, choice: Choice, asked: Asked, traces: dict[tuple[bool, int], Trace]
) -> tuple[dict[str, Any] | None, str | None]:
    question = replace(_question(choice, asked), model=_stored(model, choice))
    try:
        summary = run(_trace(model, choice, asked, traces), choice.policy, question, anchors=False, shown=False).summary
    except MoesimError as error:
        return None, str(error)
    m = summary["metrics"]
    if not m or summary["status"] == "OOM":
        return None, f"{summary['status']}: {summary['status_reason']}"
    price = _price(choice.machine)
    row = _named(choice) | {
        "status": summary["status"],
        "output_throughput": m["output_throughput"],
        "mean_ttft_ms": m["mean_ttft_ms"],
        "mean_tpot_ms": m["mean_tpot_ms"],
        "usd_per_hour": price,
        "usd_per_million_output_tokens": price and price / m["output_throughput"] / 3600 * 1e6,
        "limited_by": summary["bottleneck"]["explanation"],
        "costs": summary["inputs"]["costs"],
        "keeps_slos": m.get("slo_attainment", 1.0) >= ATTAINED,
        "slo_attainment": m.get("slo_attainment"),
    }
    if asked.objective == "cost" and price is None:
        return None, "no price is known"
    return row, None


def _rank(row: dict[str, Any], asked: Asked) -> tuple[bool, float]:
    value = {
        "throughput": -row["output_throughput"],
        "latency": row["mean_tpot_ms"],
        "cost": row["usd_per_million_output_tokens"],
    }[asked.objective]
    return not row["keeps_slos"], value


def _pareto(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in throughput, TPOT and price at once."""

    def worth(row: dict[str, Any]) -> tuple[float, float, float]:
        return row["output_throughput"], -row["mean_tpot_ms"], -(row["usd_per_hour"] or 0.0)

    def beaten(row: dict[str, Any]) -> bool:
        mine = worth(row)
        return any(worth(o) != mine and all(a >= b for a, b in zip(worth(o), mine, strict=True)) for o in rows)

    return [row for row in rows if not beaten(row)]


def _sure(
    row: dict[str, Any], model: Model, choice: Choice, asked: Asked, traces: dict[tuple[bool, int], Trace]
) -> list[dict[str, Any]]:
    """Add P10 to P90 of throughput and the flags; the metrics with each resource's costs slow and fast."""
    question = replace(_question(choice, asked), model=_stored(model, choice))
    trace = _trace(model, choice, asked, traces)
    _, numbers, _ = predict_band(trace, choice.policy, question)
    value, *moved = (n["output_throughput"] for n in numbers)
    row |= {"p10_p90": band(value, moved), "flags": _flags(model, choice, question, trace)}
    return numbers[1:]


def _ahead(
    best: dict[str, Any], second: dict[str, Any], ends: dict[int, list[dict[str, Any]]], asked: Asked
) -> dict[str, Any]:
    """How many times better the best is than the next that keeps the SLOs, and whether costs may turn that round.

    On one machine the same costs move for both, so that what they have in common cancels; the errors of different
    machines are independent.
    """
    metric = "mean_tpot_ms" if asked.objective == "latency" else "output_throughput"
    sign = -1 if asked.objective == "latency" else 1
    mine, theirs = ([(end[metric] / row[metric]) ** sign for end in ends[id(row)]] for row in (best, second))
    ratio = (best[metric] / second[metric]) ** sign
    if asked.objective == "cost":
        ratio = second["usd_per_million_output_tokens"] / best["usd_per_million_output_tokens"]
    together = best["machine"] == second["machine"]
    moved = [a / b for a, b in zip(mine, theirs, strict=True)] if together else mine + [1 / b for b in theirs]
    low, high = band(ratio, [ratio * m for m in moved])
    return {"of": _name_of(second), "ratio": ratio, "p10_p90": (low, high), "sure": low > 1}


def _explained(model: Model, choice: Choice, asked: Asked, traces: dict[tuple[bool, int], Trace]) -> dict[str, Any]:
    """The anchors, the ceiling and the memory of the best, on all the requests it was planned with."""
    question = replace(_question(choice, asked), model=_stored(model, choice))
    trace, system = _trace(model, choice, asked, traces), load_system(choice.policy)
    scene = Scene(trace, question)
    ledger, under = scene.ledger(system), scene.under(system)
    top = throughput_metrics(ceiling(under.setting(system, ledger)))["output_throughput"]
    return {
        "anchors": {name: anchor(scene, policy) for name, policy in ANCHORS.items()},
        "ceiling": top,
        "memory": ledger.to_dict(),
        "notes": run(trace, choice.policy, question, anchors=False, shown=False).summary["notes"],
    }


def _flags(model: Model, choice: Choice, question: Question, trace: Trace) -> dict[str, str]:
    """Lines to start an engine with, untested; none where no released engine does this."""
    context = int(trace.requests.prompt_tokens.max()) + trace.tokens // len(trace.requests)
    quantised, system = choice.bits < round(model.expert_bits, 2), load_system(choice.policy)
    several = f" --tensor-parallel-size {choice.machine.gpus}" if choice.machine.gpus > 1 else ""
    if system.name == "llama.cpp" or (system.all_resident and quantised and not several):
        on_cpu = [i for i, kept in enumerate(_kept(load_system("llama.cpp"), question, trace)) if not kept]
        tail = f"-np {choice.concurrency} -c {context * choice.concurrency}   # untested"
        blocks = "|".join(str(model.moe_layers[i]) for i in on_cpu)
        override = f' -ot "blk\\.({blocks})\\.ffn_.*_exps=CPU" -rtr' if on_cpu else ""
        return {
            "llama.cpp": f"llama-server -m MODEL.gguf -ngl 99 --n-cpu-moe {len(on_cpu)} {tail}",
            "ik_llama.cpp": f"llama-server -m MODEL.gguf -ngl 99{override} -fmoe {tail}",
        }
    if system.name == "KTransformers":
        kept = min(_kept(system, question, trace)) if system.cache else 0
        line = f"python -m sglang.launch_server --model {model.name} --kt-num-gpu-experts {kept}"
        return {"KTransformers": f"{line} --kt-cpuinfer {choice.machine.host.cores}   # untested"}
    if system.all_resident:
        line = f"vllm serve {model.name}{several} --max-num-seqs {choice.concurrency} --max-model-len {context}"
        return {"vLLM": f"{line}   # untested"}
    return {}


def _kept(system: System, question: Question, trace: Trace) -> list[int]:
    """Experts of each layer that `system` keeps on the GPU."""
    scene = Scene(trace, question)
    sizes = [scene.model.expert_bytes(layer) for layer in range(trace.layers)]
    split = system.capacity.split(scene.ledger(system).expert_bytes, sizes, scene.model.experts)
    return [held // size for held, size in zip(split, sizes, strict=True)]
