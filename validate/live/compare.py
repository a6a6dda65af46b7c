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
from moesim.records import KERNELS
from validate.live.cases import Prepared
from validate.live.measured import MeasuredTable, Overlap
from validate.live.runtime import Log

RATIO, TOTAL = 0.10, 0.15  # tolerances
ROUNDS = 4  # of the search for how much goes on side by side; the shares move by less than a hundredth after three

Spans = tuple[NDArray[np.int64], NDArray[np.int64]]  # starts and ends


def simulated(prepared: Prepared, table: MeasuredTable) -> tuple[Outcome, Overlap]:
    """The run as predicted, and how much in it goes on side by side.

    Kernels and copies are slower beside each other, and how long that is follows from how slow they are: from nothing
    side by side on, what one simulation finds is what the next assumes.
    """
    overlap = Overlap()
    for _ in range(ROUNDS):
        setting = prepared.setting(table.overlapping(overlap))
        outcome = simulate(setting, prepared.system, detail=True, beliefs=prepared.beliefs, engine="events")
        overlap = _overlap(outcome)
    return outcome, overlap


def _overlap(outcome: Outcome) -> Overlap:
    kernels, transfers = outcome.records.kernels, outcome.records.transfers
    start, end, what = (kernels.column(name) for name in ("start", "end", "what"))
    mine = transfers.column("link") == H2D
    copies = transfers.column("start")[mine], transfers.column("end")[mine]

    def beside(name: str) -> float:
        own = what == KERNELS.index(name)
        return _share((start[own], end[own]), copies)

    return Overlap(beside("mixer"), beside("resident experts"), beside("arrived expert"), _share(copies, (start, end)))


def _share(own: Spans, others: Spans) -> float:
    """Of the time of `own` spans, the part in which one of `others` goes on. Neither overlap among themselves."""
    whole = int((own[1] - own[0]).sum())
    if not whole or not len(others[0]):
        return 0.0
    order = np.argsort(others[0], kind="stable")
    start, end = others[0][order], others[1][order]
    before = np.concatenate([[0], np.cumsum(end - start)])

    def covered(until: NDArray[np.int64]) -> NDArray[np.int64]:
        """Time of `others` before each moment."""
        begun = np.searchsorted(start, until, side="right")
        last = np.maximum(begun - 1, 0)
        running = np.where(begun > 0, np.maximum(end[last] - until, 0), 0)
        return before[begun] - running

    return float((covered(own[1]) - covered(own[0])).sum() / whole)


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
    transfers = simulated(replace(prepared, system=back), table)[0].records.transfers
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
    parts = np.median([[row[7:10] for row in log.layers] for log in logs], axis=0).sum(axis=0) / 1e6
    return {
        "real_ms": float(real.sum() / 1e6),
        **dict(zip(("real_kernels_ms", "real_waiting_ms", "real_deciding_ms"), parts.tolist(), strict=True)),
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
