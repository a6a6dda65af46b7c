"""One wave of drawn routing (routing_model.py), compiled: scores and draws of many (layer, token) pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def draw_wave(
    wave: int,
    low: int,
    high: int,
    block: tuple[Any, Any, Any, Any],
    base: Any,
    recency: Any,
    transition: Any,
    arrival: Any,
    last_use: Any,
    chosen: Any,
    below: Any,
    out: Any,
) -> None:
    """Experts of layer l of token `wave` - l, for l from `low` to `high`, of every request that long.

    block: task, prompt, length and first row, [requests]; base: [2 phases, layers, requests, experts]; recency: [tasks,
    layers, gaps]; arrival: [layers, requests, experts] logarithms of exponential variates; last_use: [layers, requests,
    experts] tokens; chosen: [layers + 1, requests, k], entry l by layer l - 1; below: [rows, layers, k], in its
    stead if not empty; out: [rows, layers, k]. last_use, chosen and out are brought up to date.

    An exponential divided by the weight is an arrival time; the k that arrive first are drawn (the Gumbel-max trick).
    """
    task, prompt, length, start = block
    experts, top_k, longest = base.shape[3], out.shape[2], np.int32(recency.shape[2] - 1)
    score = np.empty(experts, dtype=np.float32)
    best, picked = np.empty(top_k, dtype=np.float32), np.empty(top_k, dtype=np.int16)
    for layer in range(high - 1, low - 1, -1):  # from above: a layer reads what the one below drew a wave ago
        token = wave - layer
        now = np.int32(token)
        for request in range(length.size):
            if length[request] <= token:  # the longest come first
                break
            row, fading = start[request] + token, recency[task[request], layer]
            used, common = last_use[layer, request], base[1 if token >= prompt[request] else 0, layer, request]
            noise = arrival[layer - low, request]
            for e in range(experts):
                gap = np.int32(now - used[e])
                score[e] = common[e] + fading[np.uint32(gap if gap < longest else longest)]
            for rank in range(top_k):
                given = chosen[layer, request, rank]
                if below.size and layer:
                    given = below[row, layer - 1, rank]
                link = transition[layer, given]
                for e in range(experts):
                    score[e] += link[e]
            for e in range(experts):
                score[e] -= noise[e]
            best[:] = -np.inf
            least = best[0]
            for e in range(experts):
                value = score[e]
                if value > least:
                    place = top_k - 1
                    while place > 0 and value > best[place - 1]:
                        best[place], picked[place] = best[place - 1], picked[place - 1]
                        place -= 1
                    best[place], picked[place] = value, e
                    least = best[top_k - 1]
            for rank in range(top_k):
                e = picked[rank]
                out[row, layer, rank] = e
                chosen[layer + 1, request, rank] = e
                used[e] = token
