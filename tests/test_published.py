"""Published measurements: cases are read strictly, predicted as stated, and scored as documented."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesim import published
from moesim.cli import app
from moesim.errors import ValidationError
from moesim.metrics import CAUSES
from moesim.published import COLUMNS, SHIPPED, choose, predict, read_cases

ROW = {
    "id": "a-1", "group": "a", "source": "somewhere", "model": "tiny-moe-8x16", "machine": "rtx-4090",
    "system": "LRU; slots_per_layer=4", "prompt": "4", "output": "8", "concurrency": "1", "metric": "decode_tok_s",
    "value": "100", "trust": "high", "assumed": "",
}  # fmt: skip


def written(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_shipped_cases_are_read_and_each_has_a_source():
    cases = read_cases(SHIPPED)
    assert len(cases) == 236 and all(case.source and case.value > 0 for case in cases)
    two = next(case for case in cases if case.id == "ktv3-12")
    assert two.model.top_k == 6 and two.machine.host.sockets == 2 and two.machine.host.numa_duplicated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "decode_toks"}, "line 2: metric 'decode_toks' is none of"),
        ({"value": "0"}, "line 2: value 0 must be above 0"),
        ({"value": "fast"}, "line 2: could not convert"),
        ({"trust": "some"}, "line 2: trust 'some'"),
        ({"model": "mixtral-9x9b"}, "line 2: unknown model"),
        ({"model": "tiny-moe-8x16; bits=4"}, "line 2: model: unknown change 'bits'"),
        ({"model": "tiny-moe-8x16; top_k=99"}, "line 2: top_k 99"),
        ({"machine": "rtx-4090; host.dram=3"}, "line 2: unknown key 'host.dram'"),
        ({"machine": "rtx-4090; fast"}, "line 2: 'fast' is no change"),
        ({"prompt": "-1"}, "line 2: prompt -1"),
    ],
)
def test_a_bad_case_is_named(tmp_path, change, message):
    with pytest.raises(ValidationError, match=message):
        read_cases(written(tmp_path / "cases.csv", ROW | change))


def test_a_file_of_other_columns_or_with_an_id_twice_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="line 3: id 'a-1' is there already"):
        read_cases(written(tmp_path / "twice.csv", ROW, ROW))
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValidationError, match="no column 'id'"):
        read_cases(tmp_path / "other.csv")


def test_a_prediction_has_its_band_around_it_and_the_same_twice(tmp_path):
    (case,) = read_cases(written(tmp_path / "cases.csv", ROW))
    found = predict(case)
    assert found["low"] < found["predicted"] < found["high"]
    assert predict(case) == found


def test_what_cannot_run_is_a_result_too(tmp_path):
    rows = [ROW | {"id": "big", "model": "deepseek-v3", "system": "all-resident"}, ROW | {"id": "odd", "system": "LRR"}]
    big, odd = published.validate(read_cases(written(tmp_path / "cases.csv", *rows)))["cases"]
    assert big["status"] == "OOM" and "error" not in big
    assert odd["status"] == "ERROR" and "LRU" in odd["reason"]


def test_scores_are_those_of_hand():
    rows = [
        {"error": 0.5, "predicted": 3.0, "measured": 2.0, "in_band": False},
        {"error": -0.1, "predicted": 9.0, "measured": 10.0, "in_band": True},
        {"error": 0.0, "predicted": 4.0, "measured": 4.0, "in_band": True},
    ]
    same = {"group": "g", "metric": "decode_tok_s", "workload": ("m", 1, 1, 1)}
    rows = [row | same | {"setup": str(i)} for i, row in enumerate(rows)]
    score = published._score(rows)
    assert score["median_abs_error"] == 0.1 and score["signed_bias"] == 0.0 and score["p95"] == 0.5
    assert score["mean_abs_error"] == pytest.approx(0.2)
    assert score["kendall_tau"] == pytest.approx(1.0) and score["coverage"] == pytest.approx(2 / 3)
    assert (score["choices"], score["top1_regret"]) == (1, 0.0)


def test_regret_is_what_the_choice_lost():
    """Of three set-ups for the same requests the second is predicted fastest, and was a fifth slower than the best."""
    pairs = [(10.0, 8.0), (8.0, 9.0), (8.0, 9.0), (2.0, 1.0)]  # measured, predicted; the second was measured twice
    rows = [
        {"group": "g", "metric": "decode_tok_s", "workload": ("m",), "setup": s, "measured": m, "predicted": p}
        for s, (m, p) in zip("abbc", pairs, strict=True)
    ]
    assert published._regrets(rows) == [pytest.approx(0.2)]
    assert published._regrets([row | {"metric": "tpot_ms"} for row in rows]) == [pytest.approx(0.0)]
    assert published._regrets([row | {"workload": (i,)} for i, row in enumerate(rows)]) == [], "nothing to choose from"


def test_regimes(tmp_path):
    mixtral = ROW | {"model": "mixtral-8x7b", "machine": "h100-sxm", "system": "all-resident"}
    rows = [
        mixtral | {"id": "few"},
        mixtral | {"id": "many", "metric": "throughput_tok_s", "prompt": "512", "concurrency": "256"},
        mixtral | {"id": "absent", "system": "llama.cpp(n_cpu_moe=2)"},
    ]
    few, many, absent = read_cases(written(tmp_path / "cases.csv", *rows))
    gpu, cpu = CAUSES["experts"], CAUSES["host"]
    assert [published._regime(case, "FITS", gpu) for case in (few, many)] == ["fits", "compute-bound"]
    assert published._regime(absent, "FITS", gpu) == "GPU-bound, experts absent"
    assert published._regime(absent, "FITS", cpu) == "CPU-bound"
    assert published._regime(few, "OVERLOADED", gpu) == "overloaded"


def test_the_page_of_results_is_what_is_predicted_now():
    """One case of every kind of machine; the whole table is written by the command it names."""
    page = (Path(__file__).parents[1] / "docs" / "accuracy.md").read_text()
    for case in choose(read_cases(SHIPPED), None):
        assert f"| {case.id}" in page
        if case.id in ("ktq3c-02", "ikq235-02", "ubg-01"):
            found = predict(case)
            assert f"| {found['predicted']:.4g} | {found['low']:.4g} to {found['high']:.4g} |" in page, case.id


def test_many_requests_on_several_gpus(tmp_path):
    many = ROW | {"machine": "2xh100-sxm", "system": "all-resident; parallel.experts=expert", "concurrency": "3"}
    rows = [many | {"metric": "tpot_ms"}, many | {"id": "a-2", "metric": "throughput_tok_s", "system": "all-resident"}]
    found = [predict(case) for case in read_cases(written(tmp_path / "cases.csv", *rows))]
    assert all(one["status"] == "FITS" and one["low"] < one["predicted"] < one["high"] for one in found)


def test_the_command(tmp_path):
    path = written(tmp_path / "cases.csv", ROW, ROW | {"id": "b-1", "group": "b", "trust": "low"})
    run = CliRunner().invoke(
        app, ["validate", "published", "--cases", str(path), "--json", "-o", str(tmp_path / "out")]
    )
    result = json.loads(run.stdout)
    assert run.exit_code == 4 and result["status"] == "failed" and result["not_scored"] == 1
    assert {"median_abs_error", "signed_bias", "p95", "kendall_tau", "coverage"} <= set(
        result["summary"]["decode_tok_s"]
    )
    assert (tmp_path / "out" / "published.md").is_file()
    run = CliRunner().invoke(app, ["validate", "published", "--cases", str(path), "--only", "c"])
    assert isinstance(run.exception, ValidationError)
