"""A sweep answers every point once, exactly as `replay` would, whatever interrupts it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moesim.errors import MoesimError, SweepError
from moesim.plan import processes
from moesim.plan.jobs import Resolver
from moesim.plan.processes import Processes, load_beliefs, save_beliefs
from moesim.plan.results import FAILED, METRICS, REFUSED, Results, parts, read_rows, schema
from moesim.plan.spec import points_of
from moesim.plan.sweep import sweep
from moesim.plan.work import answer, believe
from moesim.prediction import Beliefs
from moesim.question import run
from moesim.trace.io import read


class Here:
    """Runs points in this process and counts what it did."""

    def __init__(self, stop_after: int = 1 << 30) -> None:
        self.ran: list[str] = []
        self._stop = stop_after

    def run(self, jobs, traces):
        for job in jobs[: self._stop]:
            self.ran.append(job.id)
            trace = traces[job.point.trace]
            yield [answer(job, trace, believe(job, trace) if job.belief else ())]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "results"


def test_every_point_is_answered_as_replay_answers_it(points, folder):
    tally = sweep(points, folder, Processes(2, folder))
    assert (tally.points, tally.before, tally.refused, tally.failed) == (12, 0, 3, 0)
    assert "slots per layer 9" in tally.first
    rows = {r["id"]: r for r in read_rows(folder, schema().names)}
    for job in Resolver().jobs(points):
        row = rows.pop(job.id)
        if row["status"] == REFUSED:
            assert (row["slots_per_layer"], row["output_throughput"], row["summary"]) == (9, None, "")
            continue
        p = job.point
        alone = run(read(p.trace), p.policy, p.question, anchors=False).summary
        assert {name: row[name] for name in METRICS if row[name] is not None} == {
            name: value for name, value in alone["metrics"].items() if value is not None
        }
        assert json.loads(row["summary"])["inputs"]["trace"] == alone["inputs"]["trace"]
        assert row["exact"] == alone["routing_fidelity"]["overall"]["exact"]
    assert not rows


def test_the_columns_of_the_data_set_are_the_metrics_of_a_run(points, small_config):
    metrics = run(read(points[0].trace), "LRU", points[0].question, anchors=False).summary["metrics"]
    assert set(metrics) <= set(METRICS)
    assert set(METRICS) - set(metrics) <= {f"median_{n}_ms" for n in ("ttft", "tpot", "itl", "e2el")}


def test_the_same_points_give_the_same_rows_whoever_runs_them(points, tmp_path):
    sweep(points, tmp_path / "a", Here())
    sweep(list(reversed(points)), tmp_path / "b", Processes(1))
    assert read_rows(tmp_path / "a", schema().names) == read_rows(tmp_path / "b", schema().names)


def test_a_second_run_does_only_what_is_left(points, folder):
    first = Here(stop_after=3)
    with pytest.raises(KeyError):  # an executor that forgets points is found out
        sweep(points, folder, first)
    before = {part: part.read_bytes() for part in parts(folder)}
    second = Here()
    assert sweep(points, folder, second).before == len(points) - len(second.ran)
    assert not set(first.ran) & set(second.ran)
    assert all(part.read_bytes() == content for part, content in before.items())
    third = Here()
    assert sweep(points, folder, third).before == len(points)
    assert third.ran == []


def test_predictions_are_made_once_for_all_points_that_share_them(points, base, folder, monkeypatch):
    jobs = Resolver().jobs(points)
    assert len({job.belief for job in jobs if job.belief}) == 1
    assert sum(bool(job.belief) for job in jobs) == 4
    others = points_of({"base": base, "grid": {"policy": ["oracle"], "seed": [0, 1], "machine": ["h100", "rtx-4090"]}})
    assert len({job.belief for job in Resolver().jobs(others)}) == 2
    made = []
    monkeypatch.setattr(processes, "save_beliefs", lambda beliefs, folder: made.append(folder))
    queue = processes._Queue(jobs, folder)
    assert [task.predicts for task in iter(queue.take, None)] == [True, *[False] * 8]
    queue.release(next(job.belief for job in jobs if job.belief))
    assert len(list(iter(queue.take, None))) == 4


def test_what_a_point_is_known_by(points, base, tmp_path):
    known = {job.id for job in Resolver().jobs(points)}
    assert len(known) == len(points)
    (same,) = Resolver().jobs(
        points_of({"base": {**base, "policy": "lru", "slots_per_layer": 1, "machine": "RTX-4090"}})
    )
    assert same.id in known
    for change in ({"seed": 1}, {"machine": "h100"}, {"eviction.scope": "global"}, {"chunk": 4}):
        (other,) = Resolver().jobs(points_of({"base": {**base, "policy": "LRU", "slots_per_layer": 1, **change}}))
        assert other.id not in known, change
    moved = tmp_path / "moved.parquet"
    moved.write_bytes(Path(base["trace"]).read_bytes())
    assert {j.id for j in Resolver().jobs([replace(p, trace=moved) for p in points])} == known, "content, not place"


@pytest.mark.parametrize("change", [{"policy": "LRUU"}, {"machine": "rtx-409"}, {"model": "mixtrul"}, {"trace": "no"}])
def test_a_name_nobody_knows_stops_the_sweep_before_it_begins(base, folder, change):
    with pytest.raises((MoesimError, OSError)):
        sweep(points_of({"base": base | change}), folder, Here())
    assert not folder.exists()


def test_an_error_of_one_point_is_recorded_and_stops_no_other(points, folder, monkeypatch):
    from moesim.plan import work

    def broken(trace, policy, *args, **options):
        if policy == "LFU":
            raise ZeroDivisionError("no luck")
        return run(trace, policy, *args, **options)

    monkeypatch.setattr(work, "run", broken)
    tally = sweep(points, folder, Here())
    assert (tally.failed, tally.refused) == (4, 2)
    (reason,) = {r["reason"] for r in read_rows(folder, ["reason", "status"]) if r["status"] == FAILED}
    assert reason.startswith("ZeroDivisionError: no luck (test_sweep.py, line ")
    monkeypatch.undo()
    assert sweep(points, folder, Here()).failed == 4
    again = Here()
    tally = sweep(points, folder, again, retry=True)
    assert (len(again.ran), tally.failed, tally.before) == (4, 0, 8)
    assert len({r["id"] for r in read_rows(folder, [])}) == len(read_rows(folder, [])) == 12


def test_a_worker_that_dies_costs_its_own_point_only(points, folder):
    runs = Processes(2, folder)
    spawned = []
    start = runs._start

    def watched():
        spawned.append(start())
        return spawned[-1]

    runs._start = watched
    killed = False

    def kill_one(done, total):
        nonlocal killed
        busy = [w for w in spawned if w.task and not w.task.predicts]
        if busy and not killed:
            os.kill(busy[0].process.pid, signal.SIGKILL)
            killed = True

    tally = sweep(points * 1, folder, runs, on_progress=kill_one)
    status = [r["status"] for r in read_rows(folder, ["status"])]
    assert len(status) == 12
    assert killed
    assert tally.failed == status.count(FAILED) <= 1
    if tally.failed:
        assert "signal 9" in next(r["reason"] for r in read_rows(folder, ["status", "reason"]) if r["status"] == FAILED)


def test_half_written_parts_are_swept_out_and_two_writers_refused(points, folder):
    sweep(points, folder, Here())
    count = len(read_rows(folder, []))
    (folder / ".part-000099.parquet.x1y2").write_bytes(b"PAR1 half a file")
    with Results.open(folder):
        assert not list(folder.glob(".part-*"))
        with pytest.raises(SweepError, match="another sweep writes to it"), Results.open(folder):
            pass
    assert len(read_rows(folder, [])) == count
    assert pq.read_table(folder).num_rows == count, "any Parquet reader sees the same"


def test_directories_that_are_no_data_set(tmp_path, points):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SweepError, match="no sweep's directory"):
        sweep(points, tmp_path, Here())
    with pytest.raises(SweepError, match="holds no results"):
        read_rows(tmp_path, [])
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "part-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(SweepError, match="cannot be read"):
        read_rows(bad, [])


def test_beliefs_survive_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    sets = (
        Beliefs(rng.integers(0, 8, (5, 3, 2)).astype(np.int16), 2, True),
        Beliefs(rng.integers(0, 8, (5, 3, 4)).astype(np.int16), 0, False, rng.random((5, 3, 8)).astype(np.float16)),
    )
    save_beliefs(sets, tmp_path / "b")
    for one, other in zip(sets, load_beliefs(tmp_path / "b"), strict=True):
        assert (one.distance, one.wraps) == (other.distance, other.wraps)
        assert np.array_equal(one.experts, other.experts)
        assert (one.map is None and other.map is None) or np.array_equal(one.map, other.map)


def start(command: list[str]) -> subprocess.Popen[str]:
    code = "from moesim.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_leaves_finished_points_and_no_process(base, folder):
    axes = ["--set", f"seed={','.join(map(str, range(400)))}", "--set", f"model={base['model']}"]
    process = start(["sweep", base["trace"], *axes, "-o", str(folder), "--jobs", "2"])
    while not parts(folder):
        time.sleep(0.05)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to workers as well
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err.startswith(f"interrupted; finished points are in {folder}")
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):  # nobody stays in its session; multiprocessing's tracker is last to go
        for _ in range(200):
            os.killpg(process.pid, 0)
            time.sleep(0.05)
    assert 0 < len(read_rows(folder, [])) < 400
    assert sorted(f.name for f in folder.iterdir() if f.name.startswith(".")) == [".lock"]


def test_a_policy_of_ones_own_is_known_by_its_file(base, folder, tmp_path):
    file = tmp_path / "mine.py"
    text = "class Mine:\n    def predict(self, trace, seed):\n        return trace.experts\n"
    known = set()
    for version in (text, text + "# changed\n"):
        file.write_text(version)
        for choice in ({"policy": f"{file}:Mine"}, {"policy": "LRU", "predictor": f"{file}:Mine"}):
            (job,) = Resolver().jobs(points_of({"base": {**base, **choice, "slots_per_layer": 2}}))
            assert job.belief == "", "what it remembers stays within one run"
            known.add(job.id)
    assert len(known) == 4
    tally = sweep(points_of({"base": {**base, "policy": f"{file}:Mine", "slots_per_layer": 2}}), folder, Processes(1))
    assert (tally.failed, tally.refused) == (0, 0)


# -- kills ----------------------------------------------------------------------------------------------------------


def kill_again_and_again(base, folder: Path, kills: int, seeds: int, seed: int) -> None:
    """Start the sweep, kill it (SIGKILL) at a random moment, look at what is there; then let it finish."""
    spec = folder.parent / "s.yaml"
    spec.write_text(json.dumps({"base": base, "grid": {"policy": ["LRU", "oracle"], "seed": list(range(seeds))}}))
    command = ["sweep", str(spec), "-o", str(folder), "--jobs", "2", "--json"]
    rng, seen = random.Random(seed), {}
    for _ in range(kills):
        process = start(command)
        time.sleep(rng.uniform(0.5, 3.0))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        rows = read_rows(folder, ["status"]) if parts(folder) else []
        assert len({r["id"] for r in rows}) == len(rows), "nothing twice"
        assert all(part.read_bytes() == content for part, content in seen.items()), "nothing lost or changed"
        seen = {part: part.read_bytes() for part in parts(folder)}
    last = start(command)
    out, err = last.communicate(timeout=600)
    assert last.returncode == 0, err
    result = json.loads(out)
    rows = read_rows(folder, ["status", "seed"])
    assert result["points"] == len(rows) == len({r["id"] for r in rows}) == 2 * seeds
    assert result["before"] == sum(pq.read_metadata(part).num_rows for part in seen)
    assert {r["status"] for r in rows} <= {"FITS", "THRASH"}
    assert not [f.name for f in folder.iterdir() if not f.name.startswith("part-") and f.name != ".lock"]


def test_killed_at_a_random_moment_it_loses_and_repeats_nothing(base, folder):
    kill_again_and_again({**base, "slots_per_layer": 2}, folder, kills=2, seeds=30, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_killed_twenty_times_it_loses_and_repeats_nothing(base, folder, seed):
    kill_again_and_again({**base, "slots_per_layer": 2}, folder, kills=20, seeds=1000, seed=seed)
