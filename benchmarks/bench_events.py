"""How fast the event engine is. `python -m pytest benchmarks --benchmark-enable`; off in ordinary test runs.

Machines are noisy, so what counts are ratios within one run: simulated tokens against bare SimPy timeouts, and the cost
per lookup of a long run against a short one.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import simpy

from moesim.engine.serve import Limits
from moesim.engine.simulate import Setting, simulate
from moesim.systems import load_system
from moesim.workload import from_trace
from tests.fakes import FakeTable, make_trace

LAYERS, EXPERTS, TOP_K = 26, 64, 6


def setting(tokens: int, slots: int = 32) -> Setting:
    rng = np.random.default_rng(0)
    skewed = rng.random((tokens, LAYERS, EXPERTS)) ** 3
    trace = make_trace(np.argsort(-skewed, axis=2)[:, :, :TOP_K], EXPERTS)
    table = FakeTable(LAYERS)
    limits = Limits(1, 1, 8192, 0, 1 << 60)
    return Setting(trace, table, from_trace(trace), limits, slots * table.size * LAYERS, 0, 0, 0)  # type: ignore[arg-type]


def timeouts(count: int) -> None:
    env = simpy.Environment()

    def ticking():
        for _ in range(count):
            yield env.timeout(1)

    env.process(ticking())
    env.run()


@pytest.mark.parametrize("policy", ["all-resident", "LRU", "Belady", "oracle", "eMoE"])
def test_tokens_per_second(benchmark, policy):
    """26 layers, 64 experts, top-6, batch 1, half of the experts resident."""
    scene = setting(500)
    benchmark.extra_info["tokens_per_s"] = None
    benchmark.pedantic(simulate, args=(scene, load_system(policy)), rounds=3, warmup_rounds=1)
    benchmark.extra_info["tokens_per_s"] = 500 / benchmark.stats.stats.median


def test_bare_simpy_timeouts(benchmark):
    """What the machine is worth at this moment: 100,000 timeouts."""
    benchmark.pedantic(timeouts, args=(100_000,), rounds=3, warmup_rounds=1)


def test_cost_per_lookup_does_not_grow_with_length(benchmark):
    """The ratio of cost per token, 2,000 tokens against 200."""

    def cost(tokens: int) -> float:
        scene = setting(tokens)
        start = time.process_time()
        simulate(scene, load_system("LRU"))
        return (time.process_time() - start) / tokens

    short = cost(200)
    long = benchmark.pedantic(cost, args=(2000,), rounds=1)
    benchmark.extra_info["long_over_short"] = long / short
