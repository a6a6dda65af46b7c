"""Published measurements beside predictions: cases as data, one row per measured value, and scores by source.

Nothing is fitted to a row: a case names a model, a machine of the catalogue with what its source states changed, a
system and a workload, and is predicted as `moesim replay` would. docs/accuracy.md tells the columns.
"""

from __future__ import annotations

import csv
import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moesim.errors import MoesimError, ValidationError, nearest
from moesim.machine import Machine, load_machine
from moesim.metrics import CAUSES
from moesim.model import Model, load_model
from moesim.model_error import Miss, band, basis_of, fit, model_error, spread

SHIPPED = Path(__file__).parent / "data" / "published_cases.csv"
COLUMNS = (
    "id", "group", "source", "model", "machine", "system", "prompt", "output", "concurrency", "metric", "value",
    "trust", "assumed",
)  # fmt: skip
METRICS: dict[str, Callable[[dict[str, Any]], float]] = {  # by name, from the metrics of the predicted run
    "decode_tok_s": lambda m: 1000 / m["mean_tpot_ms"],
    "prefill_tok_s": lambda m: 1000 * m["total_input_tokens"] / m["completed"] / m["mean_ttft_ms"],
    "tpot_ms": lambda m: m["mean_tpot_ms"],
    "ttft_s": lambda m: m["mean_ttft_ms"] / 1000,
    "e2el_s": lambda m: m["mean_e2el_ms"] / 1000,
    "throughput_tok_s": lambda m: m["output_throughput"],
    "hit_rate": lambda m: m["hit_rate"],
}
TRUST = ("high", "medium", "low")
TOLERANCE = {
    "decode_tok_s": 0.20, "tpot_ms": 0.20, "throughput_tok_s": 0.20, "e2el_s": 0.20, "prefill_tok_s": 0.25,
    "ttft_s": 0.25,
}  # fmt: skip
HIT_RATE_POINTS = 0.05
WAITS = {CAUSES["pcie"]: "PCIe-bound", CAUSES["host"]: "CPU-bound", CAUSES["nvme"]: "NVMe-bound"}
TIMES = ("tpot_ms", "ttft_s", "e2el_s")  # less is better
# Groups whose rows informed a term of data/terms.csv or docs/costs.md; any other is held out.
TRAINING = ("ktv3", "ubg", "ikr1", "ikq30", "ikq235", "ikmav", "imp", "lmf", "mi", "vllm")
SPLITS = ("training", "held out")
AT_ONCE = ("throughput_tok_s", "e2el_s")  # metrics of requests that are all there from the beginning
BAND_TOKENS, BAND_REQUESTS = 16, 256  # of many long requests, those from which a band is taken
FEW = 12  # cases that are predicted one after the other
PIECES = (2048, 8, 8)  # requests, prompt and output tokens that the routing of many requests is joined from
MAX_CASES, MAX_BYTES = 10_000, 1 << 24


@dataclass(frozen=True)
class Case:
    """One measured value and the set-up it was measured in."""

    id: str
    group: str  # of one source: scored together
    source: str
    model: Model
    machine: Machine
    system: str
    settings: tuple[str, ...]
    slots_per_layer: int | None
    expert_memory: str | None
    prompt: int
    output: int
    concurrency: int
    metric: str
    value: float
    trust: str
    assumed: str  # what the source does not state
    waves: int = 1  # requests sent for each that is served at once


def read_cases(path: Path) -> list[Case]:
    """Every case of a CSV file. Raises ValidationError naming file, line, column, value and remedy."""
    if path.stat().st_size > MAX_BYTES:
        raise ValidationError(f"{path}: {path.stat().st_size} bytes; a file of cases has at most {MAX_BYTES}")
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValidationError(f"{path}, line 1: no column '{missing[0]}'; a case has {', '.join(COLUMNS)}")
        rows = list(reader)
    if len(rows) > MAX_CASES:
        raise ValidationError(f"{path}: {len(rows)} cases; at most {MAX_CASES}, so split the file")
    cases, seen = [], set[str]()
    for line, row in enumerate(rows, 2):
        try:
            case = _case(row)
        except (MoesimError, ValueError, TypeError) as error:
            raise ValidationError(f"{path}, line {line}: {error}") from error
        if case.id in seen:
            raise ValidationError(f"{path}, line {line}: id '{case.id}' is there already; every case needs its own")
        seen.add(case.id)
        cases.append(case)
    return cases


