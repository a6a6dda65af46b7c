"""A saved run becomes one page that needs nothing else; what is no run is refused by name."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesim.errors import MoesimError
from moesim.question import Question, run
from moesim.run_report import figures, read_summary, write_report
from tests.conftest import small_trace


@pytest.fixture
def saved(call, trace_file, small_config, tmp_path):
    folder = tmp_path / "run"
    asked = ("replay", trace_file, "--model", small_config, "--slots-per-layer", 4, "-o", folder)
    assert call(*asked)[0] == 0
    return folder


def test_the_page_holds_the_run_and_loads_nothing(call, saved):
    code, out, err = call("report", saved)
    assert code == 0 and not err and out.strip() == str(saved / "report.html")
    page = (saved / "report.html").read_text()
    summary = read_summary(saved)
    for words in (
        "Where the critical path goes",
        "Beside the four anchors",
        "Where every byte goes",
        "Steps over time",
    ):
        assert words in page
    assert f"{summary['metrics']['output_throughput']:.4g} output tok/s" in page
    assert "<script src=" not in page and "<link " not in page


def test_figures_show_the_numbers_of_the_summary(saved):
    summary = read_summary(saved)
    drawn = {figure.layout.title.text: figure for figure in figures(summary, saved).values()}
    path = drawn["Where the critical path goes"].data[0]
    assert sum(path.x) == pytest.approx(100)
    speed = drawn["Beside the four anchors"].data[0]
    assert speed.x[0] == summary["anchors"]["of_sample"]["policy"]["output_throughput"]
    hits = next(bar for bar in drawn["Lookups by MoE layer"].data if bar.name == "hits")
    table = pq.read_table(saved / "layers.parquet").to_pandas().groupby("layer")[["hits", "lates", "misses"]].sum()
    assert table["hits"].sum() == summary["metrics"]["hits"]
    assert list(hits.y) == pytest.approx(list(100 * table["hits"] / table.sum(axis=1)))
    requests = next(line for line in drawn["Latency of requests"].data if line.name == "E2EL")
    assert sum(requests.x) / len(requests.x) == pytest.approx(summary["metrics"]["mean_e2el_ms"])


def test_a_run_that_did_not_fit_still_has_a_page(saved):
    summary = read_summary(saved)
    summary |= {"status": "OOM", "status_reason": "too large", "metrics": {}}
    (saved / "summary.json").write_text(json.dumps(summary))
    assert write_report(saved, saved / "page.html")["status"] == "OOM"
    page = (saved / "page.html").read_text()
    assert "Where every byte goes" in page and "OOM: too large" in page


def test_names_from_elsewhere_stay_text(saved):
    summary = read_summary(saved)
    summary["inputs"]["model"]["name"] = "<script>alert(1)</script>"
    summary["memory"]["gpu_bytes"]["</script><script>alert(1)</script>"] = 1
    (saved / "summary.json").write_text(json.dumps(summary))
    write_report(saved, saved / "page.html")
    assert "<script>alert(1)" not in (saved / "page.html").read_text()


def test_what_is_no_run_is_refused(call, saved, tmp_path):
    code, _, err = call("report", tmp_path / "none")
    assert code == 2 and "summary.json" in err and "moesim replay" in err
    pq.write_table(pa.table({"other": [1]}), saved / "steps.parquet")
    code, _, err = call("report", saved)
    assert code == 2 and "steps.parquet" in err and not (saved / "report.html").exists()
    for text in ("{", "[]", "{}"):
        (saved / "summary.json").write_text(text)
        with pytest.raises(MoesimError, match=r"summary\.json"):
            write_report(saved, saved / "page.html")


def test_a_run_draws_itself_by_name(small_config):
    found = run(small_trace(), "LRU", Question(model=str(small_config), slots_per_layer=4), detail=True)
    for what in ("critical path", "anchors", "memory", "latency", "steps", "layers"):
        assert found.plot(what).data
    with pytest.raises(MoesimError, match="did you mean 'layers'"):
        found.plot("layer")
