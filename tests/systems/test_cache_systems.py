"""What is particular to each system that caches, prefetches or computes on the host, on traces counted by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.residency import H2D
from moesim.engine.simulate import simulate
from moesim.errors import MemoryBudgetError, PolicyError
from moesim.policies import LRU, Even, Eviction, ExpectedLoads, Misses, Prefetch
from moesim.prediction import Beliefs, NoPrediction
from moesim.question import Question, run
from moesim.systems import System, load_system, with_setting
from moesim.trace import WEIGHT_ONE
from moesim.trace.cut import cut
from moesim.trace.io import read
from tests.fakes import FakeTable, make_trace
from tests.scenes import random_trace, serve, setting

NEW = (
    "Belady-window", "DeepSpeed", "Pre-gated", "MoE-Infinity", "MoE-Infinity(eviction='code')", "ProMoE",
    "KTransformers", "KTransformers(gpu_experts=4, defer=1)", "ExpertFlow", "EPLB", "fMoE", "fMoE(offline=True)",
    "HOBBIT", "HOBBIT(pair='int8+int2')", "HOBBIT(variant='cooperative')", "AdapMoE", "AdapMoE(gating=True)",
)  # fmt: skip


def believing(trace, system, slots, named, maps=None, table=None, expert_bytes=None):
    """Run with beliefs given: `named` [tokens, layers, n], known when each step starts."""
    beliefs = Beliefs(np.asarray(named, dtype=np.int16), 0, map=None if maps is None else np.asarray(maps, np.float16))
    scene = setting(trace, slots, table=table or FakeTable(trace.layers))
    if expert_bytes is not None:
        scene = replace(scene, expert_bytes=expert_bytes)
    return simulate(scene, system, detail=True, beliefs=(beliefs,))


def serve_with(trace, system, beliefs):
    """Run with one set of beliefs on four slots a layer."""
    return simulate(setting(trace, 4), system, detail=True, beliefs=(beliefs,))


def copied(out):
    """(layer, expert) of every expert copied to the device, in order."""
    transfers = out.records.transfers
    mine = transfers.column("link") == H2D
    return list(zip(transfers.column("layer")[mine].tolist(), transfers.column("expert")[mine].tolist(), strict=True))


# -- HOBBIT --------------------------------------------------------------------------------------------------------


def test_hobbit_loads_high_low_or_nothing_at_exactly_its_thresholds():
    """T1 = 0.5, T2 = 0.75; weights before each expert: 0, 0.5, 0.75 | 0, 0.625, 0.875 | 0, 1, 1."""
    weights = [[[0.5, 0.25, 0.25], [0.625, 0.25, 0.125], [1, 0, 0]]]
    trace = replace(make_trace([[[0, 1, 2], [0, 1, 2], [3, 1, 2]]], 4), weights=np.array(weights, dtype=np.float16))
    out = serve(trace, load_system("HOBBIT(thresholds=(0.5, 0.75), ahead=0)"), 4)
    high, low = 1000, int(1000 * 4.5 / 16)
    assert copied(out) == [(0, 0), (0, 1), (0, 4 + 2), (1, 0), (1, 4 + 1), (2, 3)]
    assert out.link_bytes["h2d"] == 4 * high + 2 * low
    lowered, rerouted, skipped = out.counts.altered[:, :, 0] / WEIGHT_ONE
    assert lowered.tolist() == [0.25, 0.25, 0] and skipped.tolist() == [0, 0.125, 0] and not rerouted.any()


def test_hobbit_computes_at_full_precision_what_is_resident_at_full_precision():
    """A low-precision request finds the full copy: a hit. A full-precision request with a low copy: a miss."""
    first_is = {"all": [1.0, 0.0], "half": [0.5, 0.5]}
    weights = [[first_is["half"]], [first_is["all"]], [first_is["all"]], [first_is["half"]]]
    trace = replace(make_trace([[[0, 1]], [[2, 1]], [[0, 3]], [[0, 3]]], 4), weights=np.array(weights, np.float16))
    out = serve(trace, load_system("HOBBIT(thresholds=(0.5, 1.0), ahead=0)"), 8)
    assert copied(out) == [(0, 0), (0, 1), (0, 2), (0, 4 + 3), (0, 3)]
    assert (out.counts.hits, out.counts.misses) == (3, 5)
    assert not out.counts.altered.any()


def test_hobbit_looks_further_only_while_nothing_nearer_is_missing():
    """Layers 1 and 2 are both believed in; the copies of layer 1 come first, and layer 2 waits for another moment."""
    trace = make_trace([[[0], [0], [0]]], 4)
    near, far = (Beliefs(np.array([[[0], [1], [2]]], dtype=np.int16), distance) for distance in (1, 2))
    system = replace(load_system("HOBBIT(variant='cooperative')"), misses=Misses())
    out = simulate(setting(trace, 4, table=FakeTable(3, mixer=5000)), system, detail=True, beliefs=(near, far))
    assert copied(out) == [(0, 0), (1, 1), (1, 0), (2, 2), (2, 0)]


def test_hobbit_needs_room_for_one_copy_of_each_precision():
    trace = replace(make_trace([[[0, 1]]], 4))
    with pytest.raises(MemoryBudgetError, match="low-precision copies cannot hold one"):
        simulate(setting(trace, 1), load_system("HOBBIT"))
    for bad in ("HOBBIT(variant='x')", "HOBBIT(pair='fp8')", "HOBBIT(ahead=4)"):
        with pytest.raises(PolicyError, match="HOBBIT"):
            load_system(bad)


def test_hobbit_computes_prompts_on_the_gpu_and_absent_experts_of_decode_steps_on_the_cpu():
    trace = make_trace([[[0]], [[1]], [[2]], [[0]]], 4, [(2, 2)])
    system = replace(load_system("HOBBIT(variant='cooperative')"), predictor=NoPrediction())
    out = serve(trace, system, 4)
    assert copied(out) == [(0, 0), (0, 1)]
    assert (out.counts.misses, out.counts.hosted, out.counts.hits) == (3, 1, 1)


@pytest.mark.parametrize("engine", ["events", "compiled"])
@pytest.mark.parametrize(
    ("host_expert", "ends", "hosted"),
    [
        (500, 1010, 1),  # routed at 750: 250 of the copy are left, and 10 of compute: sooner than 500 on the CPU
        (200, 700, 2),  # routed at 450: 550 and 10 are more than 200, which begin after the hand-off of 50
        (410, 1010, 1),  # routed at 660: 340 and 10 against 410
        (305, 910, 2),  # routed at 555: 445 and 10 against 305
    ],
)
def test_what_is_on_its_way_is_computed_on_the_cpu_where_that_is_quicker(engine, host_expert, ends, hosted):
    """A copy of layer 1's expert sets out when the step does and takes 1,000 ns; layer 0's runs on the CPU."""
    system = replace(load_system("LRU"), misses=Misses("host", late_host=True))
    beliefs = Beliefs(np.array([[[-1], [1]]], dtype=np.int16), 0)
    table = FakeTable(2, host_expert=host_expert)
    out = simulate(setting(make_trace([[[0], [1]]], 4), 4, table=table), system, True, (beliefs,), engine=engine)
    assert out.elapsed_ns == ends
    assert (out.counts.misses, out.counts.lates, out.counts.hosted) == (1, 1, hosted)


def test_a_prefetch_that_has_not_started_is_dropped_when_the_cpu_took_its_expert():
    """Two experts are believed in; the second one's copy would begin at 1,000 ns, when its layer is over."""
    system = replace(load_system("LRU"), misses=Misses("host", late_host=True))
    beliefs = Beliefs(np.array([[[3], [1]]] * 2, dtype=np.int16), 0)
    out = serve_with(make_trace([[[0], [1]], [[0], [2]]], 4), system, beliefs)
    assert copied(out)[0] == (0, 3) and out.counts.dropped >= 1 and (1, 1) not in copied(out)[:1]
    assert out.counts.lates == 1 and out.counts.hosted == 4