def choose(cases: Sequence[Case], only: str | None) -> list[Case]:
    """Those of the groups named in `only`, separated by commas; all where it is None."""
    if only is None:
        return list(cases)
    groups = list(dict.fromkeys(case.group for case in cases))
    wanted = [name.strip() for name in only.split(",")]
    for name in wanted:
        if name not in groups:
            raise ValidationError(f"--only: unknown group '{name}'{nearest(name, groups)}")
    return [case for case in cases if case.group in wanted]


def _case(row: dict[str, str]) -> Case:
    metric, trust = row["metric"], row["trust"]
    if metric not in METRICS:
        raise ValueError(f"metric '{metric}' is none of {', '.join(METRICS)}{nearest(metric, METRICS)}")
    if trust not in TRUST:
        raise ValueError(f"trust '{trust}' is none of {', '.join(TRUST)}")
    value = float(row["value"])
    if not 0 < value < 1e12:
        raise ValueError(f"value {row['value']} must be above 0")
    model_name, model_changes = _parts(row["model"])
    machine_name, machine_changes = _parts(row["machine"])
    system, chosen = _parts(row["system"])
    slots, memory = chosen.pop("slots_per_layer", None), chosen.pop("expert_memory", None)
    return Case(
        row["id"], row["group"], row["source"],
        _model(model_name, model_changes), _machine(machine_name, machine_changes),
        system, tuple(f"{key}={value}" for key, value in chosen.items()), int(slots) if slots else None, memory,
        _whole(row, "prompt", 0), _whole(row, "output", 1), _whole(row, "concurrency", 1), metric, value, trust,
        row["assumed"], 1 if metric in AT_ONCE else 2,
    )  # fmt: skip


def _parts(text: str) -> tuple[str, dict[str, str]]:
    """`name; key=value; key=value`."""
    name, *changes = (part.strip() for part in text.split(";"))
    pairs = [change.partition("=") for change in changes if change]
    for key, sign, _ in pairs:
        if not sign:
            raise ValueError(f"'{key}' is no change such as key=value; separate changes by ;")
    return name, {key.strip(): value.strip() for key, _, value in pairs}


def _whole(row: dict[str, str], name: str, least: int) -> int:
    value = int(row[name])
    if not least <= value <= 1 << 20:
        raise ValueError(f"{name} {value} must be from {least} to {1 << 20}")
    return value


def _model(name: str, changes: dict[str, str]) -> Model:
    """expert_bits, weight_bits, embedding_bits (head and routers too) and kv_bits as stored, scales included; top_k
    where fewer experts were activated."""
    model = load_model(name)
    top_k = int(changes.pop("top_k", model.top_k))
    known = ("expert_bits", "weight_bits", "embedding_bits", "kv_bits")
    for key in changes:
        if key not in known:
            raise ValueError(f"model: unknown change '{key}'{nearest(key, (*known, 'top_k'))}")
    if not 1 <= top_k <= model.experts:
        raise ValueError(f"top_k {top_k}: {model.name} has {model.experts} experts")
    bits = {key: float(value) for key, value in changes.items()}
    embedding_bits = bits.pop("embedding_bits", model.embedding_bits)
    return replace(model.with_precision(**bits), top_k=top_k, embedding_bits=embedding_bits)


def _machine(name: str, changes: dict[str, str]) -> Machine:
    import yaml

    from moesim.machine_file import changed

    if not changes:
        return load_machine(name)
    return changed(name, {key: yaml.safe_load(value) for key, value in changes.items()})


# -- prediction ---------------------------------------------------------------------------------------------------


