"""The command in a process of its own: killed, interrupted, resumed, refused, and with little installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from moesim.calibrate.finish import finish
from moesim.calibrate.run import parse_duration
from moesim.calibrate.store import NAME, read_lines
from moesim.errors import CalibrationError

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "moesim.calibrate", "--device", "cpu", "--only", "small,launch"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def calibrate(directory, *options, **kwargs):
    return subprocess.run(
        [*COMMAND, "-o", str(directory), *options],
        capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False, **kwargs,
    )  # fmt: skip


def rows(directory):
    return [line["row"] for line in read_lines(directory / NAME) if "row" in line]


def identity(row):
    return tuple(sorted((k, v) for k, v in row.items() if k not in ("seconds", "mad_s", "samples", "contaminated")))


def started(directory, least_rows):
    """A run in the background that has measured something."""
    process = subprocess.Popen(
        [*COMMAND, "-o", str(directory), "--budget", "2m"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    path, deadline = directory / NAME, time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > least_rows):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.01)
    return process


def test_killed_then_resumed(tmp_path):
    process = started(tmp_path, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = rows(tmp_path)
    assert before and not (tmp_path / "meta.yaml").exists()
    with (tmp_path / NAME).open("a") as file:
        file.write('{"row": {"torn')
    done = calibrate(tmp_path, "--budget", "6s", "--json")
    assert done.returncode == 0, done.stderr
    report, after = json.loads(done.stdout), rows(tmp_path)
    assert after[: len(before)] == before and len({identity(row) for row in after}) == len(after)
    assert report["points"] == len(after) == len(before) + report["measured"]
    assert {"meta.yaml", "fit.json", "kernels.parquet", NAME} <= {path.name for path in tmp_path.iterdir()}


def test_interrupted_keeps_a_profile(tmp_path):
    process = started(tmp_path, 6)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "interrupted" in errors and "Traceback" not in errors and str(tmp_path) in output
    assert (tmp_path / "meta.yaml").exists() and len(rows(tmp_path)) >= 6


def test_little_needs_to_be_installed(tmp_path):
    """Neither the simulator's nor the plots' libraries: a GPU machine may have none of them."""
    absent = (
        "simpy",
        "sklearn",
        "typer",
        "click",
        "plotly",
        "pydantic",
        "streamlit",
        "transformers",
        "numba",
        "pynvml",
    )
    blocker = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in absent)
    (tmp_path / "sitecustomize.py").write_text(blocker)
    done = subprocess.run(
        [*COMMAND, "-o", str(tmp_path / "out"), "--budget", "5s"],
        capture_output=True, text=True, timeout=120, check=False,
        env=ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "hold-out" in done.stdout and "CUDA graphs need a CUDA GPU" in done.stdout


def test_the_commands_options_are_the_modules():
    """`moesim calibrate`, once mounted, and `python -m moesim.calibrate` take the same."""
    import typer
    from typer.testing import CliRunner

    from moesim.calibrate.commands import calibrate as command

    app = typer.Typer()
    app.command()(command)
    shown = CliRunner().invoke(app, ["--help"]).output
    spelled = subprocess.run([*COMMAND[:3], "--help"], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    for option in ("--device", "--budget", "--only", "--output", "--seed", "--fit-only", "--json"):
        assert option in shown and option in spelled.stdout
    result = CliRunner().invoke(app, ["--budget", "soon"])
    assert isinstance(result.exception, CalibrationError)


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    done = calibrate(tmp_path, "--device", "tpu:0")
    assert done.returncode == 2 and done.stderr.startswith("error: --device 'tpu:0'")
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / NAME).exists()


def test_without_yaml_the_rows_are_kept(tmp_path, monkeypatch):
    row = {"family": "launch", "graph": 0, "kernels": 1, "seconds": 1e-6, "mad_s": 0.0, "samples": [1e-6]}
    lines = [{"conditions": {"gpu": None}}, {"row": row}]
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(CalibrationError, match=r"1 measurements are kept .* --fit-only"):
        finish(tmp_path)


def test_the_command_line_does_not_load_torch():
    code = "import sys, moesim.calibrate.commands; print({'torch', 'numpy', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.strip() == "set()"


def test_nothing_measured_is_no_profile(tmp_path):
    with pytest.raises(CalibrationError, match="holds no measurements"):
        finish(tmp_path)
    (tmp_path / NAME).write_text('{"conditions": {"gpu": null}}\n')
    with pytest.raises(CalibrationError, match="holds no measurements"):
        finish(tmp_path)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1h30m", 5400), ("45", 45), ("1.5m", 90)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5x", "m", "-5m", "0s", "5 minutes", "30d", "1e3"])
def test_durations_that_are_none(text):
    with pytest.raises(CalibrationError, match="--budget"):
        parse_duration(text)
