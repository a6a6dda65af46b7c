"""Small runs for tests of the engine: a fake table, a setting, and hypothesis strategies that draw them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from moesim.engine.serve import Limits
from moesim.engine.simulate import Outcome, Setting, simulate
from moesim.systems import System, load_system
from moesim.trace import Trace
from moesim.workload import Workload, from_trace
from tests.fakes import FakeTable, make_trace

CACHED = ("LRU", "LFU", "FIFO", "random", "Belady")
EVERY = (
    *CACHED, "static", "on-demand", "all-resident", "oracle", "Mixtral-Offloading", "Fiddler", "eMoE(period=2)",
    "Belady-window(window=2)", "DeepSpeed", "Pre-gated", "MoE-Infinity", "MoE-Infinity(eviction='code')",
    "ProMoE(accuracy=0.7)", "KTransformers", "KTransformers(gpu_experts=1, defer=1)", "ExpertFlow(accuracy=0.7)",
    "EPLB", "fMoE(distance=1)", "HOBBIT", "HOBBIT(variant='cooperative')", "AdapMoE",
    "SiDA", "SiDA(variant='code')",
)  # fmt: skip


def random_trace(
    tokens: int, layers: int, experts: int, k: int, seed: int, requests: int = 1, prompt: int = 0
) -> Trace:
    """Skewed routing; every request has `prompt` prompt rows and an equal share of the rest as decode rows."""
    rng = np.random.default_rng(seed)
    taste = rng.random((1, layers, experts)) ** 2
    ids = np.argsort(-(taste * rng.random((tokens, layers, experts))), axis=2)[:, :, :k]
    share = tokens // requests
    sizes = [share] * (requests - 1) + [tokens - share * (requests - 1)]
    return make_trace(ids, experts, [(min(prompt, s - 1), s - min(prompt, s - 1)) for s in sizes])


def setting(
    trace: Trace, slots: int, *, concurrency: int = 1, workload: Workload | None = None, table: FakeTable | None = None,
    chunk: int = 0, host_slots: int = 0, batch_tokens: int = 8192, seed: int = 0,
) -> Setting:  # fmt: skip
    table = table or FakeTable(trace.layers)
    return Setting(
        trace=trace,
        table=table,  # type: ignore[arg-type]
        workload=workload or from_trace(trace),
        limits=Limits(1 << 30, concurrency, batch_tokens, chunk, 1 << 60),
        expert_bytes=slots * table.size * trace.layers,
        shared_bytes=0,
        host_bytes=host_slots * table.size,
        seed=seed,
    )


def serve(trace: Trace, system: str | System, slots: int, **how: Any) -> Outcome:
    """Run with detailed records, in the event engine: test_equality.py holds the compiled one against it."""
    chosen = load_system(system) if isinstance(system, str) else system
    if chosen.misses.rule == "precision":
        slots = max(slots, 2)  # one of each precision is the least it can work with
    return simulate(setting(trace, slots, **how), chosen, detail=True, engine="events")


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Trace, int, int, FakeTable]:
    """(trace, slots per layer, concurrency, costs): small enough that everything happens, ties and zeros included."""
    experts = draw(st.integers(2, 8))
    k = draw(st.integers(1, min(3, experts)))
    requests = draw(st.integers(1, 3))
    trace = random_trace(
        tokens=draw(st.integers(requests * 2, 12)),
        layers=draw(st.integers(1, 3)),
        experts=experts,
        k=k,
        seed=draw(st.integers(0, 1 << 16)),
        requests=requests,
        prompt=draw(st.integers(0, 3)),
    )
    cost = st.integers(0, 20)
    table = FakeTable(
        trace.layers, mixer=draw(cost), step=draw(cost), per_expert=draw(cost), copy=draw(cost), read=draw(cost),
        host_expert=draw(cost), handoff_ns=draw(cost),
    )  # fmt: skip
    return trace, draw(st.integers(1, experts)), draw(st.integers(1, 3)), table
