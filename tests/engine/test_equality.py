"""One meaning, two engines: every record of the compiled engine equals the event engine's, to the nanosecond."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.engine.simulate import Outcome, choose_engine, simulate
from moesim.errors import MoesimError, PolicyError
from moesim.policies import Eviction, Misses, Prefetch
from moesim.prediction import Beliefs, Oracle
from moesim.systems import SYSTEMS, System, load_system
from moesim.trace import Trace
from moesim.workload import from_trace, with_arrivals
from tests.fakes import FakeTable
from tests.scenes import EVERY, random_trace, setting

TABLES = ("steps", "requests", "layers", "transfers", "kernels")


def everything(out: Outcome) -> dict[str, Any]:
    """All that a run leaves behind, as plain values."""
    records = {name: getattr(out.records, name).to_arrow().to_pydict() for name in TABLES}
    return records | {
        "gaps": list(out.records.gaps),
        "counts": vars(out.counts) | {"altered": out.counts.altered.tolist()},
        "times": (out.elapsed_ns, out.idle_ns),
        "busy": out.busy_ns,
        "bytes": out.link_bytes,
        "peak": out.peak_resident_bytes,
    }


def both(scene: Any, system: System) -> tuple[Any, Any]:
    """What each engine says, an error included."""

    def run(engine: str) -> Any:
        try:
            return everything(simulate(scene, system, detail=True, engine=engine))
        except MoesimError as error:
            return f"{type(error).__name__}: {error}"

    return run("events"), run("compiled")


def with_weights(trace: Trace, seed: int, whole: bool) -> Trace:
    """The trace with gate weights, and with whole distributions if asked for."""
    rng = np.random.default_rng(seed)
    probabilities = rng.random((trace.tokens, trace.layers, trace.info.experts)).astype(np.float16)
    weights = np.take_along_axis(probabilities, trace.experts.astype(np.int64), axis=2)
    tasks = tuple("ab"[i % 2] for i in range(len(trace.requests)))
    requests = replace(trace.requests, task=tasks)
    return replace(trace, weights=weights, probabilities=probabilities if whole else None, requests=requests)


@st.composite
def scenes(draw: st.DrawFn) -> Any:
    """A setting small enough that everything happens: ties, zero times, full links, memory shared with the KV cache."""
    experts, layers = draw(st.integers(2, 8)), draw(st.integers(1, 4))
    requests, seed = draw(st.integers(1, 4)), draw(st.integers(0, 1 << 16))
    trace = random_trace(
        draw(st.integers(requests * 2, 30)), layers, experts, draw(st.integers(1, min(3, experts))), seed, requests,
        draw(st.integers(0, 4)),
    )  # fmt: skip
    weights = draw(st.sampled_from(["none", "chosen", "all"]))
    if weights != "none":
        trace = with_weights(trace, seed, weights == "all")
    cost, wide = st.integers(0, 20), st.just(1e9)
    table = FakeTable(
        layers, mixer=draw(cost), step=draw(cost), per_expert=draw(cost), copy=draw(cost), read=draw(cost),
        host_expert=draw(cost), handoff_ns=draw(cost), unified=draw(st.booleans()) and draw(st.booleans()),
        dram_gbps=draw(wide | st.floats(1, 200)), duplex_gbps=draw(wide | st.floats(1, 200)),
    )  # fmt: skip
    slots = draw(st.integers(1, experts))
    workload = from_trace(trace)
    if draw(st.booleans()):
        workload = with_arrivals(workload, draw(st.sampled_from([1e6, 1e7, 1e8])), 1.0, seed)
    scene = setting(
        trace, slots, concurrency=draw(st.integers(1, 4)), workload=workload, table=table,
        chunk=draw(st.integers(0, 3)), seed=seed, host_slots=draw(st.just(0) | st.integers(1, experts * layers)),
    )  # fmt: skip
    if draw(st.booleans()):
        table.model.kv_per_token = draw(st.integers(1, 100))
        scene = replace(scene, shared_bytes=scene.expert_bytes)
    return scene


@st.composite
def systems(draw: st.DrawFn) -> System:
    """A built-in system, or one with choices nobody published."""
    system = load_system(draw(st.sampled_from(EVERY)))
    if draw(st.booleans()):
        return system
    eviction = Eviction(
        tuple((name, draw(st.sampled_from([0.25, 1.0, -1.0, 2.0]))) for name in draw(
            st.lists(st.sampled_from(["lru", "lfu", "fifo", "hot", "count", "random", "recency", "frequency", "high",
                                      "near", "prob", "plan", "belady"]), min_size=1, max_size=3, unique=True)
        )),
        scope=draw(st.sampled_from(["layer", "global"])),
        per_sequence=draw(st.booleans()),
    )  # fmt: skip
    prefetch = Prefetch(
        per_layer=draw(st.none() | st.integers(1, 3)), pin=draw(st.booleans()), first_missing=draw(st.booleans()),
        latency_ns=draw(st.integers(0, 30)), blocking=draw(st.booleans()),
    )  # fmt: skip
    rule = draw(st.sampled_from(["fetch", "host", "cheaper", "reroute", "skip", "precision"]))
    anywhere = rule in ("host", "cheaper", "fetch")
    prompts = draw(st.sampled_from([None, "fetch", "host", "cheaper"])) if anywhere else None
    misses = Misses(
        rule, low_bits=4.5 if rule == "precision" else None, low_share=0.5, prompts=prompts,
        prompts_from=draw(st.integers(0, 3)) if prompts else 0,
        host_below=draw(st.integers(0, 3)) if "cheaper" in (rule, prompts) else 0,
        late_host=rule in ("host", "cheaper") and draw(st.booleans()),
    )  # fmt: skip
    predictor = Oracle(draw(st.floats(0.1, 1)), distance=draw(st.integers(0, 3)))
    try:
        return replace(system, eviction=eviction, prefetch=prefetch, misses=misses, predictor=predictor)
    except PolicyError:
        return system


SOME = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))


@SOME
@given(scenes(), systems())
def test_engines_agree_on_everything(scene: Any, system: System) -> None:
    events, compiled = both(scene, system)
    assert events == compiled


@pytest.mark.slow
@MANY
@given(scenes(), systems())
def test_engines_agree_for_hours(scene: Any, system: System) -> None:
    events, compiled = both(scene, system)
    assert events == compiled


@pytest.mark.parametrize("name", EVERY)
def test_every_system_runs_alike_in_both(name: str) -> None:
    trace = with_weights(random_trace(60, 4, 8, 2, seed=5, requests=4, prompt=4), 5, True)
    table = FakeTable(4, mixer=37, step=11, copy=1013, read=3001, dram_gbps=1.7, duplex_gbps=1.2)
    for scene in (setting(trace, 3, table=table), setting(trace, 4, concurrency=3, table=table, host_slots=20)):
        events, compiled = both(scene, load_system(name))
        assert events == compiled
        assert not isinstance(events, str)


def test_beliefs_with_maps_are_averaged_alike() -> None:
    """Several tokens at once, with a probability map that eviction goes by."""
    trace = random_trace(40, 3, 6, 2, seed=1, requests=4, prompt=2)
    maps = np.random.default_rng(0).random((40, 3, 6)).astype(np.float16)
    beliefs = (Beliefs(trace.experts, 1, map=maps),)
    scene, system = setting(trace, 2, concurrency=4), load_system("fMoE")
    runs = [everything(simulate(scene, system, True, beliefs, engine=engine)) for engine in ("events", "compiled")]
    assert runs[0] == runs[1]


def test_every_builtin_system_is_declarative() -> None:
    assert {choose_engine("auto", load_system(name))[0] for name in SYSTEMS} == {"compiled"}


class ByAge:
    def score(self, expert: Any) -> float:
        return float(expert.lru)


def test_a_users_code_runs_in_the_event_engine_and_the_reason_is_told() -> None:
    system = replace(load_system("LRU"), eviction=Eviction(own=ByAge()))
    engine, reason = choose_engine("auto", system)
    assert engine == "events" and "eviction" in reason
    with pytest.raises(PolicyError, match="eviction is decided by Python code"):
        choose_engine("compiled", system)
    with pytest.raises(PolicyError, match="must be one of"):
        choose_engine("compield", system)
