"""What to run a model on and how: a small space searched whole, but for what provably cannot win.

Of a large one, and of systems composed anew, what Optuna draws (plan/draw.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from moesim.engine.simulate import ceiling
from moesim.errors import MoesimError, WorkloadError, nearest
from moesim.machine import Machine
from moesim.metrics import latency_metrics, throughput_metrics
from moesim.model import Model
from moesim.model_error import NONE, ModelError, band, basis_of, model_error
from moesim.plan.flags import as_it_fits, flags
from moesim.policies import FCFS
from moesim.question import ANCHORS, Question, Scene, anchor, compose, predict_band, run
from moesim.systems import System, load_system
from moesim.trace import Trace
from moesim.trace.assumed import local_routing, pool_routing

# Systems that leave the model's outputs as they are and that engines anyone can download serve with (plan/flags.py);
# KTransformers with no expert on the GPU, and with as many as fit; EPLB where there are several.
POLICIES = (
    "all-resident", "EPLB", "llama.cpp", "KTransformers(gpu_prefill=True)",
    "KTransformers(gpu_experts=1024, gpu_prefill=True)",
)  # fmt: skip
OBJECTIVES = {"throughput": "output_throughput", "latency": "mean_tpot_ms", "cost": "usd_per_million_output_tokens"}
WORTHWHILE = 1.1  # times the memory for experts from which a division of it is a way of its own
ATTAINED = 0.9  # share of requests that must keep the SLOs
TRIALS = 200  # ways that are looked at one by one; of more, so many are drawn

NAMED = "machine", "bits", "policy", "concurrency", "kv_share", "settings"
Row = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """One way to serve the model.

    kv_share: of the requests at once, for how many GPU memory has room for KV caches while the others wait; cached
    experts get the rest. 1: for all, and what the KV caches do not use is the experts' for as long.
    """

    machine: Machine
    bits: float  # per weight, of experts and of the rest
    policy: str
    concurrency: int
    kv_share: float = 1.0
    settings: tuple[str, ...] = ()  # `part.field=value` of a policy composed anew

    @property
    def system(self) -> System:
        return compose(self.policy, self.settings)


class Space(NamedTuple):
    """What is chosen from; every combination is a choice."""

    machines: Sequence[Machine]
    bits: Sequence[float]
    policies: Sequence[str]
    concurrency: Sequence[int]
    kv_shares: Sequence[float] = (1.0,)

    def choices(self) -> list[Choice]:
        return [Choice(*values) for values in product(*self)]


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
        self._divided: dict[Choice, Question] = {}

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
        if choice.kv_share == 1:
            return self._undivided(choice)
        if choice not in self._divided:
            question = self._undivided(choice)
            ledger = Scene(self.trace(choice), question).beside(choice.system, choice.kv_share)
            self._divided[choice] = replace(question, expert_memory=ledger.expert_bytes if ledger else None)
        return self._divided[choice]

    def _undivided(self, choice: Choice) -> Question:
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


class Search:
    """What is known of choices so far: rows of those simulated, and why others were left out."""

    def __init__(self, asking: _Asking, prune: bool, advance: Callable[[], None]) -> None:
        self.asking, self.prune, self.advance = asking, prune, advance
        self.found: list[Row] = []
        self.excluded: list[Row] = []
        self.choice_of: dict[tuple[Any, ...], Choice] = {}
        self._bounds: dict[tuple[Any, ...], Bound] = {}
        self._known: dict[Choice, Row | None] = {}

    def all_of(self, choices: Sequence[Choice]) -> None:
        """Those that may be fastest first, so that they leave out the others."""
        promises = [(*self.promise(choice), i, choice) for i, choice in enumerate(choices)]
        for bound, out, _, choice in sorted(promises, key=lambda row: (-row[0].throughput, row[2])):
            self._take(choice, bound, out)
            self.advance()

    def one(self, choice: Choice) -> Row | None:
        """The row of `choice`; None where it was left out."""
        choice = _settled(self.asking, choice)
        if choice not in self._known:
            self._take(choice, *self.promise(choice))
        return self._known[choice]

    def remember(self, choice: Choice, row: Row) -> None:
        """What an earlier search found of `choice`."""
        choice = _settled(self.asking, choice)
        if choice not in self._known:
            self._keep(choice, row)

    def promise(self, choice: Choice) -> tuple[Bound, str | None]:
        """What `choice` can be at best, or why it is out already."""
        reason = _too_dear(choice, self.asking.asked)
        return _bound(self.asking, choice, self._bounds) if reason is None else (NOTHING, reason)

    def _take(self, choice: Choice, bound: Bound, reason: str | None) -> None:
        row = None
        if reason is None and self.prune:
            reason = _cannot_win(bound, choice, self.found)
        if reason is None:
            row, reason = _simulated(self.asking, choice)
        if row is not None:
            self._keep(choice, row)
            return
        self._known[choice] = None
        self.excluded.append(_named(choice) | {"reason": reason})

    def _keep(self, choice: Choice, row: Row) -> None:
        self._known[choice] = row
        self.choice_of[tuple(_named(choice).values())] = choice
        self.found.append(row)


def plan(
    model: Model,
    space: Space,
    asked: Asked,
    prune: bool = True,
    advance: Callable[[], None] = lambda: None,
    trials: int = TRIALS,
    composed: Sequence[str] = (),
    study: Path | None = None,
) -> Row:
    """`candidates` (simulated, best first), `best`, `pareto` and `excluded` with reasons.

    Of a space of at most `trials` choices those that may be fastest are simulated first. One is left out where what
    physics allows it at most is beaten in throughput, TPOT and price by one already found: then neither the best nor
    the Pareto front can have it. `prune=False` simulates them all. Of a larger space `trials` are drawn, and as many of
    the systems `composed` anew from the parts of those named; `study` is the file that keeps what was drawn.
    """
    search = Search(_Asking(model, asked), prune, advance)
    if len(choices := _different(search.asking, space.choices())) <= trials:
        search.all_of(choices)
    else:
        _draw(search, space, trials, False, study)
    if composed:
        _draw(search, space._replace(policies=composed), trials, True, study)
    return _answer(search, space.machines)


def _draw(search: Search, space: Space, trials: int, anew: bool, study: Path | None) -> None:
    from moesim.plan.draw import draw

    draw(search, space, trials, anew, study)


def _answer(search: Search, machines: Sequence[Machine]) -> Row:
    asking, asked, found = search.asking, search.asking.asked, search.found
    found.sort(key=lambda row: _rank(row, asked))
    front = _pareto(found)
    best = found[0] if found and found[0]["keeps_slos"] else None
    kept = [row for row in found if row["keeps_slos"]]
    second = next((row for row in kept if best and _value(row, asked) != _value(best, asked)), None)
    # beside the best composed anew the best that is published, or the reverse
    other = next((row for row in kept if best and bool(row["settings"]) != bool(best["settings"])), None)
    sure = {}
    for row in [*front, *(row for row in (best, second, other) if row is not None and row not in front)]:
        sure[id(row)] = _sure(row, asking, search.choice_of[tuple(_name_of(row).values())])
    if best is not None:
        best |= _explained(asking, search.choice_of[tuple(_name_of(best).values())])
        best["difference"] = second and _difference(best, second, sure, asked)
        best["over_published" if best["settings"] else "over_composed"] = other and _difference(
            best, other, sure, asked
        )
    return {
        "model": asking.model.name,
        "machines": {machine.name: {"summary": machine.summary, "notes": machine.notes} for machine in machines},
        "objective": asked.objective,
        "workload": _workload(asking),
        "slos_ms": dict(asked.goodput),
        "best": best,
        "candidates": found,
        "pareto": [_name_of(row) for row in front],
        "excluded": search.excluded,
    }


def _workload(asking: _Asking) -> Row:
    asked = asking.asked
    drawn = {"routing": "synthetic: drawn, not recorded"}
    if asked.workload:
        return {"file": str(asked.workload), "num_prompts": asked.num_prompts} | drawn
    return {"prompt": asked.prompt, "output": asked.output} | drawn


def _different(asking: _Asking, choices: Sequence[Choice]) -> list[Choice]:
    """Once each: more bits than the model is published with are those, and engines have the flags that fit."""
    return list(dict.fromkeys(_settled(asking, choice) for choice in choices))


def _settled(asking: _Asking, choice: Choice) -> Choice:
    choice = replace(choice, bits=min(choice.bits, round(asking.model.expert_bits, 2)))
    try:
        choice = _divided(asking, choice)
        if choice.settings:
            return choice
        policy = as_it_fits(choice.policy, load_system(choice.policy), asking.scene(choice))
    except MoesimError:  # said again, as a reason, when it is asked for its bound
        return choice
    choice = replace(choice, policy=policy)
    return choice if choice.system.cache else replace(choice, kv_share=1.0)


def _divided(asking: _Asking, choice: Choice) -> Choice:
    """The undivided choice where experts gain too little by it, or are not cached at all."""
    if choice.kv_share == 1:
        return choice
    whole = replace(choice, kv_share=1.0)
    scene = asking.scene(whole)
    more = scene.beside(choice.system, choice.kv_share)
    worthwhile = more is not None and more.expert_bytes >= WORTHWHILE * scene.ledger(choice.system).expert_bytes
    return choice if worthwhile else whole


def _named(choice: Choice) -> Row:
    return {
        "machine": choice.machine.name,
        "bits": choice.bits,
        "policy": choice.policy,
        "concurrency": choice.concurrency,
        "kv_share": choice.kv_share,
        "settings": choice.settings,
    }


def _name_of(row: Row) -> Row:
    return {name: row[name] for name in NAMED}


# -- what cannot win ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """What physics allows at most: tokens per second, and at least: ms per output token."""

    throughput: float
    tpot_ms: float


NOTHING, ANYTHING = Bound(0.0, math.inf), Bound(math.inf, 0.0)


def _too_dear(choice: Choice, asked: Asked) -> str | None:
    price, most = choice.machine.usd_per_hour, asked.usd_per_hour
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
        system, scene = choice.system, asking.scene(choice)
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


def _no_dearer(row: Row, machine: str, price: float | None) -> bool:
    """An unknown price is only known to equal that of the same machine."""
    mine = row["usd_per_hour"]
    return row["machine"] == machine or (mine is not None and price is not None and mine <= price)


def _cannot_win(bound: Bound, choice: Choice, found: Sequence[Row]) -> str | None:
    """Which row with the SLOs kept is at least as good as `choice` can be in every respect, and better in one."""
    for row in found:
        throughput, tpot = row["output_throughput"], row["mean_tpot_ms"] or 0.0
        as_good = throughput >= bound.throughput and tpot <= bound.tpot_ms
        better = throughput > bound.throughput or tpot < bound.tpot_ms
        no_dearer = _no_dearer(row, choice.machine.name, choice.machine.usd_per_hour)
        if row["keeps_slos"] and as_good and better and no_dearer:
            return (
                f"cannot win: {bound.throughput:.4g} tok/s and {bound.tpot_ms:.3g} ms a token at its physical ceiling, "
                f"and {row['policy']} on {row['machine']} at {row['bits']:g} bits is better and costs no more"
            )
    return None


def _pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows that no other beats in throughput, TPOT and price at once; of those that keep the SLOs, if any do."""
    rows = [row for row in rows if row["keeps_slos"]] or list(rows)
    return [row for row in rows if not any(_beats(other, row) for other in rows)]