# -- baselines with experts on the CPU -----------------------------------------------------------------------------


def test_fiddler_goes_by_the_tokens_of_an_expert():
    """At 2 a token and 5 a copy, an expert of two tokens runs on the CPU and one of three is copied."""
    misses = load_system("Fiddler(latency_cpu=2.0, latency_gpu=5.0)").misses
    trace = make_trace([[[0]], [[0]], [[0]], [[1]], [[1]], [[0]]], 4, [(5, 1)])
    out = serve(trace, replace(load_system("LRU"), misses=misses), 2)
    assert copied(out) == [(0, 0)]
    assert out.counts.hosted == 2
    assert load_system("Fiddler").misses.host_below == 10
    with pytest.raises(PolicyError, match="above 0"):
        load_system("Fiddler(latency_cpu=0.0)")


def test_llama_cpp_copies_experts_up_for_steps_of_32_tokens():
    misses = load_system("llama.cpp").misses
    assert [misses.rule_of(prompts, tokens) for prompts, tokens in ((True, 31), (True, 32), (False, 32))] == [
        "host", "fetch", "fetch",
    ]  # fmt: skip
    assert load_system("llama.cpp(op_offload=False)").misses.rule_of(True, 4096) == "host"
    trace = make_trace([[[i % 4]] for i in range(33)], 4, [(32, 1)])
    out = serve(trace, load_system("llama.cpp(n_cpu_moe=1)"), 4)
    assert sorted(copied(out)) == [(0, 0), (0, 1), (0, 2), (0, 3)] and out.counts.hosted == 1


