"""A policy in a user's own file: every method decides what it says it does, and mistakes name their line."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from moesim.cli import main
from moesim.engine.residency import H2D, SKIPPED
from moesim.engine.simulate import simulate
from moesim.errors import PolicyError
from moesim.policies import Eviction, Misses, Prefetch
from moesim.policies.eviction import FEATURES
from moesim.prediction import RequestCounts
from moesim.question import Question, run
from moesim.systems import System, load_system, with_settings
from moesim.trace import WEIGHT_ONE
from tests.conftest import ROOT, small_trace
from tests.fakes import make_trace
from tests.scenes import random_trace, serve, setting

EXAMPLE = ROOT / "docs" / "examples" / "my_policy.py"


def lru(**parts):
    return replace(load_system("LRU"), **parts)


def copied(out):
    t = out.records.transfers
    mine = t.column("link") == H2D
    return list(zip(t.column("layer")[mine].tolist(), t.column("expert")[mine].tolist(), strict=True))


# -- each method --------------------------------------------------------------------------------------------------


class Oldest:
    def score(self, expert):
        return expert.fifo


class Idle:
    """LRU once more, by picking: experts come least recently used first."""

    def victim(self, experts):
        return experts[0]


@pytest.mark.parametrize(("own", "name"), [(Oldest(), "FIFO"), (Idle(), "LRU")])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_rule_of_ones_own_decides_as_the_declared_one_does(own, name, scope):
    trace = random_trace(60, 3, 8, 2, seed=3, requests=2)
    mine = serve(trace, lru(eviction=Eviction(own=own, scope=scope)), 3, concurrency=2)
    theirs = serve(trace, load_system(f"{name}(scope='{scope}')"), 3, concurrency=2)
    assert mine.counts == theirs.counts and mine.elapsed_ns == theirs.elapsed_ns
    assert mine.records.transfers.to_arrow().equals(theirs.records.transfers.to_arrow())


class Feature:
    def __init__(self, name):
        self.name = name

    def score(self, expert):
        return getattr(expert, self.name)


@pytest.mark.parametrize("name", sorted(set(FEATURES) - {"belady"}))
def test_every_feature_is_there_under_its_name(name):
    trace = random_trace(60, 3, 8, 2, seed=4, requests=4, prompt=2)
    base = replace(load_system("eMoE(period=1)"), misses=Misses(), predictor=RequestCounts())
    declared, own = (replace(base, eviction=e) for e in (Eviction(((name, 1.0),)), Eviction(own=Feature(name))))
    one, two = (serve(trace, system, 3, concurrency=2) for system in (declared, own))
    assert one.counts == two.counts and one.counts.evictions and one.elapsed_ns == two.elapsed_ns


def test_no_feature_looks_ahead():
    with pytest.raises(PolicyError, match="has no 'belady'"):
        serve(random_trace(60, 3, 8, 2, seed=4), lru(eviction=Feature("belady")), 3)
    with pytest.raises(PolicyError, match="did you mean 'lru'"):
        serve(random_trace(60, 3, 8, 2, seed=4), lru(eviction=Feature("lur")), 3)


class Cheaper:
    def on_miss(self, miss):
        return "host" if miss.host_ns <= miss.fetch_ns else "fetch"


def test_a_miss_rule_of_ones_own_may_use_the_host():
    trace = random_trace(40, 2, 8, 2, seed=1)
    mine, theirs = (serve(trace, lru(misses=rule), 3) for rule in (Cheaper(), Misses("cheaper")))
    assert mine.counts == theirs.counts and mine.elapsed_ns == theirs.elapsed_ns and mine.counts.hosted


class NeverLight:
    def on_miss(self, miss):
        self.seen = (miss.layer, miss.expert, miss.tokens)
        return "skip" if miss.weight < 0.3 else "fetch"


def test_what_a_rule_skips_is_accounted_for():
    weights = np.array([[[0.75, 0.25]], [[0.5, 0.5]]], dtype=np.float16)
    trace = replace(make_trace([[[0, 1]], [[2, 3]]], 4), weights=weights)
    out = serve(trace, lru(misses=NeverLight()), 4)
    assert copied(out) == [(0, 0), (0, 2), (0, 3)], "the expert of weight 0.25 is left out"
    assert out.counts.altered[SKIPPED].tolist() == [[WEIGHT_ONE // 4]]
    assert out.counts.hits + out.counts.lates + out.counts.misses == out.counts.lookups


class SameAgain:
    """Believes what the token before chose; copies one, and never an expert that is there."""

    def predict(self, trace, seed):
        named = np.full_like(trace.experts, -1)
        named[1:] = trace.experts[:-1]
        return named

    def prefetch(self, layer, experts, resident):
        assert not any(expert < 0 for expert in experts)
        return [expert for expert in experts if expert not in resident][:1]


def test_beliefs_and_choices_of_ones_own_are_prefetched():
    trace = make_trace([[[0], [1]], [[2], [3]], [[2], [1]]], 4)
    out = serve(trace, lru(predictor=SameAgain(), prefetch=SameAgain()), 1)
    assert copied(out) == [(0, 0), (1, 1), (0, 2), (1, 3), (1, 1)], "1 of layer 1 is believed in and there already"
    away = serve(make_trace([[[0], [1]], [[2], [3]], [[2], [3]], [[2], [1]]], 4), lru(predictor=SameAgain()), 2)
    assert away.counts.prefetched == 0


class FirstLayer:
    def split(self, total, expert_bytes, experts):
        rest = [expert_bytes[0]] * (len(expert_bytes) - 1)
        return [total - sum(rest), *rest]

    def start(self, popularity):
        return [(0, expert) for expert in range(popularity.shape[1])]


class LastCome:
    def admit(self, waiting, running, now):
        return len(waiting) - 1 if waiting else None


def test_capacity_placement_and_scheduling_of_ones_own():
    trace = random_trace(40, 2, 4, 1, seed=2, requests=4)
    out = serve(trace, lru(capacity=FirstLayer(), placement=FirstLayer(), scheduling=LastCome()), 3)
    assert 0 not in [layer for layer, _ in copied(out)], "five slots hold layer 0 from the start"
    assert out.records.requests.column("request").tolist() == [3, 2, 1, 0]


class Counting:
    """Keeps a count, which must start anew with every run."""

    def __init__(self):
        self.asked = 0

    def score(self, expert):
        self.asked += 1
        return expert.lru if self.asked < 40 else -expert.lru


def test_what_a_policy_remembers_stays_within_a_run():
    trace, own = random_trace(60, 2, 8, 2, seed=5), Counting()
    one, two = (serve(trace, lru(eviction=own), 3) for _ in range(2))
    assert one.counts == two.counts and own.asked == 0


def test_one_object_may_decide_several_things_and_knows_what_it_learnt():
    class Both(SameAgain):
        def predict(self, trace, seed):
            self.tokens = trace.tokens
            return super().predict(trace, seed)

        def score(self, expert):
            return expert.lru % self.tokens

    own = Both()
    system = lru(eviction=own, predictor=own, prefetch=own)
    assert serve(random_trace(30, 2, 8, 2, seed=6), system, 3).counts.lookups
    assert [part for part, _ in system.own] == ["eviction", "predictor", "prefetch"]


def test_only_the_event_engine_runs_what_is_asked_in_mid_run():
    assert load_system("HOBBIT").undeclared == load_system("eMoE").undeclared == ""
    assert lru(predictor=SameAgain(), capacity=FirstLayer()).undeclared == "", "asked before the clock starts"
    assert "eviction decided by Oldest" in lru(eviction=Oldest()).undeclared


def test_a_field_that_ones_own_rule_does_not_ask_for_is_refused():
    for own, field in ((lru(eviction=Oldest()), "eviction.score=lru"), (lru(misses=Cheaper()), "misses.rule=host")):
        with pytest.raises(PolicyError, match="is decided by"):
            with_settings(own, [field])
    assert with_settings(lru(eviction=Oldest()), ["eviction=LFU", "eviction.scope=global"]).own == ()


# -- files --------------------------------------------------------------------------------------------------------


def written(tmp_path, body, name="mine.py"):
    (tmp_path / name).write_text(body)
    return str(tmp_path / name)


def test_the_example_of_the_manual_is_short_and_serves(small_config):
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    s = run(small_trace(), f"{EXAMPLE}:MyPolicy(most=2)", Question(model=str(small_config), slots_per_layer=3)).summary
    assert s["status"] == "FITS" and s["metrics"]["completed"] == 6
    assert s["inputs"]["system"]["eviction"]["own"] == {"kind": "MyPolicy", "most": 2}
    assert any("sha256" in note for note in s["notes"]) and any("decided by MyPolicy" in note for note in s["notes"])


def test_a_file_may_define_a_function_a_system_or_an_object(tmp_path):
    path = written(tmp_path, """
