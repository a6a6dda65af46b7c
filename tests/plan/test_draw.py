"""Large spaces and systems composed anew: drawn, kept in a file, and beside what is published."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from typer.testing import CliRunner

from moesim.cli import app
from moesim.errors import MoesimError
from moesim.plan import search
from moesim.plan.search import Asked, Space, plan
from moesim.systems import load_system, with_settings
from tests.plan.test_search import MODEL, machine

SPACE = Space([machine("l4", 580), machine("a10", 580)], [32.0, 8.5], ["LRU", "LFU", "Fiddler"], [1, 2])
ASKED = Asked(4, 6, seed=1)


@pytest.fixture
def unexplained(monkeypatch):
    monkeypatch.setattr(search, "_sure", lambda row, asking, choice: [])
    monkeypatch.setattr(search, "_explained", lambda *given: {})
    monkeypatch.setattr(search, "_difference", lambda best, other, ends, asked: {"of": search._name_of(other)})


def test_of_a_large_space_so_many_are_drawn_and_again_the_same(unexplained):
    found = plan(MODEL, SPACE, ASKED, trials=8)
    assert 0 < len(found["candidates"]) + len(found["excluded"]) <= 8 < len(SPACE.choices())
    assert found == plan(MODEL, SPACE, ASKED, trials=8)


def test_enough_draws_find_the_front_of_the_whole_space(unexplained):
    whole = plan(MODEL, SPACE, ASKED, prune=False)
    drawn = plan(MODEL, SPACE._replace(bits=[32.0]), ASKED, trials=11)
    few = plan(MODEL, SPACE._replace(bits=[32.0]), ASKED, prune=False)
    assert drawn["best"]["output_throughput"] >= 0.9 * few["best"]["output_throughput"]
    assert whole["best"]["output_throughput"] >= few["best"]["output_throughput"]


def test_systems_composed_anew_are_beside_the_published_and_leave_outputs_as_they_are(unexplained):
    found = plan(MODEL, SPACE._replace(policies=["LRU"], bits=[32.0]), ASKED, trials=12, composed=["LRU"])
    anew = [row for row in found["candidates"] if row["settings"]]
    assert anew and any(not row["settings"] for row in found["candidates"])
    for row in anew:
        assert not with_settings(load_system(row["policy"]), row["settings"]).misses.changes_outputs
    best = found["best"]
    other = best["over_published"] if best["settings"] else best["over_composed"]
    assert bool(other["of"]["settings"]) != bool(best["settings"])


def test_thresholds_are_drawn_where_precision_depends_on_them(unexplained):
    space = SPACE._replace(policies=["HOBBIT"], bits=[32.0])
    found = plan(MODEL, space, ASKED, trials=6, composed=["HOBBIT"])
    thresholds = {s for row in found["candidates"] for s in row["settings"] if s.startswith("misses.thresholds=")}
    assert len(thresholds) > 1


def test_a_second_search_goes_on_from_the_file(tmp_path, monkeypatch, unexplained):
    file = tmp_path / "study.log"
    first = plan(MODEL, SPACE, ASKED, trials=4, study=file)
    asked = []
    simulated = search._simulated
    monkeypatch.setattr(search, "_simulated", lambda *given: asked.append(given) or simulated(*given))
    again = plan(MODEL, SPACE, ASKED, trials=4, study=file)
    assert not asked and again["candidates"] == first["candidates"]
    more = plan(MODEL, SPACE, ASKED, trials=7, study=file)
    assert len(asked) <= 3 and len(more["candidates"]) >= len(first["candidates"])


def test_draws_are_led_by_the_slos(tmp_path, unexplained):
    every = sorted(row["mean_tpot_ms"] for row in plan(MODEL, SPACE, ASKED, prune=False)["candidates"])
    promise = (("tpot", every[len(every) // 2]),)
    file = tmp_path / "study.log"
    found = plan(MODEL, SPACE, replace(ASKED, goodput=promise), prune=False, trials=8, study=file)
    trials = optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(file)))).trials
    kept = [json.loads(trial.user_attrs["row"])["keeps_slos"] for trial in trials]
    assert kept == [trial.constraints["slos"] <= 0 for trial in trials]
    assert set(kept) == {True, False} and found["best"]["keeps_slos"]


def test_a_file_that_is_no_study_is_refused(tmp_path, unexplained):
    file = tmp_path / "notes.txt"
    file.write_text("not a study\n")
    with pytest.raises(MoesimError, match=r"notes\.txt"):
        plan(MODEL, SPACE, ASKED, trials=2, study=file)
    assert file.read_text() == "not a study\n"


def test_without_optuna_the_remedy_is_named(monkeypatch, unexplained):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MoesimError, match=r"moesim\[plan\]"):
        plan(MODEL, SPACE, ASKED, trials=2)


def test_the_command(tmp_path):
    arguments = ["plan", "--model", "tiny-moe-8x16", "--machine", "l4", "--bits", "32", "--policies", "LRU",
                 "--max-concurrency", "1", "--random-input-len", "4", "--random-output-len", "4", "--compose", "LRU",
                 "--trials", "5", "--study", str(tmp_path / "study.log")]  # fmt: skip
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code == 0, run.output
    assert "LRU with eviction.score=" in run.stdout