def test_rules_of_phases_that_make_no_sense_are_refused():
    for bad, said in (
        ({"rule": "skip", "prompts": "fetch"}, "both must be one of fetch, host, cheaper"),
        ({"rule": "fetch", "prompts_from": 2}, "beside misses.prompts"),
        ({"rule": "host", "host_below": 2}, "beside misses.rule cheaper"),
        ({"rule": "fetch", "late_host": True}, "set misses.rule to host or cheaper"),
    ):
        with pytest.raises(PolicyError, match=said):
            Misses(**bad)


# -- fMoE ----------------------------------------------------------------------------------------------------------


def test_fmoe_evicts_the_lowest_probability_times_uses():
    """Expert 0 was used twice but is believed in little: 2 x 0.1 < 1 x 0.6, so it leaves for expert 2."""
    trace = make_trace([[[0]], [[0]], [[1]], [[2]], [[1]]], 4)
    maps = [[[0.5, 0.5, 0, 0]]] * 3 + [[[0.1, 0.6, 0.3, 0]]] * 2
    nobody = np.full((5, 1, 1), -1)
    assert believing(trace, load_system("fMoE"), 2, nobody, maps).counts.misses == 3
    assert believing(trace, load_system("LFU"), 2, nobody, maps).counts.misses == 4


def test_fmoe_copies_by_probability_over_distance():
    """PRI = p / layers ahead: 0.4 / 1, 0.9 / 3, 0.5 / 2 and 0.2 / 2."""
    trace = make_trace([[[3], [3], [3]]], 4)
    maps = [[[0.4, 0, 0, 0.6], [0.5, 0.2, 0, 0.3], [0.9, 0, 0, 0.1]]]
    named = [[[0, -1], [0, 1], [0, -1]]]
    out = believing(trace, load_system("fMoE"), 4, named, maps, FakeTable(3, mixer=10_000))
    assert copied(out)[:4] == [(0, 0), (2, 0), (1, 0), (1, 1)]
    linear = believing(trace, load_system("MoE-Infinity"), 4, named, maps, FakeTable(3, mixer=10_000))
    assert copied(linear)[:4] == [(0, 0), (1, 0), (2, 0), (1, 1)], "0.4 x 3/4, 0.5 x 2/4, 0.9 x 1/4, 0.2 x 2/4"