def predict(case: Case) -> dict[str, Any]:
    """`predicted`, `low` and `high` (P10 and P90), `status`, `regime` and `bottleneck`; an error is a result too.

    costs: natural logarithms of how far costs alone move it down and up; basis: where the rest of its band comes from.
    """
    # NOTE: by set-up alone, so that several values of one are predicted once
    setup = replace(case, id="", group="", source="", metric="", value=1.0, trust="", assumed="")
    try:
        status, numbers, varied, bottleneck = _predicted(setup)
    except MoesimError as error:
        return {"status": "ERROR", "reason": str(error)}
    if not numbers:
        return {"status": status, "reason": bottleneck}
    value, (base, *ends) = METRICS[case.metric](numbers), (METRICS[case.metric](found) for found in varied)
    from moesim.question import compose

    basis = basis_of(case.machine, compose(case.system, case.settings))
    low, high = (value * end / base for end in band(base, ends, model_error(basis, case.group)))
    return {
        "status": status, "predicted": value, "low": low, "high": high, "bottleneck": bottleneck,
        "regime": _regime(case, status, bottleneck), "basis": basis, "costs": spread(base, ends),
    }  # fmt: skip


@lru_cache(maxsize=64)  # one set-up may have several values
def _predicted(case: Case) -> tuple[str, dict[str, Any], list[dict[str, Any]], str]:
    """Status, metrics, the metrics its band is taken from (`predict_band`), and what limits it.

    Many requests: twice as many as are served at once, each sent when another ends, but for throughput, where all are
    there from the beginning. Their band is that of fewer and shorter ones.
    """
    from moesim.question import Question, predict_band, run
    from moesim.systems import load_system
    from moesim.units import parse_size

    question = Question(
        model=case.model,
        machine=case.machine,
        slots_per_layer=case.slots_per_layer,
        expert_memory=parse_size(case.expert_memory) if case.expert_memory else None,
        max_concurrency=case.concurrency,
        max_num_seqs=max(case.concurrency, 256),
    )
    routing = _routing(case)
    if case.concurrency == 1 or not load_system(case.system).all_resident:
        status, numbers, bottleneck = predict_band(routing, case.system, question, case.settings)
        return status, numbers[0] if numbers else {}, numbers, bottleneck
    with TemporaryDirectory() as folder:
        whole, short = Path(folder, "whole.csv"), Path(folder, "short.csv")
        count, few = case.concurrency * case.waves, min(case.concurrency, BAND_REQUESTS)
        for file, output, rows in ((whole, case.output, count), (short, min(case.output, BAND_TOKENS), few)):
            row = f"0,{case.prompt},{output}\n"
            file.write_text("arrival_s,prompt_tokens,output_tokens\n" + row * rows)
        asked = replace(question, workload=whole)
        summary = run(routing, case.system, asked, case.settings, anchors=False, shown=False).summary
        if not summary["metrics"]:
            return summary["status"], {}, [], summary["status_reason"]
        _, varied, _ = predict_band(routing, case.system, replace(question, workload=short), case.settings)
    return summary["status"], summary["metrics"], varied, summary["bottleneck"]["explanation"]


def _regime(case: Case, status: str, bottleneck: str) -> str:
    """What kind of run it is: by what waits longest, and where that is the GPU, by whether it multiplies or reads."""
    if status == "OVERLOADED":
        return "overloaded"
    if bottleneck in WAITS:
        return WAITS[bottleneck]
    from moesim.question import compose

    if not compose(case.system, case.settings).all_resident:
        return "GPU-bound, experts absent"
    return "compute-bound" if _multiplies(case) else "fits"


def _multiplies(case: Case) -> bool:
    """Whether a pass takes longer at the peak rate than at the nominal bandwidth.

    Of prompts where only they are measured, else of one token of every request and its share of the prompts.
    """
    model, gpu = case.model, case.machine.gpu
    prompts = case.metric in ("prefill_tok_s", "ttft_s")
    tokens = float(case.prompt) if prompts else case.concurrency
    if case.metric in AT_ONCE:
        tokens *= 1 + case.prompt / case.output
    touched = 1 - (1 - model.top_k / model.experts) ** tokens
    nbytes = model.other_bytes + touched * model.total_expert_bytes
    flops = 2 * tokens * model.active_params
    peak = gpu.fp8_tflops or gpu.tflops if 8 <= model.expert_bits < 8.1 else gpu.tflops
    return flops / (peak * 1e12) > nbytes / (gpu.hbm_gbps * 1e9)


