"""The choices: plain values in, plain values out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import MoesimError, PolicyError
from moesim.policies import FCFS, LRU, Candidate, Eviction, GreedySLO, Misses, Placement, Prefetch, Refresh, Transfer
from moesim.policies.misses import cheaper, reroute
from moesim.prediction import Oracle, Transitions
from moesim.systems import SYSTEMS, System, load_system, with_setting


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
    st.sets(st.integers(0, 9)),
    st.permutations(range(10)),
)
def test_reroute_keeps_the_resident_and_names_distinct_residents(chosen, resident, preference):
    out = reroute(chosen, resident, preference)
    assert [new for old, new in zip(chosen, out, strict=True) if old in resident] == [
        e for e in chosen if e in resident
    ]
    named = [e for e in out if e >= 0]
    assert set(named) <= resident and len(named) == len(set(named)) == min(len(chosen), len(resident))


def test_reroute_follows_the_gate_order():
    assert reroute([7, 3], {1, 2, 3}, [7, 2, 3, 1, 0]) == [2, 3]
    assert reroute([7, 8], {2}, [7, 8, 2]) == [2, -1]


def test_the_host_wins_a_tie():
    assert cheaper(10, 10) == "host" and cheaper(9, 10) == "fetch"


def test_fcfs_takes_the_first():
    assert FCFS().admit([Candidate(0, 1, 1, 0)], [], 0) == 0
    assert FCFS().admit([], [], 0) is None


def test_greedy_slo_prefers_the_tightest_promise():
    waiting = [Candidate(0, 10, 10, 0), Candidate(5, 10, 10, 900), Candidate(6, 10, 10, 100)]
    assert GreedySLO(token_ns=1).admit(waiting, [], 10) == 2


def test_greedy_slo_keeps_promises_already_given():
    """Eq. 3: (W + n G) c + r; one running request with 50 ns left to its promise."""
    running = [Candidate(arrival=0, prompt_tokens=5, remaining=10, slo_ns=150)]
    short, long = Candidate(90, 40, 5, 0), Candidate(90, 60, 5, 0)
    scheduler = GreedySLO(token_ns=1)
    assert scheduler.admit([short], running, now=100) == 0
    assert scheduler.admit([long], running, now=100) is None
    assert scheduler.admit([long, short], running, now=100) == 1
    assert scheduler.admit([long], [], now=100) == 0, "with nobody running there is no promise to break"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Eviction((("lur", 1.0),)),
        lambda: Eviction(()),
        lambda: Eviction(scope="planet"),
        lambda: Misses("reroot"),
        lambda: Prefetch(per_layer=0),
        lambda: Refresh(period=0),
        lambda: Placement("cold"),
        lambda: Transfer("page"),
        lambda: Oracle(recall=1.5),
        lambda: Oracle(distance=-1),
        lambda: Misses("precision"),
        lambda: Misses(thresholds=(0.9, 0.6)),
        lambda: Eviction(combine="max"),
        lambda: Prefetch(latency_ns=-1),
        lambda: Transitions(block=0),
        lambda: System("x", placement=Placement(pinned=True)),
        lambda: System("x", cache=False),
        lambda: System("x", placement=Placement("hot", pinned=True)),
        lambda: System("x", misses=Misses(keep=False), transfer=Transfer(write_back=True)),
    ],
)
def test_nonsense_is_refused_in_one_line(make):
    with pytest.raises(PolicyError) as error:
        make()
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(PolicyError, match="did you mean 'eMoE'"):
        load_system("emoo")
    with pytest.raises(PolicyError, match="did you mean 'lru'"):
        Eviction((("lur", 1.0),))


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_every_system_loads_in_any_case_and_describes_itself(name):
    assert load_system(name.upper()) == load_system(name.lower())
    assert load_system(name).parts()["name"].lower().startswith(name.lower()[:4])
    assert (SYSTEMS[name].__doc__ or "").strip()


def test_arguments_are_literals_and_nothing_is_evaluated():
    assert load_system("eMoE(period=20)").refresh.period == 20
    assert load_system("eMoE(variant='E')").refresh.period == 1
    for bad in ("eMoE(period=__import__('os'))", "eMoE(20)", "eMoE(period=20", "eMoE(perod=20)", "LRU(x=1)"):
        with pytest.raises(MoesimError):
            load_system(bad)


def test_one_choice_can_be_changed():
    assert with_setting(load_system("LRU"), "eviction.scope=global").eviction.scope == "global"
    assert with_setting(load_system("LRU"), "eviction.score=lru:0.4,lfu:0.6").eviction.score == (
        ("lru", 0.4),
        ("lfu", 0.6),
    )
    assert with_setting(load_system("LRU"), "misses.rule=host").misses == Misses("host")
    assert with_setting(load_system("eMoE"), "refresh.period=7").refresh.period == 7
    assert load_system("LRU").eviction == LRU


def test_a_part_can_be_taken_from_another_system_or_by_name():
    assert with_setting(load_system("LRU"), "misses=Fiddler").misses == load_system("Fiddler").misses
    assert with_setting(load_system("LRU"), "refresh=eMoE").refresh == load_system("eMoE").refresh
    assert with_setting(load_system("LRU"), "predictor=oracle(recall=0.8)").predictor == Oracle(recall=0.8)
    assert with_setting(load_system("LRU"), "predictor=transitions").predictor == Transitions()
    assert with_setting(load_system("LRU"), "scheduling=greedy-slo").scheduling == GreedySLO()
    assert with_setting(load_system("LRU"), "expert_bits=4.5").expert_bits == 4.5


@pytest.mark.parametrize(
    "setting",
    [
        "predictor=guess",
        "misses=Fidler",
        "eviction=",
        "eviction",
        "evction.scope=global",
        "eviction.scop=global",
        "misses.keep=perhaps",
        "refresh.period=3",
    ],
)
def test_a_change_that_makes_no_sense_is_refused(setting):
    with pytest.raises(PolicyError):
        with_setting(load_system("LRU"), setting)