def test_fmoe_learns_from_earlier_requests_alone():
    """The second request repeats the first, so that its experts are prefetched; d = 1."""
    ids = [[[0], [1], [2]], [[3], [2], [1]]]
    out = serve(make_trace(ids * 2, 4, [(0, 2), (0, 2)]), "fMoE(distance=1)", 1, table=FakeTable(3, mixer=5000))
    assert out.counts.misses >= 6 and out.counts.hits >= 4


# -- MoE-Infinity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eviction", "misses"), [("lfu", 3), ("code", 4)])
def test_moe_infinity_evicts_the_least_or_in_code_the_most_used(eviction, misses):
    trace = make_trace([[[0]], [[0]], [[1]], [[2]], [[0]]], 4)
    system = load_system(f"MoE-Infinity(eviction='{eviction}')")
    assert believing(trace, system, 2, np.full((5, 1, 1), -1)).counts.misses == misses


def test_moe_infinity_prefetches_what_the_nearest_request_chose():
    """The third request begins like the second one, whose second token chose expert 2 in both layers."""
    ids = [[[0], [0]], [[1], [1]], [[3], [3]], [[2], [2]], [[3], [3]], [[2], [2]]]
    trace = make_trace(ids, 4, [(0, 2)] * 3)
    out = serve(trace, "MoE-Infinity", 4, table=FakeTable(2, mixer=5000))
    assert out.counts.misses == 8, "with a slot for every expert the last request finds all of its experts"
    small = serve(trace, "MoE-Infinity", 1, table=FakeTable(2, mixer=5000))
    assert copied(small)[-2:] == [(0, 2), (1, 2)] and small.counts.hits >= 1


# -- pins ----------------------------------------------------------------------------------------------------------


def test_what_is_predicted_stays_until_its_layer_is_over():
    """Three layers share two slots, which is where LRU throws out just what comes next."""
    trace = make_trace([[[0], [0], [0]], [[1], [0], [0]]], 4)
    named = [[[-1], [-1], [-1]], [[-1], [0], [-1]]]
    plain = System("plain", eviction=Eviction(LRU.score, "global"))
    pinned = replace(plain, prefetch=Prefetch(pin=True))
    table = FakeTable(3, mixer=1)
    nobody = np.full((2, 3, 1), -1)
    assert believing(trace, plain, 1, nobody, table=table, expert_bytes=2000).counts.hits == 0
    out = believing(trace, pinned, 1, named, table=table, expert_bytes=2000)
    assert out.counts.hits == 1 and out.counts.misses == 5


def test_a_demand_takes_the_slot_of_a_prediction_when_there_is_no_other():
    trace = make_trace([[[0], [0]], [[1], [0]]], 4)
    named = [[[-1], [-1]], [[-1], [0]]]
    system = System("pinned", eviction=Eviction(LRU.score, "global"), prefetch=Prefetch(pin=True))
    out = believing(trace, system, 1, named, expert_bytes=1000)
    assert out.counts.misses == 4 and len(out.records.requests) == 1


