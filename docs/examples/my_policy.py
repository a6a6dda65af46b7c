"""A policy of one's own: keep what is fresh and popular, expect what the last token chose, let the CPU help."""

import numpy as np

from moesim.prediction import Beliefs


class MyPolicy:
    base = "LRU"  # decides whatever has no method here

    def __init__(self, most=1):
        self.most = most

    def score(self, expert):
        """Of the experts that may leave, the one with the lowest score does."""
        return expert.recency + 0.5 * expert.hot

    def on_miss(self, miss):
        return "host" if miss.host_ns < miss.fetch_ns else "fetch"

    def predict(self, trace, seed):
        """The experts of the token before in the same request, known when a step starts (distance 0)."""
        before = np.full_like(trace.experts, -1)
        same = trace.request[1:] == trace.request[:-1]
        before[1:][same] = trace.experts[:-1][same]
        return Beliefs(before, distance=0)

    def prefetch(self, layer, experts, resident):
        return [expert for expert in experts if expert not in resident][: self.most]