from dataclasses import dataclass
from helper import scope
from moesim.systems import System, load_system
from moesim.policies import Eviction

def frugal(weight=1.0):
    return System("frugal", eviction=Eviction((("lru", weight),), scope=scope))

ready = frugal(2.0)

@dataclass
class Mine:
    base: str = "HOBBIT"
    def score(self, expert):
        return expert.fld
    def on_miss(self, miss):
        return "fetch"

made = Mine("LFU")
""")  # fmt: skip
    written(tmp_path, "scope = 'global'", "helper.py")
    assert load_system(f"{path}:frugal(weight=3.0)").eviction == Eviction((("lru", 3.0),), scope="global")
    assert load_system(f"{path}:ready").name == "frugal"
    own = load_system(f"{path}:Mine")
    assert own.eviction.scope == "global" and own.predictor == load_system("HOBBIT").predictor, "HOBBIT's, but for two"
    assert own.misses.rule == "fetch" and own.quality is None
    assert load_system(f"{path}:made").eviction.scope == "layer"
    taken = with_settings(load_system("fMoE"), [f"eviction={path}:Mine", f"misses={path}:Mine"])
    assert type(taken.eviction.own).__name__ == "Mine" and taken.predictor == load_system("fMoE").predictor


CASES = {
    "": ("{}:Mine", "has no 'Mine'; it defines nothing to use"),
    "x = 1\ny = = 2\n": ("{}:Mine", "mine.py, line 2: SyntaxError"),
    "import numpy\nnumpy.nothing()\n": ("{}:Mine", "line 2: AttributeError"),
    "raise SystemExit(3)\n": ("{}:Mine", "line 1: SystemExit"),
    "class Mine:\n    pass\n": ("{}:Mine", "without any of the methods score"),
    "class Mine:\n    def scoer(self, e): ...\n": ("{}:Mine", "without any of the methods score"),
    "def Mine():\n    return {}\n": ("{}:Mine", "gives a dict"),
    "class Mine:\n    def score(self, e): ...\n": ("{}:Mien", "did you mean 'Mine'"),
    "class Mine:\n    def __init__(self): 1 / 0\n": ("{}:Mine", "line 2: Mine: ZeroDivisionError"),
    "class Mine:\n    base = 'LUR'\n    def score(self, e): ...\n": ("{}:Mine", "did you mean 'LRU'"),
    "class Mine:\n    base = 3\n    def score(self, e): ...\n": ("{}:Mine", "base 3 must be a System"),
    "class Mine:\n    base = 'MC'\n    def score(self, e): ...\n": ("{}:Mine", "keeps every expert on the device"),
    "class Mine:\n    def prefetch(self, layer, experts, resident): ...\n": ("{}:Mine", "predicts nothing"),
    "class Mine: ...\n": ("{}", "name the class in it; known: Mine"),
    "class Mine:\n    def score(self, e): ...\n#": ("{}:Mine(most=1)", "TypeError"),
    "class Mine:\n    def score(self, e): ...\n##": ("{}:Mine(1)", "write arguments as name=value"),
}


@pytest.mark.parametrize("body", CASES)
def test_a_file_that_makes_no_sense_is_refused(body, tmp_path):
    spec, told = CASES[body]
    with pytest.raises(PolicyError, match=told.replace("(", r"\(")) as error:
        load_system(spec.format(written(tmp_path, body)))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PolicyError, match=r"no such file; write the policy as FILE\.py:CLASS"):
        load_system(f"{tmp_path}/none.py:Mine")


# -- nonsense while it runs ---------------------------------------------------------------------------------------


@dataclass
class Says:
    """Answers everything with `answer`, or raises it."""

    answer: object

    def _say(self, *arguments):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    score = victim = on_miss = predict = prefetch = split = admit = start = apply = _say


def only(part, answer):
    says = Says(answer)
    if part == "score":
        return lru(eviction=type("Scores", (), {"score": lambda self, expert: answer})())
    if part == "transforms":
        return lru(transforms=(says,))
    return lru(**{part: says})


@pytest.mark.parametrize(
    ("part", "answer", "told"),
    [
        ("score", "high", "Scores.score returned 'high' for expert"),
        ("score", float("nan"), "returned nan"),
        ("score", None, "returned None"),
        ("eviction", 3, "Says.victim returned 3; it must return one of the experts"),
        ("misses", "drop", "Says.on_miss returned 'drop' for expert"),
        ("prefetch", 5, "Says.prefetch returned 5"),
        ("prefetch", [99], "ids go from 0 to 7"),
        ("predictor", None, "Says.predict returned None"),
        ("predictor", np.zeros((3, 2, 1), int), "of shape (3, 2, 1)"),
        ("predictor", np.zeros((40, 2, 1)), "type float64"),
        ("predictor", np.full((40, 2, 1), 16), "among experts 0 to 7"),
        ("capacity", [1 << 40] * 2, "Says.split returned"),
        ("capacity", "all", "Says.split returned 'all'"),
        ("scheduling", 7, "Says.admit returned 7 with"),
        ("scheduling", None, "nothing would ever be served"),
        ("placement", [(0, 8)], "2 layers of 8 experts"),
        ("placement", 1, "Says.start returned 1"),
        ("eviction", ValueError("oh"), "test_own_policy.py, line"),
        ("predictor", KeyError("oh"), "Says.predict raised KeyError"),
        ("scheduling", KeyError("oh"), "Says.admit raised KeyError"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_rule_it_breaks(part, answer, told):
    trace = random_trace(40, 2, 8, 2, seed=1)
    system = only(part, answer)
    if part == "prefetch":
        system = replace(system, predictor=SameAgain())
    with pytest.raises(PolicyError) as error:
        simulate(setting(trace, 3), system)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_object_without_the_method_is_refused():
    for part, method in (("eviction", "score"), ("misses", "on_miss"), ("prefetch", "prefetch"), ("capacity", "split")):
        with pytest.raises(PolicyError, match=method):
            System("x", **{part: object()})
    with pytest.raises(PolicyError, match="fetch beside it"):
        Misses("host", own=Cheaper())
    assert Prefetch(own=SameAgain()).own


def test_a_transform_of_ones_own_must_give_a_transformed(small_config):
    with pytest.raises(PolicyError, match=r"Says\.apply returned 1; it must return Transformed"):
        run(small_trace(), only("transforms", 1), Question(model=str(small_config)))


# -- the command ----------------------------------------------------------------------------------------------------


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        import sys

        sys.argv = ["moesim", *map(str, arguments)]
        main()
    out = capsys.readouterr()
    return ended.value.code, out.out, out.err


def test_policy_check_tells_by_its_exit_code(capsys, tmp_path):
    code, out, _ = command(capsys, "policy", "check", f"{EXAMPLE}:MyPolicy")
    assert code == 0 and "8 hold, 0 broken" in out
    peeks = written(tmp_path, "class Peeks:\n    def predict(self, trace, seed):\n        return trace.experts\n")
    code, out, _ = command(capsys, "policy", "check", f"{peeks}:Peeks", "--json")
    assert code == 1 and json.loads(out)["broken"] == ["causality"]
    code, out, err = command(capsys, "policy", "check", f"{peeks}:Nothing")
    assert code == 2 and not out and err.startswith("error: ")
    code, out, _ = command(capsys, "policy", "check", "LRU", "--set", f"predictor={peeks}:Peeks", "-o", tmp_path / "r")
    assert code == 1 and not out and "BROKEN  causality" in (tmp_path / "r").read_text()