def _beats(one: Row, other: Row) -> bool:
    if not _no_dearer(one, other["machine"], other["usd_per_hour"]):
        return False
    throughput = one["output_throughput"] - other["output_throughput"]
    tpot = (one["mean_tpot_ms"] or 0.0) - (other["mean_tpot_ms"] or 0.0)
    cheaper = one["usd_per_hour"] != other["usd_per_hour"]
    return throughput >= 0 >= tpot and (throughput > 0 or tpot < 0 or cheaper)


# -- what is simulated --------------------------------------------------------------------------------------------


def _simulated(asking: _Asking, choice: Choice) -> tuple[Row | None, str | None]:
    try:
        question = asking.question(choice)
        summary = run(asking.trace(choice), choice.system, question, anchors=False, shown=False).summary
    except MoesimError as error:
        return None, str(error)
    m = summary["metrics"]
    if not m or summary["status"] == "OOM":
        return None, f"{summary['status']}: {summary['status_reason']}"
    return _named(choice) | {
        "status": summary["status"],
        "output_throughput": m["output_throughput"],
        "mean_ttft_ms": m["mean_ttft_ms"],
        "mean_tpot_ms": m["mean_tpot_ms"],
        "usd_per_hour": choice.machine.usd_per_hour,
        "usd_per_million_output_tokens": m["usd_per_million_output_tokens"],
        "limited_by": summary["bottleneck"]["explanation"],
        "costs": summary["inputs"]["costs"],
        "expert_bytes": summary["memory"]["expert_bytes"],
        "kv_bytes": summary["memory"]["kv_bytes"],
        "slots_per_layer": summary["memory"]["slots_per_layer"],
        "keeps_slos": m.get("slo_attainment", 1.0) >= ATTAINED,
        "slo_attainment": m.get("slo_attainment"),
    }, None