def _routing(case: Case) -> Any:
    """Drawn routing: with the locality of recorded traces where a cache makes use of it.

    For many requests pieces that theirs are joined from, since any token's routing is as good as another's.
    """
    from moesim.question import compose
    from moesim.trace.assumed import distinct_routing, local_routing

    system = compose(case.system, case.settings)
    cached = system.cache and not system.all_resident and system.misses.keep
    if case.concurrency > 1 and system.all_resident:
        return distinct_routing(case.model, *PIECES)
    return (local_routing if cached else distinct_routing)(case.model, case.concurrency, case.prompt, case.output)


# -- scores -------------------------------------------------------------------------------------------------------


def validate(cases: Sequence[Case], advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Every case predicted, and scores over those of medium or high trust: by metric, split, group and regime."""
    rows = []
    for case, found in _predictions(cases):
        row = {
            "id": case.id, "group": case.group, "split": SPLITS[case.group not in TRAINING],
            "metric": case.metric, "trust": case.trust, "source": case.source, "model": case.model.name,
            "machine": case.machine.name, "system": case.system, "measured": case.value, "assumed": case.assumed,
            "setup": repr(replace(case, id="", source="", value=1.0, trust="", assumed="")),
            "workload": (case.model.name, case.prompt, case.output, case.concurrency), **found,
        }  # fmt: skip
        if "predicted" in found:
            row["error"] = found["predicted"] / case.value - 1
            # a hit rate depends on routing, for which there is no band
            row["in_band"] = None if case.metric == "hit_rate" else found["low"] <= case.value <= found["high"]
        rows.append(row)
        advance()
    scored = [row for row in rows if "error" in row and row["trust"] != "low"]
    summary = {}
    for metric in dict.fromkeys(row["metric"] for row in scored):
        own = [row for row in scored if row["metric"] == metric]
        groups = _by(own, "group")
        splits = {name.replace(" ", "_"): score for name, score in _by(own, "split").items()}
        summary[metric] = _score(own) | splits | {"groups": groups, "worst_group": _worst(groups)}
    speeds = [row | {"error": _faster(row)} for row in scored if row["metric"] != "hit_rate"]
    bands, covered = fit_bands(rows), _covered(scored)
    for row in rows:
        del row["setup"], row["workload"]
    return {
        "status": "passed" if summary and all(_within(m, s) for m, s in summary.items()) else "failed",
        "cases": rows,
        "summary": summary,
        "regimes": _by(speeds, "regime"),
        "bands": bands,
        "covered": covered,
        "tolerances": TOLERANCE | {"hit_rate": HIT_RATE_POINTS},
        "without_prediction": sum("error" not in row for row in rows),
        "not_scored": sum(row["trust"] == "low" for row in rows),
    }


def _predictions(cases: Sequence[Case]) -> Iterator[tuple[Case, dict[str, Any]]]:
    """In order; of many, on all cores."""
    if len(cases) < FEW:
        yield from ((case, predict(case)) for case in cases)
        return
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from zip(cases, pool.map(predict, cases), strict=True)


def _by(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    return {name: _score([r for r in rows if r[key] == name]) for name in dict.fromkeys(r[key] for r in rows)}


def _faster(row: dict[str, Any]) -> float:
    """The error as one of speed, whether the metric is a rate or a time."""
    ratio = 1 + row["error"]
    return (1 / ratio if row["metric"] in TIMES else ratio) - 1


def _score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [row["error"] for row in rows]
    sizes = sorted(abs(error) for error in errors)
    bands = [row["in_band"] for row in rows if row["in_band"] is not None]
    points = [abs(row["predicted"] - row["measured"]) for row in rows]
    regrets = _regrets(rows)
    return {
        "cases": len(rows),
        "median_abs_error": statistics.median(sizes),
        "mean_abs_error": statistics.fmean(sizes),
        "signed_bias": statistics.median(errors),
        "p95": sizes[min(int(0.95 * len(sizes)), len(sizes) - 1)],
        "median_points": statistics.median(points),
        "kendall_tau": _kendall([row["measured"] for row in rows], [row["predicted"] for row in rows]),
        "choices": len(regrets),
        "top1_regret": statistics.fmean(regrets) if regrets else None,
        "coverage": statistics.fmean(bands) if bands else None,
    }


def _regrets(rows: Sequence[dict[str, Any]]) -> list[float]:
    """Of every choice a source offers, how much worse than its best what is predicted best was measured to be.

    A choice: set-ups of one group that serve the same requests with the same model, measured by the same metric.
    Values measured for one set-up are averaged.
    """
    choices: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        choice = choices.setdefault((row["group"], row["metric"], *row["workload"]), {})
        choice.setdefault(row["setup"], []).append(row)
    regrets = []
    for (_, metric, *_), setups in choices.items():
        if len(setups) < 2:
            continue
        sign = -1 if metric in TIMES else 1
        measured = [sign * math.log(statistics.fmean(r["measured"] for r in own)) for own in setups.values()]
        predicted = [sign * own[0]["predicted"] for own in setups.values()]
        regrets.append(1 - math.exp(measured[predicted.index(max(predicted))] - max(measured)))
    return regrets


def _kendall(measured: Sequence[float], predicted: Sequence[float]) -> float | None:
    """Tau-b; None where nothing differs."""
    if len(set(measured)) < 2 or len(set(predicted)) < 2:
        return None
    from scipy.stats import kendalltau

    return float(kendalltau(measured, predicted).statistic)


def _worst(groups: dict[str, dict[str, Any]]) -> str:
    return max(groups, key=lambda name: groups[name]["median_abs_error"])


def _within(metric: str, summary: dict[str, Any]) -> bool:
    """Every source group is within the metric's tolerance in the median."""
    if metric == "hit_rate":
        return all(group["median_points"] <= HIT_RATE_POINTS for group in summary["groups"].values())
    return all(group["median_abs_error"] <= TOLERANCE[metric] for group in summary["groups"].values())


def fit_bands(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What data/model_error.csv would hold, had it been fitted to these rows: for every basis the fit to all groups,
    and those to all but one, which that one's bands are taken from."""
    bands = []
    usable = [r for r in rows if "error" in r and r["trust"] != "low" and r["metric"] != "hit_rate"]
    for basis in dict.fromkeys(row["basis"] for row in usable):
        misses = [_miss(row) for row in usable if row["basis"] == basis]
        groups = list(dict.fromkeys(miss.group for miss in misses))
        for without in ("", *groups) if len(groups) > 1 else ("",):
            costs, own = fit(miss for miss in misses if miss.group != without)
            bands.append({"basis": basis, "without": without, "costs": costs, "own": own})
    return bands


def _covered(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By basis: how many sources and cases have a band, and how often the measured value lies in it, by case and with
    every source weighing the same."""
    found = {}
    banded = [row for row in rows if row["in_band"] is not None]
    for basis in (*dict.fromkeys(row["basis"] for row in banded), "all") if banded else ():
        own = [row for row in banded if basis in (row["basis"], "all")]
        groups = [[r["in_band"] for r in own if r["group"] == g] for g in dict.fromkeys(r["group"] for r in own)]
        found[basis] = {
            "cases": len(own), "sources": len(groups), "by_case": statistics.fmean(r["in_band"] for r in own),
            "by_source": statistics.fmean(statistics.fmean(group) for group in groups),
        }  # fmt: skip
    return found


def _miss(row: dict[str, Any]) -> Miss:
    off = -math.log1p(row["error"])  # of measured over predicted
    return Miss(row["group"], row["costs"][off > 0], abs(off))
