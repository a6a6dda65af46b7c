"""The highest request rate that keeps the promises, and which of them breaks first."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moesim.errors import WorkloadError
from moesim.question import Question, predict, run
from moesim.systems import System
from moesim.trace import Trace

PRECISION = 0.02  # of the rate, between kept and broken
SEEDS = 3  # arrivals drawn anew, for how sure the answer is
MOST = 1e6  # requests/s


def capacity(
    trace: Trace,
    system: System,
    question: Question,
    attainment: float = 0.9,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`rate`: requests/s up to which `attainment` of the requests keep every SLO of `question.goodput`, by bisection.

    0 where not even one request at a time keeps them. Arrivals are Poisson (or `question.burstiness`); the rate is
    found for SEEDS draws of them: `rate` is their median, `low` and `high` their range. `breaks_first`: the SLO that
    fewest keep just above, or `queue` where requests pile up. Raises WorkloadError without an SLO.
    """
    if not question.goodput:
        raise WorkloadError("no SLO: give at least one --goodput METRIC:MS, such as ttft:2000")
    if not 0 < attainment <= 1:
        raise WorkloadError(f"--attainment {attainment:g} must be a share above 0 and up to 1")
    if question.workload is not None or question.request_rate is not None:
        raise WorkloadError("capacity chooses the arrivals: leave out --workload and --request-rate")
    beliefs = predict(trace, system, question)

    def served(rate: float, seed: int) -> dict[str, Any]:
        advance()
        asked = replace(question, request_rate=rate, seed=seed)
        return run(trace, system, asked, anchors=False, beliefs=beliefs, shown=False).summary

    def keeps(summary: dict[str, Any]) -> bool:
        return summary["status"] != "OVERLOADED" and summary["metrics"]["slo_attainment"] >= attainment

    alone = run(
        trace, system, replace(question, max_concurrency=1), anchors=False, beliefs=beliefs, shown=False
    ).summary
    result = {"attainment": attainment, "slos_ms": dict(question.goodput), "status": alone["status"]}
    result |= {"machine": alone["inputs"]["machine"]["name"], "notes": alone["notes"]}
    if not alone["metrics"]:
        return result | {"rate": 0.0, "low": 0.0, "high": 0.0, "breaks_first": alone["status_reason"]}
    if alone["metrics"]["slo_attainment"] < attainment:
        return result | {"rate": 0.0, "low": 0.0, "high": 0.0, "breaks_first": _weakest(alone)}
    start = alone["metrics"]["request_throughput"]
    found = [_bisect(start, question.seed + i, served, keeps) for i in range(SEEDS)]
    rates = [rate for rate, _ in found]
    broken = [summary for _, summary in found if summary is not None]
    return result | {
        "rate": statistics.median(rates),
        "low": min(rates),
        "high": max(rates),
        "breaks_first": _weakest(broken[0]) if broken else None,
        "requests": alone["metrics"]["completed"],
    }


def _bisect(
    start: float,
    seed: int,
    served: Callable[[float, int], dict[str, Any]],
    keeps: Callable[[dict[str, Any]], bool],
) -> tuple[float, dict[str, Any] | None]:
    """(highest rate kept, what happened just above it); None where nothing breaks below MOST."""
    low, high, above = 0.0, start, served(start, seed)
    while keeps(above):
        low, high = high, 2 * high
        if high > MOST:
            return low, None
        above = served(high, seed)
    while high - low > PRECISION * high:
        middle = (low + high) / 2 if low == 0 else math.sqrt(low * high)
        if high < 1e-6:
            return 0.0, above
        summary = served(middle, seed)
        if keeps(summary):
            low = middle
        else:
            high, above = middle, summary
    return low, above


def _weakest(summary: dict[str, Any]) -> str:
    if summary["status"] == "OVERLOADED":
        return "queue"
    shares: dict[str, float] = summary["metrics"]["slo_attainment_by_slo"]
    return min(shares, key=lambda name: shares[name])
