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
from moesim.model import Model, load_model

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
    "throughput_tok_s": lambda m: m["output_throughput"],
    "hit_rate": lambda m: m["hit_rate"],
}
TRUST = ("high", "medium", "low")
TOLERANCE = {"decode_tok_s": 0.20, "tpot_ms": 0.20, "prefill_tok_s": 0.25, "ttft_s": 0.25, "throughput_tok_s": 0.20}
HIT_RATE_POINTS = 0.05
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
        row["assumed"], 1 if metric == "throughput_tok_s" else 2,
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
    """expert_bits, weight_bits and kv_bits as stored, scales included; top_k where fewer experts were activated."""
    model = load_model(name)
    top_k = int(changes.pop("top_k", model.top_k))
    known = ("expert_bits", "weight_bits", "kv_bits")
    for key in changes:
        if key not in known:
            raise ValueError(f"model: unknown change '{key}'{nearest(key, (*known, 'top_k'))}")
    if not 1 <= top_k <= model.experts:
        raise ValueError(f"top_k {top_k}: {model.name} has {model.experts} experts")
    return replace(model.with_precision(**{key: float(bits) for key, bits in changes.items()}), top_k=top_k)


def _machine(name: str, changes: dict[str, str]) -> Machine:
    import yaml

    from moesim.machine_file import changed

    if not changes:
        return load_machine(name)
    return changed(name, {key: yaml.safe_load(value) for key, value in changes.items()})


# -- prediction ---------------------------------------------------------------------------------------------------


def predict(case: Case) -> dict[str, Any]:
    """`predicted`, `low` and `high` (P10 and P90), `status` and `bottleneck`; an error is a result too."""
    setup = replace(case, id="", group="", source="", metric="", value=1.0, trust="", assumed="")
    try:
        status, numbers, varied, bottleneck = _predicted(setup)
    except MoesimError as error:
        return {"status": "ERROR", "reason": str(error)}
    if not numbers:
        return {"status": status, "reason": bottleneck}
    value, (base, *ends) = METRICS[case.metric](numbers), (METRICS[case.metric](found) for found in varied)
    low, high = (value * end / base for end in band(base, ends))
    return {"status": status, "predicted": value, "low": low, "high": high, "bottleneck": bottleneck}


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


def band(value: float, ends: Sequence[float]) -> tuple[float, float]:
    """P10 and P90: ends of the resources' bands, their logarithms added as squares on either side."""
    moved = [math.log(end / value) for end in ends]
    down, up = (math.sqrt(sum(m * m for m in moved if m * side > 0)) for side in (-1, 1))
    return value * math.exp(-down), value * math.exp(up)


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
    """Every case predicted, and scores over those of medium or high trust: by metric, overall and by group."""
    rows = []
    for case, found in _predictions(cases):
        row = {
            "id": case.id, "group": case.group, "metric": case.metric, "trust": case.trust, "source": case.source,
            "model": case.model.name, "machine": case.machine.name, "system": case.system, "measured": case.value,
            "assumed": case.assumed, **found,
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
        groups = {g: _score([r for r in own if r["group"] == g]) for g in dict.fromkeys(r["group"] for r in own)}
        summary[metric] = _score(own) | {"groups": groups, "worst_group": _worst(groups)}
    return {
        "status": "passed" if summary and all(_within(m, s) for m, s in summary.items()) else "failed",
        "cases": rows,
        "summary": summary,
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


def _score(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [row["error"] for row in rows]
    sizes = sorted(abs(error) for error in errors)
    bands = [row["in_band"] for row in rows if row["in_band"] is not None]
    points = [abs(row["predicted"] - row["measured"]) for row in rows]
    return {
        "cases": len(rows),
        "median_abs_error": statistics.median(sizes),
        "mean_abs_error": statistics.fmean(sizes),
        "signed_bias": statistics.median(errors),
        "p95": sizes[min(int(0.95 * len(sizes)), len(sizes) - 1)],
        "median_points": statistics.median(points),
        "kendall_tau": _kendall([row["measured"] for row in rows], [row["predicted"] for row in rows]),
        "coverage": statistics.fmean(bands) if bands else None,
    }


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
