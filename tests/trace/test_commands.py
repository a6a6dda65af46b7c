"""`moesim trace import|info|check|cut`: results, files written, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.commands.trace import app
from moesim.errors import TraceError
from moesim.trace import TraceInfo, io
from moesim.trace.cut import cut
from moesim.trace.importers import FORMATS


@pytest.fixture(autouse=True)
def models(model, monkeypatch, tmp_path):
    """Only `tiny` is known; the cache of traces is the test's own."""
    monkeypatch.setitem(sys.modules, "moesim.model", SimpleNamespace(load_model={"tiny": model}.__getitem__))
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def file(tmp_path, trace):
    io.write(trace, tmp_path / "t.parquet")
    return str(tmp_path / "t.parquet")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_import(tmp_path):
    ids = np.array([[[0, 1], [2, 3], [4, 5]]] * 5, np.int16)
    source, out = str(tmp_path / "run.npy"), str(tmp_path / "new" / "t.parquet")
    np.save(source, ids)
    options = [
        "--model",
        "tiny",
        "--phase",
        "decode",
        "--prompt-tokens",
        "7",
        "--task",
        "code",
        "--engine",
        "vllm 0.21",
    ]
    result = json.loads(run("import", "--format", "numpy", source, *options, "--source", "my run", "-o", out, "--json"))
    assert result["output"] == out and result["tokens"] == 5 and result["requests"] == 1
    trace = io.read(out)
    assert np.array_equal(trace.experts, ids) and trace.position[0] == 7 and trace.requests.task == ("code",)
    assert (trace.info.engine, trace.info.source) == ("vllm 0.21", "my run")
    assert "5 tokens of 1 request, real" in run("import", source, *options, "-o", out)  # replaces the file


def test_a_failed_import_leaves_what_was_there(tmp_path, file):
    before = Path(file).read_bytes()
    np.save(tmp_path / "run.npy", np.full((5, 3, 2), 8, np.int16))
    arguments = ["import", str(tmp_path / "run.npy"), "--model", "tiny", "--phase", "prefill", "-o", file]
    with pytest.raises(TraceError, match="expert 8"):
        run(*arguments)
    assert Path(file).read_bytes() == before
    with pytest.raises(TraceError, match=r"none\.npy: cannot read"):
        run("import", str(tmp_path / "none.npy"), *arguments[2:])
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["run.npy", "t.parquet"]


def test_info(tmp_path, file, trace):
    result = json.loads(run("info", file, "--json"))
    assert result["content_hash"] == io.read(file).content_hash and len(result["content_hash"]) == 64
    assert (result["tokens"], result["prefill_tokens"], result["decode_tokens"], result["requests"]) == (9, 3, 6, 2)
    assert result["tasks"] == {"code": 1, "prose": 1} and result["extra"] == {"seed": 0}
    assert result["weights"] and result["probabilities"] and result["arrivals"]
    text = run("info", file)
    assert "tiny: top-2 of 8 experts, 3 MoE layers (1 to 3)" in text and "9 (3 prefill, 6 decode)" in text
    assert "code (1), prose (1)" in text and "extra.seed" in text
    run("info", file, "-o", str(tmp_path / "report.txt"))
    assert (tmp_path / "report.txt").read_text() == text


def test_check(file, trace, model):
    assert run("check", file) == f"{file}: OK, 9 tokens of 2 requests\n"
    assert run("check", file, "--model", "tiny").endswith("matches tiny\n")
    assert json.loads(run("check", file, "--json"))["ok"] is True
    model.experts = 9
    with pytest.raises(TraceError, match="experts 8, but model tiny has 9"):
        run("check", file, "--model", "tiny")
    with open(file, "r+b") as damaged:
        damaged.truncate(900)
    with pytest.raises(TraceError, match="not a whole Parquet file"):
        run("check", file)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--requests", "1"], ([0, 1, 2, 3, 4], ("a",))),
        (["--requests", "5"], (list(range(9)), ("a", "b"))),
        (["--first-tokens", "6"], ([0, 1, 2, 3, 4, 5], ("a", "b"))),
        (["--task", "prose"], ([5, 6, 7, 8], ("b",))),
        (["--request-id", "b"], ([5, 6, 7, 8], ("b",))),
        (["--request-id", "b", "--request-id", "a"], (list(range(9)), ("a", "b"))),
        (["--phase", "decode"], ([3, 4, 5, 6, 7, 8], ("a", "b"))),
        (["--phase", "prefill"], ([0, 1, 2], ("a",))),
        (["--phase", "decode", "--task", "code", "--first-tokens", "1"], ([3], ("a",))),
    ],
)
def test_cut(tmp_path, file, trace, options, expected):
    rows, requests = expected
    out = str(tmp_path / "cut.parquet")
    run("cut", file, "-o", out, *options)
    part = io.read(out)
    assert part.requests.request_id == requests
    for name in ("experts", "phase", "position", "weights", "probabilities"):
        assert np.array_equal(getattr(part, name), getattr(trace, name)[rows])
    (how,) = part.info.extra["cut"]
    assert how["from"] == io.read(file).content_hash and len(how) > 1


def test_cut_refuses(tmp_path, file):
    out = str(tmp_path / "cut.parquet")
    for options, message in (
        ([], "nothing to cut"),
        (["--task", "proze"], "unknown task 'proze'; did you mean 'prose'"),
        (["--request-id", "c"], "unknown request id 'c'"),
        (["--phase", "decod"], "phase 'decod'; did you mean 'decode'"),
        (["--requests", "0"], "0 requests; must be 1 or more"),
        (["--first-tokens", "-1"], "-1 first tokens"),
        (["--phase", "prefill", "--task", "prose"], "no row of the trace meets all"),
    ):
        with pytest.raises(TraceError, match=message):
            run("cut", file, "-o", out, *options)
    with pytest.raises(TraceError, match="is the input itself"):
        run("cut", file, "-o", file, "--requests", "1")
    (tmp_path / "link.parquet").symlink_to(file)
    with pytest.raises(TraceError, match="is the input itself"):
        run("cut", file, "-o", str(tmp_path / "link.parquet"), "--requests", "1")


def test_cutting_is_recorded_every_time(trace):
    twice = cut(cut(trace, phase="decode"), requests=1)
    assert twice.info.extra["cut"] == [{"from": "", "phase": "decode"}, {"from": "", "requests": 1}]
    assert trace.info.extra == {"seed": 0}


@given(st.integers(1, 12), st.integers(1, 3))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_cut_is_a_trace(tmp_path, trace, first_tokens, requests):
    part = cut(trace, first_tokens=first_tokens, requests=requests)
    io.write(part, tmp_path / "cut.parquet")  # checks
    assert part.tokens == min(first_tokens, 9 if requests > 1 else 5)


def test_help_loads_nothing_heavy():
    code = "import sys, moesim.commands.trace; print([m for m in ('pyarrow', 'pandas', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_schema_is_documented(file):
    readme = (Path(__file__).parents[2] / "traces" / "README.md").read_text()
    names = [*io.pq.read_schema(file).names, *(f.name for f in fields(TraceInfo)), "schema_version", *FORMATS]
    assert [name for name in names if f"`{name}`" not in readme] == []
