"""An independent count of hits and misses by the written rule, sharing no code with the engine.

One event is one step at one layer: its unique experts, in order of first appearance. All are classified against
residency first; missing ones are brought in one by one, each time throwing out the lowest ranked resident that is
not of the event; then all are touched in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence


def events_of(experts: Sequence[Sequence[Sequence[int]]], layer: int, batch: int = 1) -> list[list[int]]:
    """Unique experts of each step at `layer`, for `batch` consecutive tokens per step."""
    out = []
    for start in range(0, len(experts), batch):
        flat = [int(e) for token in experts[start : start + batch] for e in token[layer]]
        out.append(list(dict.fromkeys(flat)))
    return out


def misses(events: list[list[int]], slots: int, policy: str) -> int:
    """Misses of one layer's cache of `slots` under LRU, LFU (in-cache counts, ties to LRU), FIFO or Belady."""
    uses = defaultdict(list)
    for time, event in enumerate(events):
        for expert in event:
            uses[expert].append(time)
    resident: dict[int, dict[str, int]] = {}
    clock = brought = missed = 0
    for time, event in enumerate(events):
        absent = [e for e in event if e not in resident]
        missed += len(absent)
        for expert in absent:
            if len(resident) == slots:
                candidates = [e for e in resident if e not in event]
                del resident[_worst(candidates, resident, uses, time, policy)]
            brought += 1
            resident[expert] = {"used": -1, "count": 0, "brought": brought}
        for expert in event:
            clock += 1
            resident[expert]["used"] = clock
            resident[expert]["count"] += 1
    return missed


def _worst(candidates, resident, uses, time, policy):
    if policy == "LRU":
        return min(candidates, key=lambda e: resident[e]["used"])
    if policy == "LFU":
        return min(candidates, key=lambda e: (resident[e]["count"], resident[e]["used"]))
    if policy == "FIFO":
        return min(candidates, key=lambda e: resident[e]["brought"])
    if policy == "Belady":
        return max(candidates, key=lambda e: _next(uses[e], time))
    raise ValueError(policy)


def _next(times: list[int], now: int) -> float:
    i = bisect_right(times, now)
    return times[i] if i < len(times) else float("inf")
