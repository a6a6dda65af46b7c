"""What to run a model on and how: a small space searched whole, but for what provably cannot win."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from moesim.engine.simulate import ceiling
from moesim.errors import MoesimError, WorkloadError, nearest
from moesim.machine import Machine
from moesim.metrics import latency_metrics, throughput_metrics
from moesim.model import Model
from moesim.model_error import ModelError, band, basis_of, model_error
from moesim.plan.flags import as_it_fits, flags
from moesim.policies import FCFS
from moesim.question import ANCHORS, Question, Scene, anchor, predict_band, run
from moesim.systems import System, load_system
from moesim.trace import Trace
from moesim.trace.assumed import local_routing, pool_routing

# Systems that leave the model's outputs as they are and that engines anyone can download serve with (plan/flags.py);
# KTransformers with no expert on the GPU, and with as many as fit.
POLICIES = ("all-resident", "llama.cpp", "KTransformers", "KTransformers(gpu_experts=1024)")
OBJECTIVES = {"throughput": "output_throughput", "latency": "mean_tpot_ms", "cost": "usd_per_million_output_tokens"}
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
    """What is planned for: equally long requests or those of a file, promises, and what to make best."""

    prompt: int = 512
    output: int = 64
    goodput: tuple[tuple[str, float], ...] = ()
    objective: str = "throughput"
    usd_per_hour: float | None = None
    seed: int = 0
    workload: Path | None = None
    num_prompts: int | None = None  # of the file's

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise WorkloadError(
                f"--objective: unknown objective '{self.objective}'{nearest(self.objective, OBJECTIVES)}"
            )
        if min(self.prompt, self.output) < 1:
            raise WorkloadError(f"{self.prompt} prompt and {self.output} output tokens: plan for at least one of each")


class _Asking:
    """The questions that choices are asked; all of the same concurrency get the same requests and routing."""

    def __init__(self, model: Model, asked: Asked) -> None:
        self.model, self.asked = model, asked
        self._traces: dict[int, Trace] = {}

    def trace(self, choice: Choice) -> Trace:
        """Requests for two rounds, so that they overlap as they end; for a file, what its requests are joined from."""
        asked, key = self.asked, 0 if self.asked.workload else choice.concurrency
        if key not in self._traces:
            self._traces[key] = (
                pool_routing(self.model, asked.seed) if asked.workload
                else local_routing(self.model, 2 * key, asked.prompt, asked.output - 1, asked.seed)
            )  # fmt: skip
        return self._traces[key]

    def question(self, choice: Choice) -> Question:
        asked, model = self.asked, self.model
        if not self.as_published(choice):
            model = model.with_precision(expert_bits=choice.bits, weight_bits=choice.bits)
        return Question(
            model=model,
            machine=choice.machine,
            max_concurrency=choice.concurrency,
            goodput=asked.goodput,
            seed=asked.seed,
            workload=asked.workload,
            num_prompts=asked.num_prompts,
        )

    def as_published(self, choice: Choice) -> bool:
        return choice.bits >= round(self.model.expert_bits, 2)

    def scene(self, choice: Choice) -> Scene:
        return Scene(self.trace(choice), self.question(choice))


def plan(
    model: Model,
    choices: Sequence[Choice],
    asked: Asked,
    prune: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`candidates` (simulated, best first), `best`, `pareto` and `excluded` with reasons.

    Those that may be fastest are simulated first. One is left out where what physics allows it at most is beaten in
    throughput, TPOT and price by one already found: then neither the best nor the Pareto front can have it.
    `prune=False` simulates them all.
    """
    asking = _Asking(model, asked)
    choice_of: dict[tuple[Any, ...], Choice] = {}
    found: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    for bound, choice, out in _by_promise(asking, _different(asking, choices)):
        choice_of[tuple(_named(choice).values())] = choice
        row, reason = None, out
        if reason is None and prune:
            reason = _cannot_win(bound, choice, found)
        if reason is None:
            row, reason = _simulated(asking, choice)
        if row is not None:
            found.append(row)
        else:
            excluded.append(_named(choice) | {"reason": reason})
        advance()
    found.sort(key=lambda row: _rank(row, asked))
    front = _pareto(found)
    best = found[0] if found and found[0]["keeps_slos"] else None
    second = next(
        (row for row in found if best and row["keeps_slos"] and _value(row, asked) != _value(best, asked)), None
    )
    sure = {}
    for row in [*front, *(row for row in (best, second) if row is not None and row not in front)]:
        sure[id(row)] = _sure(row, asking, choice_of[tuple(_name_of(row).values())])
    if best is not None:
        best |= _explained(asking, choice_of[tuple(_name_of(best).values())])
        best["difference"] = second and _difference(best, second, sure, asked)
    return {
        "model": model.name,
        "objective": asked.objective,
        "workload": _workload(asking),
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


def _workload(asking: _Asking) -> dict[str, Any]:
    asked = asking.asked
    drawn = {"routing": "synthetic: drawn, not recorded"}
    if asked.workload:
        return {"file": str(asked.workload), "num_prompts": asked.num_prompts} | drawn
    return {"prompt": asked.prompt, "output": asked.output} | drawn


def _price(machine: Machine) -> float | None:
    """$ per hour of all its GPUs."""
    known = machine.prices.known
    return None if known is None else known * machine.gpus


def _different(asking: _Asking, choices: Sequence[Choice]) -> list[Choice]:
    """Once each: more bits than the model is published with are those, and engines have the flags that fit."""
    native = round(asking.model.expert_bits, 2)
    return list(dict.fromkeys(_settled(asking, replace(choice, bits=min(choice.bits, native))) for choice in choices))


def _settled(asking: _Asking, choice: Choice) -> Choice:
    try:
        policy = as_it_fits(choice.policy, load_system(choice.policy), asking.scene(choice))
    except MoesimError:  # said again, as a reason, when it is asked for its bound
        return choice
    return replace(choice, policy=policy)


def _named(choice: Choice) -> dict[str, Any]:
    return {
        "machine": choice.machine.name,
        "bits": choice.bits,
        "policy": choice.policy,
        "concurrency": choice.concurrency,
    }


def _name_of(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("machine", "bits", "policy", "concurrency")}


# -- what cannot win ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """What physics allows at most: tokens per second, and at least: ms per output token."""

    throughput: float
    tpot_ms: float


NOTHING, ANYTHING = Bound(0.0, math.inf), Bound(math.inf, 0.0)


def _by_promise(asking: _Asking, choices: Sequence[Choice]) -> Iterator[tuple[Bound, Choice, str | None]]:
    """(bound, choice, why it is out already), the most promising first."""
    bounds: dict[tuple[Any, ...], Bound] = {}
    rows: list[tuple[Bound, int, Choice, str | None]] = []
    for i, choice in enumerate(choices):
        reason = _too_dear(choice, asking.asked)
        bound = NOTHING
        if reason is None:
            bound, reason = _bound(asking, choice, bounds)
        rows.append((bound, i, choice, reason))
    for bound, _, choice, reason in sorted(rows, key=lambda row: (-row[0].throughput, row[1])):
        yield bound, choice, reason


def _too_dear(choice: Choice, asked: Asked) -> str | None:
    price, most = _price(choice.machine), asked.usd_per_hour
    if price is None and (most is not None or asked.objective == "cost"):
        return "no price is known"
    if price is not None and most is not None and price > most:
        return f"${price:g} per hour is over the budget"
    return None


def _bound(asking: _Asking, choice: Choice, known: dict[tuple[Any, ...], Bound]) -> tuple[Bound, str | None]:
    """The ceiling of the very batches that `choice` serves, or why it serves none.

    Where all requests are there from the beginning and are admitted as earlier ones leave, which tokens a step holds
    depends on the KV memory alone, not on how long steps take; and no step is quicker than its ceiling.
    """
    try:
        system, scene = load_system(choice.policy), asking.scene(choice)
        ledger = scene.ledger(system)
        if ledger.verdict == "OOM":
            return NOTHING, f"OOM: {ledger.reason}"
        if not _has_bound(system, scene):
            return ANYTHING, None
        setting = scene.setting(system, ledger)
        requests = scene.workload.requests
        most_kv = len(requests) * max(scene.model.kv_bytes(r.prompt_tokens + len(r.decode)) for r in requests)
        limits, hosted = setting.limits, system.misses.may_host
        own = limits.sequences, limits.batch_tokens, min(limits.kv_bytes, most_kv), hosted, system.expert_bits
        key = choice.machine, choice.bits, choice.concurrency, *own
        if key not in known:
            records = ceiling(setting, bounded=True, hosted=hosted)
            tpot = latency_metrics(records)["mean_tpot_ms"]
            known[key] = Bound(throughput_metrics(records)["output_throughput"], tpot or 0.0)
        return known[key], None
    except MoesimError as error:
        return NOTHING, str(error)


def _has_bound(system: System, scene: Scene) -> bool:
    """Not where steps may hold other tokens or less work than the trace says, nor where costs are measured curves,
    which small kernels that live in the GPU's own cache may bring below nominal bandwidth."""
    same_work = not system.transforms and not system.misses.changes_outputs and system.kernel == "grouped"
    same_batches = isinstance(system.scheduling, FCFS) and not any(r.arrival_ns for r in scene.workload.requests)
    return same_work and same_batches and not scene.machine.profile


def _no_dearer(row: dict[str, Any], machine: str, price: float | None) -> bool:
    """An unknown price is only known to equal that of the same machine."""
    mine = row["usd_per_hour"]
    return row["machine"] == machine or (mine is not None and price is not None and mine <= price)


def _cannot_win(bound: Bound, choice: Choice, found: Sequence[dict[str, Any]]) -> str | None:
    """Which row with the SLOs kept is at least as good as `choice` can be in every respect, and better in one."""
    for row in found:
        throughput, tpot = row["output_throughput"], row["mean_tpot_ms"] or 0.0
        as_good = throughput >= bound.throughput and tpot <= bound.tpot_ms
        better = throughput > bound.throughput or tpot < bound.tpot_ms
        if row["keeps_slos"] and as_good and better and _no_dearer(row, choice.machine.name, _price(choice.machine)):
            return (
                f"cannot win: {bound.throughput:.4g} tok/s and {bound.tpot_ms:.3g} ms a token at its physical ceiling, "
                f"and {row['policy']} on {row['machine']} at {row['bits']:g} bits is better and costs no more"
            )
    return None


def _pareto(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in throughput, TPOT and price at once; of those that keep the SLOs, if any do."""
    rows = [row for row in rows if row["keeps_slos"]] or list(rows)
    return [row for row in rows if not any(_beats(other, row) for other in rows)]


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if not _no_dearer(one, other["machine"], other["usd_per_hour"]):
        return False
    throughput = one["output_throughput"] - other["output_throughput"]
    tpot = (one["mean_tpot_ms"] or 0.0) - (other["mean_tpot_ms"] or 0.0)
    cheaper = one["usd_per_hour"] != other["usd_per_hour"]
    return throughput >= 0 >= tpot and (throughput > 0 or tpot < 0 or cheaper)


# -- what is simulated --------------------------------------------------------------------------------------------


def _simulated(asking: _Asking, choice: Choice) -> tuple[dict[str, Any] | None, str | None]:
    try:
        question = asking.question(choice)
        summary = run(asking.trace(choice), choice.policy, question, anchors=False, shown=False).summary
    except MoesimError as error:
        return None, str(error)
    m = summary["metrics"]
    if not m or summary["status"] == "OOM":
        return None, f"{summary['status']}: {summary['status_reason']}"
    price = _price(choice.machine)
    return _named(choice) | {
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
    }, None


def _value(row: dict[str, Any], asked: Asked) -> float:
    """What the objective goes by, less being better."""
    value = float(row[OBJECTIVES[asked.objective]] or 0.0)
    return -value if asked.objective == "throughput" else value


def _rank(row: dict[str, Any], asked: Asked) -> tuple[float, ...]:
    """By the objective; equal ones by the other respects, so that no row comes before one that beats it."""
    price = math.inf if row["usd_per_hour"] is None else row["usd_per_hour"]
    others = -row["output_throughput"], row["mean_tpot_ms"] or 0.0, price
    return not row["keeps_slos"], _value(row, asked), *others


# -- how sure, and why --------------------------------------------------------------------------------------------


def _sure(row: dict[str, Any], asking: _Asking, choice: Choice) -> tuple[list[dict[str, Any]], ModelError]:
    """Add P10 to P90 and the flags; return the metrics at each end of the costs' bands, and the model's error."""
    system = load_system(choice.policy)
    error = model_error(basis_of(asking.scene(choice).machine, system))
    _, (middle, *ends), _ = predict_band(asking.trace(choice), system, asking.question(choice))
    row["p10_p90"] = band(middle["output_throughput"], [end["output_throughput"] for end in ends], error)
    tpot = middle["mean_tpot_ms"]
    row["tpot_p10_p90_ms"] = tpot and band(tpot, [end["mean_tpot_ms"] for end in ends], error)
    row["flags"] = flags(system, asking.scene(choice), choice.bits, asking.as_published(choice))
    return ends, error


def _difference(
    best: dict[str, Any],
    second: dict[str, Any],
    sure: dict[int, tuple[list[dict[str, Any]], ModelError]],
    asked: Asked,
) -> dict[str, Any]:
    """How much better the best is than the next in the objective, relative, and whether that exceeds what is unsure.

    On one machine the same costs move for both, and the model errs alike, so that what they have in common cancels; the
    errors of different machines are taken to be independent.
    """
    metric, sign = ("mean_tpot_ms", -1) if asked.objective == "latency" else ("output_throughput", 1)
    mine, theirs = ([(end[metric] / row[metric]) ** sign for end in sure[id(row)][0]] for row in (best, second))
    ratio = _value(second, asked) / _value(best, asked)
    if asked.objective == "throughput":
        ratio = 1 / ratio
    together = best["machine"] == second["machine"]
    moved = [a / b for a, b in zip(mine, theirs, strict=True)] if together else mine + [1 / b for b in theirs]
    own = 0.0 if together else math.hypot(sure[id(best)][1].own, sure[id(second)][1].own)
    low, high = band(ratio, [ratio * m for m in moved], ModelError(sure[id(best)][1].costs, own))
    return {"of": _name_of(second), "value": ratio - 1, "p10": low - 1, "p90": high - 1, "exceeds": low > 1}


def _explained(asking: _Asking, choice: Choice) -> dict[str, Any]:
    """The anchors, the ceiling and the memory of the best, on all the requests it was planned with."""
    scene, system = asking.scene(choice), load_system(choice.policy)
    ledger, under = scene.ledger(system), scene.under(system)
    top = ceiling(under.setting(system, ledger), hosted=system.misses.may_host)
    return {
        "anchors": {name: anchor(scene, policy) for name, policy in ANCHORS.items()},
        "ceiling": throughput_metrics(top)["output_throughput"],
        "memory": ledger.to_dict(),
        "notes": run(asking.trace(choice), system, asking.question(choice), anchors=False, shown=False).summary[
            "notes"
        ],
    }