# -- AdapMoE -------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_slots_by_expected_loads_are_optimal(data):
    layers, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    shares = st.lists(st.floats(0, 1), min_size=layers, max_size=layers)
    rule = ExpectedLoads(tuple(data.draw(shares)), tuple(data.draw(shares)), data.draw(st.integers(1, 3)))
    slots = data.draw(st.integers(layers, layers * experts))
    counts = rule.split(slots * 7 + data.draw(st.integers(0, 6)), [7] * layers, experts)
    loads = rule.loads(layers, experts)

    def cost(split):
        return sum(loads[layer, count - 1] for layer, count in enumerate(split))

    mine = [size // 7 for size in counts]
    assert sum(mine) == slots and min(mine) >= 1
    options = (split for split in product(range(1, experts + 1), repeat=layers) if sum(split) == slots)
    assert cost(mine) == pytest.approx(min(map(cost, options)), abs=1e-12)


@pytest.mark.parametrize("c", range(1, 9))
def test_expected_loads_are_those_of_the_released_code(c):
    """Top-2 of 8: its sum of cases (both absent, one absent), for accuracy a and single-expert ratio r."""
    a, r = 0.7, 0.3
    none, one = max(0, (8 - c) * (7 - c) / 56), 2 * (8 - c) * c / 56
    both = 2 * none * (1 - a) + none * a + one * (1 - a)
    expected = r * (1 - c / 8) * (1 - a) + (1 - r) * both
    assert ExpectedLoads((a,), (r,)).loads(1, 8)[0, c - 1] == pytest.approx(expected)


def test_layers_that_are_predicted_badly_get_more_slots():
    counts = ExpectedLoads((0.0, 0.9, 0.9)).split(9, [1, 1, 1], 8)
    assert counts[0] > counts[1] and sum(counts) == 9
    assert ExpectedLoads((0.5,)).split(2, [1, 1, 1], 8) == (1, 1, 0), "not a slot for every layer: dealt out evenly"


def test_the_engine_keeps_to_the_slots_of_each_layer():
    """Five experts in turn: layer 0, never predicted, gets as many slots and keeps them all; layer 1 gets one."""
    trace = make_trace([[[t % 5], [t % 5]] for t in range(10)], 5)
    system = System("test", capacity=ExpectedLoads((0.0, 1.0), top_k=1))
    out = serve(trace, system, 3)
    assert out.counts.misses == 5 + 10


def test_adapmoe_brings_one_absent_expert_of_the_next_layer_while_decoding():
    """Two experts per layer, all absent: layers 1 and 2 find one of theirs; prompts find none."""
    ids = [[[0, 1], [0, 1], [0, 1]], [[2, 3], [2, 3], [2, 3]]]
    table = FakeTable(3, mixer=5000)
    system = load_system("AdapMoE(accuracy=(1.0,))")
    out = serve(make_trace(ids, 4, [(0, 2)]), system, 4, table=table)
    assert (out.counts.hits, out.counts.misses) == (4, 8)
    assert serve(make_trace(ids, 4, [(1, 1)]), system, 4, table=table).counts.hits == 2
    assert len(copied(out)) == 3 * 12, "three matrices each"


# -- baselines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "misses"), [(0, 3), (1, 4), (2, 3)])
def test_belady_sees_no_further_than_its_window(window, misses):
    """When expert 2 comes, expert 0 is two steps away and expert 1 is never used again, though used last."""
    trace = make_trace([[[0]], [[1]], [[2]], [[2]], [[0]]], 4)
    system = System("test", eviction=Eviction((("belady", 1.0),), window=window))
    assert serve(trace, system, 2).counts.misses == misses


def test_deepspeed_moves_every_layer_once_per_step():
    trace = make_trace([[[0], [1], [2]], [[3], [3], [3]]], 4)
    out = serve(trace, "DeepSpeed", 0, table=FakeTable(3, mixer=100, per_expert=10))
    assert out.link_bytes["h2d"] == 2 * 3 * 4 * 1000
    assert out.elapsed_ns == 100 + 6 * 4 * 1000, "bound by the link but for the first layer's attention"


def test_pre_gated_finds_all_but_the_first_layer():
    trace = make_trace([[[0, 1], [2, 3], [0, 2]], [[0, 1], [2, 3], [0, 2]]], 4)
    out = serve(trace, "Pre-gated", 0, table=FakeTable(3, mixer=5000))
    assert (out.counts.misses, out.counts.hits) == (4, 8)
    assert out.link_bytes["h2d"] == 12 * 1000, "nothing is kept"


@pytest.mark.parametrize(("defer", "elapsed"), [(0, 2 * (100 + 50 + 1000)), (1, 100 + 50 + 500 + 500 + 1000)])
def test_deferred_experts_finish_during_the_next_layers_attention(defer, elapsed):
    """Two experts of 500 ns per layer on the host: with one deferred, attention (100) and hand-off (50) are hidden."""
    trace = make_trace([[[0, 1], [2, 3]]], 4)
    out = serve(trace, f"KTransformers(defer={defer})", 0)
    assert out.elapsed_ns == elapsed
    assert out.counts.hosted == 4 and not out.link_bytes["h2d"]


def test_ktransformers_keeps_the_hottest_experts_it_is_given_room_for():
    trace = make_trace([[[0, 1]], [[0, 2]], [[0, 3]]], 4)
    out = serve(trace, "KTransformers(gpu_experts=1)", 3)
    assert (out.counts.hits, out.counts.hosted) == (3, 3)
    assert Even(most=1).split(50, [10, 10], 8) == (10, 10)
    assert Even().split(50, [10, 10], 8) == (30, 20) and Even(equal=True).split(50, [10, 10], 8) == (20, 20)
    assert Even(equal=True).split(10, [10, 10], 8) == (10, 0), "less than a slot for every layer"
    assert load_system("Mixtral-Offloading").capacity == Even(equal=True), "so many per layer, says its code"


def test_a_partly_copied_prefetch_goes_on_when_a_demand_waits_for_its_slot():
    """One slot, copies matrix by matrix: the wrong prefetch must land before it can make room."""
    trace = make_trace([[[0], [1]], [[0], [1]]], 4)
    near = Beliefs(np.array([[[-1], [3]], [[-1], [3]]], dtype=np.int16), 1)
    system = load_system("ProMoE")
    out = simulate(setting(trace, 1, table=FakeTable(2, mixer=400)), system, detail=True, beliefs=(near,))
    assert (out.counts.hits, out.counts.misses) == (1, 3) and out.counts.prefetched == 2


def test_a_belief_held_again_keeps_its_copy_in_the_queue():
    """Token 0's belief about layer 1 is not copied in time; token 1's renews it instead of asking twice."""
    trace = make_trace([[[0], [0]], [[0], [2]]], 4)
    near = Beliefs(np.array([[[-1], [2]], [[-1], [2]]], dtype=np.int16), 1)
    system = System("test")
    out = simulate(setting(trace, 4, table=FakeTable(2, mixer=1)), system, detail=True, beliefs=(near,))
    assert copied(out).count((1, 2)) == 1


# -- choices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Prefetch(order="random"),
        lambda: Prefetch(order="linear", per_layer=1),
        lambda: Prefetch(order="inverse", first_missing=True),
        lambda: Misses(defer=1),
        lambda: Misses("host", defer=-1),
        lambda: Eviction(window=3),
        lambda: Even(most=0),
        lambda: ExpectedLoads(()),
        lambda: ExpectedLoads((1.5,)),
        lambda: load_system("MoE-Infinity(eviction='fifo')"),
    ],
)
def test_choices_that_make_no_sense_are_refused(make):
    with pytest.raises(PolicyError):
        make()


