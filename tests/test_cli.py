"""The command line as a user meets it: exit codes, streams, files, and one line per mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import moesim.cli
from moesim.trace.io import write
from tests.conftest import small_trace


def moesim_(*args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from moesim.cli import main; main()", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


@pytest.fixture
def asked(trace_file, small_config):
    """The arguments of a small replay."""
    return ("replay", trace_file, "--model", small_config, "--slots-per-layer", 4)


def test_replay_prints_one_json_object_and_the_same_bytes_twice(call, asked):
    code, out, err = call(*asked, "--policy", "eMoE", "--json")
    assert code == 0 and not err
    summary = json.loads(out)
    assert {"status", "inputs", "metrics", "bottleneck", "memory", "anchors"} <= set(summary)
    assert call(*asked, "--policy", "eMoE", "--json")[1] == out


def test_the_readable_page_says_what_matters(call, asked):
    _, out, _ = call(*asked, "--policy", "lru")
    for words in ("FITS", "tok/s", "limited by", "anchors", "ceiling", "GPU memory", "cost band"):
        assert words in out


def test_results_go_into_a_directory_and_a_timeline_opens(call, asked, tmp_path):
    code, _, _ = call(*asked, "--no-anchors", "-o", tmp_path / "run", "--timeline", tmp_path / "t.json")
    assert code == 0
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {"M", "X", "C", "b", "e"} <= {e["ph"] for e in events}
    assert all(e["dur"] >= 0 for e in events if e["ph"] == "X")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]["completed"] == 6


def test_compare_gives_paired_differences(call, trace_file, small_config):
    args = ("compare", trace_file, "--model", small_config, "--slots-per-layer", 3)
    code, out, _ = call(*args, "--policies", "LRU,Belady,on-demand", "--json")
    result = json.loads(out)
    assert code == 0 and list(result["policies"]) == ["LRU", "Belady", "on-demand"]
    assert result["differences"]["Belady"]["tpot"]["difference_ms"] < 0
    assert result["differences"]["on-demand"]["tpot"]["difference_ms"] > 0
    assert result["differences"]["Belady"]["tpot"]["requests"] == 6
    text = call(*args, "--policies", "LRU,Belady,eMoE(period=2)")[1]
    assert "Belady against LRU" in text and "faster" in text


def test_systems_are_listed_and_shown(call):
    code, out, _ = call("systems")
    assert code == 0 and "eMoE" in out and "Fiddler" in out
    assert json.loads(call("systems", "show", "emoe", "--json")[1])["refresh"]["period"] == 40
    assert "published: 98.2 to 98.8 %" in out and "needs: gate weights (else ranks)" in out
    rows = {row["name"]: row for row in json.loads(call("systems", "--json")[1])["systems"]}
    assert rows["LRU"]["published_quality"] is None and rows["LRU"]["needs"] == []
    assert rows["TSEP"]["published_quality"]["source"] == "arXiv 2206.00277"


def test_version_and_help(call):
    assert call("--version")[1].startswith("moesim ")
    for args in (["--help"], ["replay", "--help"], ["trace", "--help"], ["systems", "--help"]):
        assert CliRunner().invoke(moesim.cli.app, args).exit_code == 0


def test_an_infeasible_plan_exits_3(call, trace_file, small_config, tmp_path):
    machine = tmp_path / "small.yaml"
    machine.write_text("from: rtx-4090\ngpu:\n  memory: 530MiB\n")
    code, out, _ = call("replay", trace_file, "--model", small_config, "--machine", machine, "--json")
    assert code == 3 and json.loads(out)["status"] == "OOM"


def test_ctrl_c_leaves_nothing_broken(tmp_path, small_config):
    """Interrupted in the middle of a long replay: no output directory, one line, exit 130."""
    import signal
    import time

    path = tmp_path / "long.parquet"
    write(small_trace(requests=100, tokens=60_000), path)
    code = "from moesim.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "replay",
        path,
        "--model",
        small_config,
        "--slots-per-layer",
        "2",
        "--engine",
        "events",
    ]
    process = subprocess.Popen([*command, "-o", tmp_path / "out"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and not out
    assert err.decode().strip().splitlines()[-1] == "error: interrupted; nothing was written"
    assert not (tmp_path / "out").exists()


# -- mistakes -----------------------------------------------------------------------------------------------------


def _damaged(tmp_path: Path, what: str) -> Path:
    """A trace file with one fault."""
    path = tmp_path / f"{what}.parquet"
    write(small_trace(weights=True), path)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "text":
        path.write_text("not a parquet file")
    else:
        table = pq.read_table(path)
        pq.write_table(_edit(table, what), path)
    return path


def _edit(table: pa.Table, what: str) -> pa.Table:
    def lists(name: str, change) -> pa.Table:
        column = table.column(name).combine_chunks()
        width = column.type.list_size
        values = np.array(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)
        change(values)
        array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel(), column.type.value_type), width)
        return table.set_column(table.schema.get_field_index(name), table.schema.field(name), array)

    def put(row: int, rank: int, value: float):
        def change(values):
            values[row, rank] = value

        return change

    metadata = json.loads(table.schema.metadata[b"moesim"])
    if what == "wrong-id":
        return lists("experts", put(7, 0, 8))
    if what == "negative-id":
        return lists("experts", put(7, 0, -2))
    if what == "twice":
        return lists("experts", lambda v: v[5].__setitem__(1, v[5, 0]))
    if what == "nan-weight":
        return lists("weights", put(9, 1, np.nan))
    if what == "negative-weight":
        return lists("weights", put(9, 1, -0.5))
    if what == "nan-probability":
        return lists("probabilities", put(3, 2, np.nan))
    if what.startswith("no-"):
        return table.drop_columns([what[3:]])
    if what == "no metadata":
        return table.replace_schema_metadata({})
    changes = {
        "k above experts": {"top_k": 9},
        "future schema": {"schema_version": 99},
        "physical ids": {"id_space": "physical"},
        "layers": {"moe_layers": [0, 1]},
    }
    return table.replace_schema_metadata({b"moesim": json.dumps(metadata | changes[what]).encode()})


TRACE_FAULTS = [
    "truncated", "text", "wrong-id", "negative-id", "twice", "nan-weight", "negative-weight", "nan-probability",
    "no-experts", "no-phase", "no-position", "no metadata", "k above experts", "future schema", "physical ids",
    "layers",
]  # fmt: skip


@pytest.mark.parametrize("what", TRACE_FAULTS)
def test_a_damaged_trace_is_one_line_and_exit_2(call, tmp_path, small_config, what):
    path = _damaged(tmp_path, what)
    code, out, err = call("replay", path, "--model", small_config, "-o", tmp_path / "out")
    assert code == 2 and not out and err.count("\n") == 1
    assert err.startswith(f"error: {path}") and len(err) > len(str(path)) + 30
    assert not (tmp_path / "out").exists()


QUESTION_FAULTS = [
    ("--policy", "emoo", "did you mean 'eMoE'"),
    ("--policy", "eMoE(period=0)", "at least 1"),
    ("--policy", "eMoE(variant='Z')", "must be A"),
    ("--policy", "LRU(scope='galaxy')", "must be one of"),
    ("--policy", "Mixtral-Offloading(recall=2)", "between 0 and 1"),
    ("--machine", "rtx-4091", "not in the catalogue"),
    ("--machine", "nowhere.yaml", "nowhere.yaml"),
    ("--model", "mixtral-8x8b", "unknown model"),
    ("--model", "mixtral-8x7b", "Mixtral"),  # of another shape than the trace
    ("--slots-per-layer", "0", "slots per layer 0"),
    ("--slots-per-layer", "99", "slots per layer 99"),
    ("--expert-memory", "lots", "not a size"),
    ("--expert-memory", "1KiB", "cannot hold one"),
    ("--expert-memory", "99TiB", "exceeds"),
    ("--request-rate", "-1", "must be above 0"),
    ("--burstiness", "-1", "burstiness"),
    ("--max-concurrency", "0", "at least 1"),
    ("--max-num-seqs", "0", "at least 1"),
    ("--max-batch-tokens", "0", "at least 1"),
    ("--chunk", "-1", "at least 0"),
    ("--num-prompts", "0", "at least 1"),
    ("--slo", "0", "above 0"),
    ("--seed", "-1", "at least 0"),
    ("--workload", "nothing.csv", "no such file"),
    ("--set", "evict=lru", "no 'evict'"),
    ("--set", "eviction.score=luck", "unknown feature 'luck'"),
    ("--set", "misses.rule=pray", "unknown rule"),
    ("--slots-per-layer", "many", "--slots-per-layer"),
]


@pytest.mark.parametrize(("option", "value", "says"), QUESTION_FAULTS)
def test_a_bad_question_is_one_line_and_exit_2(call, trace_file, small_config, tmp_path, option, value, says):
    args = {"--model": small_config, "--slots-per-layer": 4, option: value}
    if option == "--expert-memory":
        del args["--slots-per-layer"]
    if option == "--burstiness":
        args["--request-rate"] = 1
    flat = [part for pair in args.items() for part in pair]
    code, out, err = call("replay", trace_file, *flat, "-o", tmp_path / "out")
    assert code == 2 and not out and err.count("\n") == 1, err
    assert err.startswith("error: ") and says in err
    assert not (tmp_path / "out").exists()


def test_a_dense_model_is_never_taken_for_a_mixture(call, trace_file, tmp_path):
    dense = tmp_path / "config.json"
    dense.write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3, "hidden_size": 512,
                                 "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 1000}))  # fmt: skip
    code, _, err = call("replay", trace_file, "--model", dense)
    assert code == 2 and "expert" in err


def test_files_that_are_not_there(call, tmp_path):
    for args in (("replay", tmp_path / "x.parquet"), ("replay",), ("nonsense",), ("replay", "--nonsense")):
        code, out, err = call(*args)
        assert code == 2 and not out and err.count("\n") == 1


def test_the_installed_command_works(tmp_path):
    assert moesim_("--version", cwd=tmp_path).stdout.startswith("moesim")
