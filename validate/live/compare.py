"""Real runs beside simulated ones: decisions, times by layer, totals, ratios and order of the systems."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.engine.residency import D2H, H2D
from moesim.engine.simulate import Outcome, simulate
from moesim.policies import Transfer
from validate.live.cases import Prepared
from validate.live.measured import MeasuredTable
from validate.live.runtime import Log

RATIO, TOTAL = 0.10, 0.15  # tolerances


def simulated(prepared: Prepared, table: MeasuredTable) -> Outcome:
    return simulate(prepared.setting(table), prepared.system, detail=True, beliefs=prepared.beliefs)


def decisions(prepared: Prepared, logs: Sequence[Log], outcome: Outcome, table: MeasuredTable) -> dict[str, Any]:
    """Whether every run decided as the simulator did, lookup by lookup, copy by copy and victim by victim.

    Where prefetches fly, what is late depends on the clock: then only the share of lookups that agree is given.
    """
    predicted = _classes(outcome)
    runs = [np.array([row[:6] for row in log.layers]) for log in logs]
    lookups = predicted[:, 2:5].sum()
    agreement = min(1 - _differences(run, predicted) / max(lookups, 1) for run in runs)
    result: dict[str, Any] = {"agreement": float(agreement), "lookups": int(lookups)}
    result |= {name: int(predicted[:, 2 + i].sum()) for i, name in enumerate(("hits", "lates", "misses", "host"))}
    result |= {f"real_{name}": int(runs[0][:, 2 + i].sum()) for i, name in enumerate(("hits", "lates", "misses"))}
    result["evictions"], result["real_evictions"] = outcome.counts.evictions, len(logs[0].evicted)
    if prepared.exact:
        copies, victims = _copies(outcome), _victims(prepared, table)
        same = {
            "lookups": [np.array_equal(run, predicted) for run in runs],
            "copies": [log.copies == copies for log in logs],
            "victims": [log.evicted[: len(victims)] == victims for log in logs],
            "evictions": [len(log.evicted) == outcome.counts.evictions for log in logs],
        }
        result["differ"] = [what for what, equal in same.items() if not all(equal)]
        result["identical"] = not result["differ"]
    return result


def _differences(run: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Lookups that were absent in one and not in the other; a late one is on its way in both senses."""
    return float(np.abs(run[:, 4] - predicted[:, 4]).sum())


def _classes(outcome: Outcome) -> NDArray[np.int64]:
    names = ("step", "layer", "hits", "lates", "misses", "host")
    return np.stack([outcome.records.layers.column(name) for name in names], axis=1)


def _copies(outcome: Outcome) -> list[tuple[int, int]]:
    """In the order in which they started; an expert that comes in several pieces counts at its first."""
    transfers = outcome.records.transfers
    mine = np.flatnonzero(transfers.column("link") == H2D)
    order = mine[np.argsort(transfers.column("start")[mine], kind="stable")]
    return list(zip(transfers.column("layer")[order].tolist(), transfers.column("expert")[order].tolist(), strict=True))


def _victims(prepared: Prepared, table: MeasuredTable) -> list[tuple[int, int]]:
    """Who left, in order. Records name victims where they are copied back, which changes no decision of such cases."""
    if not (prepared.system.cache and prepared.system.misses.keep):
        return []
    back = replace(prepared.system, transfer=Transfer(prepared.system.transfer.unit, write_back=True))
    transfers = simulated(replace(prepared, system=back), table).records.transfers
    mine = transfers.column("link") == D2H
    return list(zip(transfers.column("layer")[mine].tolist(), transfers.column("expert")[mine].tolist(), strict=True))


def times(logs: Sequence[Log], outcome: Outcome) -> dict[str, Any]:
    """Totals as sums of medians by layer and step; noise: half the range of the runs' own totals, as a share."""
    real = np.median([[row[6] for row in log.layers] for log in logs], axis=0)
    layers = outcome.records.layers
    predicted = (layers.column("end") - layers.column("start")).astype(float)
    totals = [sum(row[6] for row in log.layers) for log in logs]
    steps = len(logs[0].steps)
    by_step = np.abs(predicted.reshape(steps, -1).sum(axis=1) / real.reshape(steps, -1).sum(axis=1) - 1)
    return {
        "real_ms": float(real.sum() / 1e6),
        "simulated_ms": float(predicted.sum() / 1e6),
        "error": float(predicted.sum() / real.sum() - 1),
        "layer_error": float(np.median(np.abs(predicted / real - 1))),
        "step_error": float(np.median(by_step)),
        "noise": (max(totals) - min(totals)) / 2 / statistics.median(totals),
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios and order within groups, and the worst of everything, over cases that were measured."""
    known = [row for row in rows if "real_ms" in row]
    exact = [row["identical"] for row in rows if "identical" in row]
    ratios, pairs, wrong = [], 0, []
    for group in dict.fromkeys(row["group"] for row in known):
        own = [row for row in known if row["group"] == group]
        ratios += [_ratio_error(own[0], row) for row in own[1:]]
        for a, b in combinations(own, 2):
            if abs(a["real_ms"] - b["real_ms"]) > (a["noise"] + b["noise"]) * min(a["real_ms"], b["real_ms"]):
                pairs += 1
                if (a["real_ms"] < b["real_ms"]) != (a["simulated_ms"] < b["simulated_ms"]):
                    wrong.append(f"{group}: {a['case']} and {b['case']}")
    errors = [abs(row["error"]) for row in known]
    return {
        "decisions_identical": all(exact) if exact else None,
        "policy_ratio_error": max(ratios, default=None),
        "policy_ratio_error_median": statistics.median(ratios) if ratios else None,
        "total_error": max(errors, default=None),
        "total_error_median": statistics.median(errors) if errors else None,
        "noise": max((row["noise"] for row in known), default=None),
        "noise_median": statistics.median(row["noise"] for row in known) if known else None,
        "pairs_compared": pairs,
        "pairs_in_wrong_order": wrong,
    }


def _ratio_error(base: dict[str, Any], row: dict[str, Any]) -> float:
    real, predicted = row["real_ms"] / base["real_ms"], row["simulated_ms"] / base["simulated_ms"]
    return float(abs(predicted / real - 1))


def verdict(found: dict[str, Any], missing: int) -> str:
    """`failed`, `passed`, or `inconclusive` where cases could not be measured; decisions count on any machine."""
    if found["decisions_identical"] is False:
        return "failed"
    if missing or found["total_error"] is None:
        return "inconclusive"
    good = not found["pairs_in_wrong_order"] and found["total_error"] <= TOTAL
    return "passed" if good and (found["policy_ratio_error"] or 0) <= RATIO else "failed"