def test_parts_are_set_on_the_command_line():
    lru = load_system("LRU")
    assert with_setting(lru, "capacity=AdapMoE").capacity == load_system("AdapMoE").capacity
    assert with_setting(lru, "misses=HOBBIT").misses.rule == "precision"
    assert with_setting(load_system("HOBBIT"), "misses.thresholds=0.5,0.8").misses.thresholds == (0.5, 0.8)
    assert with_setting(lru, "predictor=expert-maps(distance=2)").predictor.distance == 2


@pytest.fixture(scope="module")
def own_trace(shipped):
    return cut(read(shipped), requests=10)


def test_precision_by_rank_alone_is_told(own_trace):
    bare = replace(own_trace, weights=None, probabilities=None)
    notes = run(bare, "HOBBIT", Question(slots_per_layer=6, num_prompts=1), anchors=False).summary["notes"]
    assert any("gate weights" in note for note in notes)


def test_learning_beats_chance_on_real_routing(own_trace):
    """Real maps find more experts in time than the same cache without them."""
    q = Question(slots_per_layer=6)
    hits = {name: run(own_trace, name, q, anchors=False).summary["metrics"]["hits"] for name in ("fMoE", "LRU")}
    assert hits["fMoE"] > hits["LRU"]


def test_random_traces_of_any_shape_are_served():
    for name in NEW[:-1]:
        assert len(serve(random_trace(20, 4, 6, 3, 3, requests=4, prompt=2), name, 3).records.requests) == 4
