"""The papers set up again: facts as collected, closed forms, and docs/papers.md as the command prints it."""

from __future__ import annotations

import csv
import re
from itertools import pairwise
from pathlib import Path

import pytest

from moesim.errors import ValidationError
from validate.papers import adapmoe, hexa, targets
from validate.papers.claim import Claim, cut, mean
from validate.papers.report import claim_line, headline, markdown, text
from validate.papers.systems import PAPERS, answer, choose, summarise

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NUMBERS = ROOT.parent / "shared" / "numbers" / "seed_numbers.csv"
LABELS = ("system", "metric", "model", "gpu", "setting", "baseline")
ALL = [claim for claims in PAPERS.values() for claim in claims]


def claim(reported: float, predicted: float) -> dict:
    return Claim("X", "what", reported, (), lambda: predicted, why="because").answer()


# -- what a claim is ----------------------------------------------------------------------------------------------


def test_a_claim_counts_within_a_factor_and_in_the_right_direction_only():
    assert claim(2.0, 2.4)["status"] == "reproduced" and claim(2.0, 2.4)["reason"] == ""
    assert claim(2.0, 2.6)["status"] == "off" and claim(2.0, 2.6)["reason"] == "because"
    wrong = claim(1.1, 0.95)
    assert wrong["status"] == "wrong direction" and not wrong["within"], "near, but the other way"
    assert claim(0.99, 1.1)["within"], "a ratio of about 1 has no direction"
    assert Claim("X", "what", 2.0, (), None, why="no").answer()["status"] == "not set up"


def test_reductions_and_means():
    assert cut(50) == 2 and mean([1.0, 4.0]) == 2


def test_counts():
    rows = [claim(2.0, 2.0) | {"main": True}, claim(2.0, 5.0), claim(1.2, 0.9)]
    found = summarise([*rows, Claim("X", "w", 2.0, (), None).answer()])
    assert found["main_reproduced"] == 1 and found["reproduced"] == 1 and found["claims"] == 3
    assert found["directions_wrong"] == 1 and found["not_set_up"] == 1 and found["by_kind"] == {"time": [1, 3]}


# -- the set-ups --------------------------------------------------------------------------------------------------


def test_all_twelve_have_one_main_claim_each():
    assert len(PAPERS) == 12
    assert all(sum(c.main for c in claims) == 1 for claims in PAPERS.values())
    assert all(c.facts and c.system == name for name, claims in PAPERS.items() for c in claims)
    assert len({(c.system, c.what) for c in ALL}) == len(ALL)


def test_what_is_not_set_up_says_why():
    assert all(c.why for c in ALL if c.predict is None)


def test_reported_values_are_those_collected():
    if not NUMBERS.is_file():
        pytest.skip("the collection of published numbers is not beside this checkout")
    with NUMBERS.open(newline="", encoding="utf-8") as file:
        known = {(*(row[name] for name in LABELS), row["value"]) for row in csv.DictReader(file)}
    known = {(*labels, float(value)) for *labels, value in known if value}
    missing = [fact for c in ALL for fact in c.facts if tuple(fact) not in known]
    assert not missing


def test_reported_ratios_follow_from_their_facts():
    """One fact: its factor, or the cut it states; two: the first over the second."""
    for c in ALL:
        values = [fact.value for fact in c.facts]
        if c.system in ("AdapMoE", "HEXA-MoE") or len(values) > 2:
            continue
        options = {values[0], cut(values[0]) if values[0] < 100 else 0.0, values[0] / values[-1]}
        assert any(c.reported == pytest.approx(option) for option in options), c.what


def test_choose():
    assert choose("eep, MC") == ["MC", "EEP"] and choose(None) == list(PAPERS)
    with pytest.raises(ValidationError, match=r"hobit.*hobbit"):
        choose("hobit")


# -- closed forms -------------------------------------------------------------------------------------------------


def test_hobbit_anchors():
    assert targets.layer_load_ms() * 25.5 / 32 == pytest.approx(88, rel=0.01), "8 x 352 MB at the nominal rate"
    assert targets.layer_compute_ms() == pytest.approx(3, rel=0.25)
    assert 1 / targets.bytes_per_miss() == pytest.approx(1.34, abs=0.01)


def test_adapmoe_allocation_falls_with_slots_and_beats_an_even_split():
    found = [targets.expected_loads(slots) for slots in (32, 64, 128, 256)]
    assert all(more[0] < fewer[0] for fewer, more in pairwise(found))
    assert all(best <= even + 1e-9 for best, even in found)
    assert found[0][0] == pytest.approx(found[0][1]), "one slot a layer leaves no choice"
    assert found[-1][0] == pytest.approx(0), "with all experts cached nothing is loaded"
    assert adapmoe.CACHED == 64


def test_mc_times_have_a_floor():
    floor, error = targets.floor_share()
    assert 0.4 < floor < 0.6 and error < 0.1


def test_hexa_shares_are_the_papers():
    first = [hexa.shares(tuple(t for _, t in times))[0] for times in hexa.CASES.values()]
    assert first == pytest.approx([0.40, 0.50, 0.74], abs=0.006)
    assert 1 - 1 / hexa.gain("case3") == pytest.approx(0.48, abs=0.01)
    assert hexa.gain("case2") == pytest.approx(1, abs=0.01)


def test_samoyeds_wave_model_follows_its_sweep():
    assert targets.sweep_error() < 0.1


def test_sida_launches_explain_its_gain_at_most():
    assert targets.launches(256) / targets.launches(51) == pytest.approx(3.93, rel=0.1)


# -- the page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["HEXA-MoE", "SEER-MoE", "MEO"])
def test_the_page_holds_what_the_command_prints(system):
    rows, found = answer(system)
    for row in rows:
        assert claim_line(row, reasons=row["main"]) in PAGE, "docs/papers.md: paste papers.md of the command again"
    for target in found:
        assert f"| {target['number']} | {target['what']} | {target['reported']} | {target['computed']} |" in PAGE


def test_the_page_lists_every_claim_and_its_own_counts():
    listed = set(re.findall(r"^\| ([\w-]+) \| (.+?) \| [\d.]+ \|", PAGE, re.MULTILINE))
    assert {(c.system, c.what) for c in ALL} <= listed
    counts = re.search(r"\*\*(\d+) of 12\*\* main claims", PAGE)
    main = PAGE.split("### Main claims")[1].split("###")[0]
    assert counts and main.count("| reproduced |") == int(counts[1])


def test_reports_tell_failures():
    rows = [claim(2.0, 5.0) | {"main": True}, *answer("HEXA-MoE")[0][1:]]
    result = {"status": "failed", "claims": rows, "summary": summarise(rows), "targets": [], "factor": 1.25}
    assert "FAILED; 0 of 1 main claims" in headline(result)
    assert "training" in text(result) and "### Reasons" in markdown(result)