def _value(row: Row, asked: Asked) -> float:
    """What the objective goes by, less being better."""
    value = float(row[OBJECTIVES[asked.objective]] or 0.0)
    return -value if asked.objective == "throughput" else value


def _rank(row: Row, asked: Asked) -> tuple[float, ...]:
    """By the objective; equal ones by the other respects, so that no row comes before one that beats it."""
    price = math.inf if row["usd_per_hour"] is None else row["usd_per_hour"]
    others = -row["output_throughput"], row["mean_tpot_ms"] or 0.0, price
    return not row["keeps_slos"], _value(row, asked), *others


# -- how sure, and why --------------------------------------------------------------------------------------------


def _sure(row: Row, asking: _Asking, choice: Choice) -> tuple[list[Row], ModelError]:
    """Add P10 to P90 and the flags; return the metrics at each end of the costs' bands, and the model's error."""
    system = choice.system
    error = model_error(basis_of(asking.scene(choice).machine, system))
    _, (middle, *ends), _ = predict_band(asking.trace(choice), system, asking.question(choice))
    row["p10_p90"] = band(middle["output_throughput"], [end["output_throughput"] for end in ends], error)
    tpot = middle["mean_tpot_ms"]
    row["tpot_p10_p90_ms"] = tpot and band(tpot, [end["mean_tpot_ms"] for end in ends], error)
    row["flags"] = flags(system, asking.scene(choice), choice.bits, asking.as_published(choice))
    return ends, error


def _difference(best: Row, second: Row, sure: dict[int, tuple[list[Row], ModelError]], asked: Asked) -> Row:
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
    one, other = (sure[id(row)][1] for row in (best, second))
    error = NONE if together else ModelError(one.costs, math.hypot(one.own, other.own))
    low, high = band(ratio, [ratio * m for m in moved], error)
    return {"of": _name_of(second), "value": ratio - 1, "p10": low - 1, "p90": high - 1, "exceeds": low > 1}


def _explained(asking: _Asking, choice: Choice) -> Row:
    """The anchors, the ceiling and the memory of the best, on all the requests it was planned with."""
    scene, system = asking.scene(choice), choice.system
    ledger, under = scene.ledger(system), scene.under(system)
    top = ceiling(under.setting(system, ledger), hosted=system.misses.may_host)
    return {
        "anchors": {name: anchor(scene, policy, system.native) for name, policy in ANCHORS.items()},
        "ceiling": throughput_metrics(top)["output_throughput"],
        "memory": ledger.to_dict(),
        "notes": run(asking.trace(choice), system, asking.question(choice), anchors=False, shown=False).summary[
            "notes"
        ],
    }
