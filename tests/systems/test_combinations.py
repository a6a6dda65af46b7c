"""Any part of any system beside the others of any other: it runs, or a message says why it makes no sense."""

from __future__ import annotations

from dataclasses import fields

import pytest

from moesim.errors import PolicyError
from moesim.question import Question, Run, run
from moesim.records import Records
from moesim.systems import SYSTEMS, load_system, with_setting, with_settings
from moesim.systems.settings import FIXED
from moesim.systems.system import System
from tests.conftest import small_trace

PARTS = [f.name for f in fields(System) if f.name not in FIXED]
TRACE = small_trace(requests=3, tokens=45, weights=True)


def donors():
    """(part, system) for every different value of each part."""
    for part in PARTS:
        seen = []
        for name in SYSTEMS:
            value = getattr(load_system(name), part)
            if value not in seen:
                seen.append(value)
                yield part, name


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_every_part_of_every_other_system_combines_or_is_refused_with_a_reason(name, small_config):
    base, ran = load_system(name), 0
    question = Question(model=str(small_config), expert_memory=28 << 20)
    for part, donor in donors():
        try:
            system = with_setting(base, f"{part}={donor}")
        except PolicyError as refused:
            remedies = ("; set ", "; start from ", "misses.keep is false")
            assert any(remedy in str(refused) for remedy in remedies), refused
            continue
        result = run(TRACE, system, question, anchors=False)
        assert result.summary["metrics"]["completed"] == 3, f"{part}={donor}"
        ran += 1
    assert ran >= len(PARTS)


def test_the_line_of_the_manual():
    system = with_settings(load_system("fMoE"), ["misses=HOBBIT", "eviction.score=lru:0.4,lfu:0.3,fld:0.3"])
    assert system.misses == load_system("HOBBIT").misses and system.predictor == load_system("fMoE").predictor
    assert system.eviction.score == (("lru", 0.4), ("lfu", 0.3), ("near", 0.3)), "fld is another name of near"
    assert "may only decide ties" in system.eviction.outweighed
    assert not load_system("HOBBIT").eviction.outweighed


def test_choices_that_need_each_other_can_be_set_in_any_order():
    both = ["misses.rule=precision", "misses.low_bits=4.5"]
    assert with_settings(load_system("LRU"), both) == with_settings(load_system("LRU"), both[::-1])
    pinned = ["placement=static", "misses=static"]
    assert with_settings(load_system("LRU"), pinned) == with_settings(load_system("LRU"), pinned[::-1])
    for one in (*both[:1], *pinned[:1]):
        with pytest.raises(PolicyError):
            with_setting(load_system("LRU"), one)


def test_any_part_can_be_named_by_the_system_that_has_it():
    lru = load_system("LRU")
    assert with_setting(lru, "predictor=HOBBIT").predictor == load_system("HOBBIT").predictor
    assert with_setting(lru, "scheduling=eMoE").scheduling == load_system("eMoE").scheduling
    assert with_setting(lru, "kernel=Samoyeds").kernel == "samoyeds"
    assert with_setting(lru, "expert_bits=Samoyeds").expert_bits == load_system("Samoyeds").expert_bits
    assert not with_settings(lru, ["cache=on-demand", "misses=on-demand"]).cache
    assert with_setting(load_system("AdapMoE"), "prefetch.per_layer=none").prefetch.per_layer is None
    assert with_setting(load_system("eMoE"), "refresh.insensitive=CLSFY").refresh.insensitive == ("CLSFY",)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("LRU", ["eviction.score=lru:nan"], "features and weights"),
        ("LRU", ["eviction.score=lru:0.5,fdl:0.5"], "did you mean 'fld'"),
        ("eMoE", ["refresh.predictor_params=-1"], "at least 0"),
        ("eMoE", ["refresh.predictor_params=inf"], "a number"),
        ("eMoE", ["refresh.period=2.5"], "a whole number"),
        ("HOBBIT", ["misses.low_bits=-4"], "above 0"),
        ("HOBBIT", ["misses.thresholds=0.5"], "two numbers"),
        ("LRU", ["expert_bits=-1"], "above 0"),
        ("fMoE", ["eviction.score=lru:1", "eviction.combine=product"], "may be negative"),
        ("LRU", ["expert_bits=nan"], "unknown policy 'nan'"),
        ("LRU", ["predictor=hobit"], "did you mean 'HOBBIT'"),
        ("LRU", ["predictor=transitions(top=1.5)"], "a whole number"),
        ("LRU", ["prefetch.per_layer=2"], "set a predictor as well"),
        ("LRU", ["eviction=fMoE"], "needs beliefs"),
        ("LRU", ["eviction=eMoE"], "set refresh=eMoE as well"),
        ("MC", ["eviction=LFU"], "--policy LRU --set transforms=MC"),
        ("on-demand", ["eviction=LFU"], "no cache to evict from"),
        ("MEO", ["all_resident=false", "placement=LRU", "misses=eMoE"], "belong to one request"),
        ("LRU", ["scheduling.x=1"], "FCFS has none"),
        ("EEP", ["transforms.experts=2"], "transforms=NAME"),
    ],
)
def test_what_makes_no_sense_is_explained(name, settings, told):
    with pytest.raises(PolicyError, match=told):
        with_settings(load_system(name), settings)


def test_an_accuracy_stated_for_other_routers_is_told(small_config):
    notes = run(
        TRACE, "AdapMoE", Question(model=str(small_config)), ["transforms=EEP(experts=4)"], anchors=False
    ).summary["notes"]  # fmt: skip
    assert any("state it anew" in note for note in notes)


def test_an_infeasible_run_leaves_no_tables(small_config, tmp_path):
    served = run(TRACE, "LRU", Question(model=str(small_config), slots_per_layer=2), anchors=False)
    served.save(tmp_path)
    assert (tmp_path / "requests.parquet").exists()
    Run({"status": "OOM"}, Records(detail=False), ()).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"], "nor those of the run before"
