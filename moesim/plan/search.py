"""What to run a model on and how: a small space searched whole, but for what provably cannot win."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from moesim.errors import MoesimError, WorkloadError, nearest
from moesim.machine import Machine
from moesim.metrics import throughput_metrics
from moesim.model import Model
from moesim.question import Question, Scene, predict_band, run
from moesim.systems import load_system
from moesim.trace import Trace
from moesim.trace.assumed import distinct_routing, local_routing

# Systems that leave the model's outputs as they are and that one can download and run.
POLICIES = ("all-resident", "llama.cpp", "KTransformers", "LRU", "Fiddler")
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

    Those that may be fastest are simulated first. One is left out where even all experts resident, at nominal bandwidth
    and peak rates and with no overheads, would not reach the best found so far; `prune=False` simulates them all.
    """
    choices = _different(model, choices)
    traces: dict[tuple[bool, int], Trace] = {}
    found: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    for bound, choice, out in _by_promise(model, choices, asked, traces):
        reason = out
        if reason is None and prune and found and bound < _best_so_far(found, asked):
            reason = f"cannot win: {bound:.4g} tok/s even at the physical ceiling"
        row = None
        if reason is None:
            row, reason = _simulated(model, choice, asked, traces)
        if row is not None:
            found.append(row)
        else:
            excluded.append(_named(choice) | {"reason": reason})
        advance()
    found.sort(key=lambda row: _rank(row, asked))
    best = found[0] if found and found[0]["keeps_slos"] else None
    if best is not None:
        best |= _explained(model, next(c for c in choices if _named(c) == _name_of(best)), asked, traces)
    return {
        "model": model.name,
        "objective": asked.objective,
        "workload": {"prompt": asked.prompt, "output": asked.output, "routing": "synthetic: drawn, not recorded"},
        "slos_ms": dict(asked.goodput),
        "best": best,
        "candidates": found,
        "pareto": [_name_of(row) for row in _pareto(found)],
        "excluded": excluded,
    }


def space(
    machines: Sequence[Machine], bits: Sequence[float], policies: Sequence[str], concurrency: Sequence[int]
) -> list[Choice]:
    return [Choice(*values) for values in product(machines, bits, policies, concurrency)]


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


def _by_promise(
    model: Model, choices: Sequence[Choice], asked: Asked, traces: dict[tuple[bool, int], Trace]
) -> Iterator[tuple[float, Choice, str | None]]:
    """(most tokens per second that physics allows, choice, why it is out already), best first."""
    bounds: dict[tuple[str, float, int], float] = {}
    rows: list[tuple[float, int, Choice, str | None]] = []
    for i, choice in enumerate(choices):
        price = choice.machine.prices.known
        if asked.usd_per_hour is not None and (price is None or price * choice.machine.gpus > asked.usd_per_hour):
            rows.append(
                (
                    0.0,
                    i,
                    choice,
                    "no price is known" if price is None else f"${price:g} per GPU-hour is over the budget",
                )
            )
            continue
        key = choice.machine.name, choice.bits, choice.concurrency
        if key not in bounds:
            resident = replace(choice, policy="all-resident")
            question = replace(_question(choice, asked), model=_stored(model, choice))
            scene = Scene(_trace(model, resident, asked, traces), question)
            bounds[key] = _ceiling(scene)
        rows.append((bounds[key], i, choice, None))
    for bound, _, choice, reason in sorted(rows, key=lambda row: (-row[0], row[1])):
        yield bound, choice, reason


def _ceiling(scene: Scene) -> float:
    from moesim.engine.simulate import ceiling

    system = load_system("all-resident")
    return float(throughput_metrics(ceiling(scene.setting(system, scene.ledger(system))))["output_throughput"])


def _best_so_far(found: Sequence[dict[str, Any]], asked: Asked) -> float:
    """Throughput below which nothing can win any more; latency and cost are not bounded by it."""
    if asked.objective != "throughput":
        return 0.0
    return max((row["output_throughput"] for row in found if row["keeps_slos"]), default=0.0)


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
    price = choice.machine.prices.known
    row = _named(choice) | {
        "status": summary["status"],
        "output_throughput": m["output_throughput"],
        "mean_ttft_ms": m["mean_ttft_ms"],
        "mean_tpot_ms": m["mean_tpot_ms"],
        "usd_per_hour": price,
        "usd_per_million_output_tokens": price and price * choice.machine.gpus / m["output_throughput"] / 3600 * 1e6,
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


def _explained(model: Model, choice: Choice, asked: Asked, traces: dict[tuple[bool, int], Trace]) -> dict[str, Any]:
    """P10 to P90, the anchors and the flags of the best."""
    question = replace(_question(choice, asked), model=_stored(model, choice))
    trace = _trace(model, choice, asked, traces)
    _, numbers, _ = predict_band(trace, choice.policy, question)
    from moesim.published import band

    value, *ends = (n["output_throughput"] for n in numbers)
    anchored = run(trace, choice.policy, question, anchors=True, shown=False).summary
    return {
        "p10_p90": band(value, ends),
        "anchors": {name: anchored["anchors"][name] for name in ("all_resident", "no_cache", "lru", "oracle")},
        "ceiling": anchored["ceiling"]["output_throughput"],
        "memory": anchored["memory"],
        "flags": _flags(model, choice, question, trace),
        "notes": anchored["notes"],
    }


def _flags(model: Model, choice: Choice, question: Question, trace: Trace) -> str:
    """A line to start from, untested."""
    context = int(trace.requests.prompt_tokens.max()) + trace.tokens // len(trace.requests)
    quantised = choice.bits < round(model.expert_bits, 2)
    if choice.policy == "llama.cpp" or (choice.policy == "all-resident" and quantised):
        system = load_system("llama.cpp")
        scene = Scene(trace, question)
        sizes = [scene.model.expert_bytes(layer) for layer in scene.model.moe_layers]
        kept = system.capacity.split(scene.ledger(system).expert_bytes, sizes, model.experts)
        return (
            f"llama-server -m MODEL.gguf -ngl 99 --n-cpu-moe {sum(not size for size in kept)} "
            f"-np {choice.concurrency} -c {context * choice.concurrency}   # untested"
        )
    if choice.policy == "KTransformers":
        return f"python -m sglang.launch_server --model {model.name} --kt-num-gpu-experts 0   # untested"
    if choice.policy == "all-resident":
        return f"vllm serve {model.name} --max-num-seqs {choice.concurrency} --max-model-len {context}   # untested"
    return "no engine with these policies is known to be released"
