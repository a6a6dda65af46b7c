"""Prices and energy: one source, dated; what files must be; the numbers by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import date

import pytest

from moesim.errors import MachineError
from moesim.machine import catalogue, load_machine, priced
from moesim.metrics import busy_share_energy, cost_metrics
from moesim.prices import read_prices, shipped_prices

HEAD = "machine,usd_per_hour,purchase_usd,years,date,source\n"
NUMBERS = {
    "output_throughput": 1000.0, "total_token_throughput": 4000.0, "duration_s": 10.0, "total_output_tokens": 10_000,
}  # fmt: skip


def write(tmp_path, rows, head=HEAD):
    (tmp_path / "p.csv").write_text(head + rows)
    return tmp_path / "p.csv"


def test_every_shipped_price_is_of_a_machine_and_has_a_date_and_a_source():
    for name, prices in shipped_prices().items():
        assert catalogue()[name].prices is prices
        assert prices.source and date.fromisoformat(prices.date) and prices.known


def test_a_purchase_is_spread_over_every_hour_of_its_years(tmp_path):
    found = read_prices(write(tmp_path, "rtx-4090,,1752,2,2026-01-05,shop\n8xh200-sxm,40,,,2026-01-05,\n"))
    assert found["rtx-4090"].known == pytest.approx(0.1)
    eight = priced(load_machine("8xh200"), found)
    assert eight.prices.known == 5 and eight.usd_per_hour == 40 and eight.prices.source == "p.csv"
    assert priced(load_machine("2xrtx-4090"), found).usd_per_hour == pytest.approx(0.2)
    assert priced(load_machine("l4"), found) == load_machine("l4")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,1,,,today,x\n", "line 2: date 'today' must be a day"),
        ("a,1,,,,x\n", "line 2: date '' must be a day"),
        ("a,-1,,,2026-01-05,x\n", "line 2: usd_per_hour '-1' must be a number above 0"),
        ("a,nan,,,2026-01-05,x\n", "usd_per_hour 'nan' must be a number"),
        ("a,,,,2026-01-05,x\n", "line 2: no price of a"),
        ("a,,100,,2026-01-05,x\n", "not parts of both"),
        ("a,1,100,2,2026-01-05,x\n", "not parts of both"),
        ("a,1,,,2026-01-05,x\na,2,,,2026-01-05,x\n", "line 3: machine 'a' must be a name that no other line has"),
        (",1,,,2026-01-05,x\n", "machine '' must be"),
    ],
)
def test_bad_price_files_are_named_by_line(tmp_path, rows, message):
    with pytest.raises(MachineError) as error:
        read_prices(write(tmp_path, rows))
    assert message in str(error.value)


def test_price_files_without_a_date_or_that_are_none(tmp_path):
    with pytest.raises(MachineError, match="column 'date' is missing"):
        read_prices(write(tmp_path, "a,1\n", "machine,usd_per_hour\n"))
    with pytest.raises(MachineError, match="cannot be read"):
        read_prices(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00machine")
    with pytest.raises(MachineError, match="not a CSV"):
        read_prices(tmp_path / "b.csv")


def test_cost_and_energy_by_hand():
    h200 = load_machine("2xh200")  # 2 x $5.75 and 2 x 700 W
    found = cost_metrics(h200, NUMBERS)
    assert found["usd_per_million_output_tokens"] == pytest.approx(11.5 / 3.6)  # a million tokens take 1,000 s
    assert found["usd_per_million_tokens"] == pytest.approx(11.5 / 3.6 / 4)
    energy = busy_share_energy(h200, 6_000_000_000, NUMBERS)
    assert energy["joules_per_output_token"] == pytest.approx(2 * 700 * 6 / 10_000) and energy["busy_share"] == 0.6
    idling = replace(h200, gpu=replace(h200.gpu, idle_w=70.0))
    energy = busy_share_energy(idling, 6_000_000_000, NUMBERS)
    assert energy["joules_per_output_token"] == pytest.approx(2 * (700 * 6 + 70 * 4) / 10_000)
    both = load_machine("l4+t4")
    assert busy_share_energy(both, 6_000_000_000, NUMBERS)["joules_per_output_token"] == pytest.approx(142 * 6 / 10_000)
    assert both.usd_per_hour is None and load_machine("l4+l40s").usd_per_hour == pytest.approx(0.8 + 0.85)
    unknown = load_machine("strix-halo")
    assert cost_metrics(unknown, NUMBERS)["usd_per_million_tokens"] is None
    assert busy_share_energy(unknown, 1, NUMBERS)["joules_per_output_token"] is None


def test_a_machine_file_has_its_own_price(tmp_path):
    (tmp_path / "box.yaml").write_text("from: h200\nprices: {usd_per_hour: 1.5, date: 2026-02-03, source: our bill}\n")
    prices = load_machine(tmp_path / "box.yaml").prices
    assert (prices.known, prices.date, prices.source, prices.usd_per_hour_low) == (1.5, "2026-02-03", "our bill", None)
    (tmp_path / "box.yaml").write_text("from: h200\nprices: {usd_per_hour: 1.5, date: soon}\n")
    with pytest.raises(MachineError, match=r"prices\.date: 'soon' must be a day"):
        load_machine(tmp_path / "box.yaml")


def test_replay_says_what_tokens_cost_and_what_that_rests_on(tmp_path, small_config, trace_file, call):
    words = (
        "replay",
        trace_file,
        "--model",
        small_config,
        "--machine",
        "rtx-4090",
        "--no-anchors",
        "--engine",
        "events",
    )
    code, out, _ = call(*words, "--json")
    without = json.loads(out)
    assert code == 0 and without["metrics"]["usd_per_million_output_tokens"] is None
    assert without["price"]["usd_per_hour"] is None and "--prices" in without["price"]["source"]
    assert without["metrics"]["joules_per_output_token"] > 0 and without["energy"]["tdp_w"] == 450
    file = write(tmp_path, "rtx-4090,0.36,,,2026-01-05,us\n")
    summary = json.loads(call(*words, "--json", "--prices", file)[1])
    assert summary["metrics"]["usd_per_million_output_tokens"] == pytest.approx(
        100 / summary["metrics"]["output_throughput"]
    )
    assert summary["price"] == {"usd_per_hour": 0.36, "date": "2026-01-05", "source": "us"}
    page = call(*words, "--prices", file)[1]
    assert "at $0.36 per hour (us, 2026-01-05)" in page and "450 W (TDP by specification)" in page
    assert "price         none: no price is known" in call(*words)[1]


def test_plan_and_whatif_go_by_the_same_prices(tmp_path, small_config, trace_file, call):
    file = write(tmp_path, "rtx-4090,0.36,,,2026-01-05,us\n")
    whatif = ("whatif", trace_file, "--model", small_config, "--num-prompts", 1, "--engine", "events", "--json")
    assert json.loads(call(*whatif, "--prices", file)[1])["usd_per_hour"] == 0.36
    plan = (
        "plan", "--model", small_config, "--policies", "all-resident", "--bits", 16, "--random-input-len", 4,
        "--random-output-len", 3, "--max-concurrency", 1, "--json",
    )  # fmt: skip
    best = json.loads(call(*plan, "--budget", 0.3, "--prices", file)[1])["best"]
    assert best["machine"] == "a30" and best["usd_per_hour"] == 0.29
    best = json.loads(call(*plan, "--machine", "rtx-4090", "--prices", file)[1])["best"]
    assert best["usd_per_million_output_tokens"] == pytest.approx(100 / best["output_throughput"])
