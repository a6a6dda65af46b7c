"""The dashboard: addresses and commands, jobs, every page's logic; in a browser: controls, links, files, cancel."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.dashboard import jobs
from moesim.dashboard.jobs import stamps, start
from moesim.dashboard.state import EXAMPLES, MAX_BYTES, Asked, Files, from_query, to_query, words
from moesim.errors import MoesimError
from moesim.machine import load_machine
from moesim.profile import SHIPPED as SHIPPED_PROFILES
from tests.conftest import ROOT

TRACES = ROOT / "traces"
APP = ROOT / "moesim" / "dashboard" / "app.py"
QUICK = {"trace": "tiny-moe-8x16.parquet", "slots": "8", "prompts": "3"}

counts = st.none() | st.integers(1, 5000)
asked = st.builds(
    Asked, st.sampled_from(["", "a.parquet"]), st.sampled_from(["", "mixtral-8x7b", "ü x&y"]), st.just("8xh200"),
    st.sampled_from(["LRU", "LRU(scope='global')"]), st.sampled_from(["", "misses.rule=host; predictor=none"]),
    counts, counts, st.none() | st.floats(0.01, 900), counts,
    st.integers(1, 999), st.integers(2, 999), st.none() | st.floats(0.01, 9e4), st.none() | st.floats(0.01, 9e4),
    st.sampled_from(["", "rtx-4090=0.5; l4=1"]), st.integers(0, 99),
)  # fmt: skip


@given(asked)
def test_an_address_brings_back_what_was_asked(one):
    assert from_query(to_query(one)) == (one, [])


def test_a_bad_address_is_noted_and_the_default_taken():
    found, notes = from_query(
        {"slots": "many", "rate": "-1", "seed": "3", "other": "x", "ttft": "nan", "prices": "l4=free"}
    )
    assert found == Asked(seed=3) and len(notes) == 4 and "slots=many" in notes[0]


def test_every_control_reaches_the_command(tmp_path):
    files = Files(None, tmp_path)
    default = words(Asked(), files)
    changed = {"model": "mixtral-8x7b", "machine": "h200", "policy": "LFU", "set": "misses.rule=host", "slots": 3,
               "users": 4, "rate": 2.5,
               "prompts": 7, "input": 9, "output": 8, "ttft": 100.0, "tpot": 10.0,
               "prices": "l4=1", "seed": 5}  # fmt: skip
    assert {"trace", *changed} == {f.name for f in fields(Asked)}
    for name, value in changed.items():
        assert words(Asked(**{name: value}), files) != default, name


def test_files_of_the_server_are_not_for_the_asking(tmp_path):
    files = Files(TRACES, tmp_path / "uploads")
    with pytest.raises(FileNotFoundError, match="no trace is called"):
        files.trace("../../etc/passwd")
    with pytest.raises(FileNotFoundError, match="upload yours"):
        files.known("/etc/hosts")
    with pytest.raises(ValueError, match="upload a trace"):
        files.add("run.sh", b"x")
    with pytest.raises(ValueError, match="may have"):
        files.add("big.json", b" " * (MAX_BYTES[".json"] + 1))
    with pytest.raises(MoesimError):
        files.add("../../bad.parquet", b"PAR1 not really")
    assert not any((tmp_path / "uploads").iterdir())
    name = files.add("../up.parquet", (TRACES / "tiny-moe-8x16.parquet").read_bytes())
    assert files.trace(name).parent == tmp_path / "uploads" and name in files.traces()


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_a_profile_is_uploaded_as_an_archive(tmp_path):
    files = Files(None, tmp_path / "uploads")
    shipped = SHIPPED_PROFILES / "a100-sxm"
    members = {f"mine/{path.name}": path.read_bytes() for path in shipped.iterdir()}
    assert files.add("mine.zip", zipped(members)) == "mine" and files.profiles() == ["mine"]
    machine = load_machine(files.known("mine"))
    assert machine.profile == files.known("mine")
    command = words(Asked(machine="mine"), files)
    assert command[command.index("--machine") + 1] == machine.profile


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"meta.yaml": b"a: 1", "../evil.sh": b"x"}, "evil.sh"),
        ({"a/meta.yaml": b"", "b/meta.yaml": b""}, "meta.yaml, meta.yaml"),
        ({"meta.yaml": b"not: a profile"}, "provenance None must be"),
    ],
)
def test_an_archive_that_is_no_profile_is_refused_and_leaves_nothing(tmp_path, members, said):
    files = Files(None, tmp_path / "uploads")
    with pytest.raises((ValueError, MoesimError), match=said):
        files.add("mine.zip", zipped(members))
    with pytest.raises(ValueError, match="no zip archive"):
        files.add("mine.zip", b"PK but not really")
    assert not any((tmp_path / "uploads").iterdir()) and not (tmp_path / "evil.sh").exists()


@pytest.mark.parametrize("name", ["..zip", "...zip", "../...zip"])
def test_an_archive_cannot_name_another_folder(tmp_path, name):
    files = Files(None, tmp_path / "uploads")
    members = {path.name: path.read_bytes() for path in (SHIPPED_PROFILES / "a100-sxm").iterdir()}
    files.add("kept.zip", zipped(members))
    with pytest.raises(ValueError, match="name the archive"):
        files.add(name, zipped(members))
    assert files.profiles() == ["kept"]


def test_a_job_answers_what_the_command_line_says_and_only_once(tmp_path):
    files = Files(TRACES, tmp_path / "uploads")
    one, _ = from_query(QUICK)
    command = words(one, files)
    job = start(command, tmp_path / "results", saved=True)
    job.process.wait()
    said = subprocess.run([sys.executable, "-c", "from moesim.cli import main; main()", *command, "--json"],
                          capture_output=True, text=True, check=True, cwd=ROOT)  # fmt: skip
    assert job.answer["metrics"] == json.loads(said.stdout)["metrics"]
    assert (job.folder / "run" / "requests.parquet").is_file()
    assert start(command, tmp_path / "results", saved=True).process is None


def test_a_job_that_fails_or_is_cancelled_leaves_no_answer(tmp_path):
    failed = start(["replay", "nowhere.parquet"], tmp_path)
    failed.process.wait()
    assert failed.answer is None and "nowhere.parquet" in failed.error
    stopped = start(["replay", str(TRACES / "tiny-moe-8x16.parquet")], tmp_path)
    stopped.cancel()
    assert not stopped.running and stopped.answer is None and stopped.error == "stopped"


# -- pages --------------------------------------------------------------------------------------------------------


def one_page(name: str) -> None:
    """The script of one page, as app.py makes it."""
    import os
    from pathlib import Path

    from moesim.dashboard import pages
    from moesim.dashboard.controls import controls, shared
    from moesim.dashboard.state import Files
    from moesim.trace import cache

    files = Files(Path(os.environ["MOESIM_TRACES"]), cache.folder() / "uploads")
    shared(controls(files), files, cache.folder())
    getattr(pages, name)()


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Run a page with a query until its jobs are done."""
    from streamlit.testing.v1 import AppTest

    monkeypatch.setenv("MOESIM_TRACES", str(TRACES))
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path))

    def ran(query: dict[str, str], name: str = "") -> AppTest:
        if name:
            app = AppTest.from_function(one_page, default_timeout=60, args=(name,))
        else:
            app = AppTest.from_file(str(APP), default_timeout=60)
        for key, value in query.items():
            app.query_params[key] = value
        app.run()
        return settled(app)

    return ran


def settled(app):
    for _ in range(400):
        assert not app.exception, app.exception
        if "jobs" not in app.session_state or not any(job.running for job in app.session_state["jobs"].values()):
            return app.run()
        time.sleep(0.3)
        app.run()
    raise AssertionError("a job did not end")


def test_the_first_page_shows_what_the_command_line_says(page):
    app = page(QUICK)
    answer = app.session_state["jobs"]["replay"].answer
    assert app.metric[0].value == f"{answer['metrics']['output_throughput']:.4g}"
    assert "FITS" in app.success[0].value
    assert any("specification sheets" in info.value for info in app.info)


def press(app, *labels):
    """Every button of these labels, one after the other, each until its job is done."""
    for key in [button.key for button in app.button if button.label in labels]:
        next(button for button in app.button if button.key == key).click().run()
        app = settled(app)
    return app


def test_changes_to_the_system_are_asked_and_simulated(page):
    plain, changed = page(QUICK), page(QUICK | {"set": "misses.rule=host; predictor=transitions"})
    one, other = (app.session_state["jobs"]["replay"].answer for app in (plain, changed))
    assert other["inputs"]["system"]["misses"]["rule"] == "host" != one["inputs"]["system"]["misses"]["rule"]
    assert any("unknown" in e.value for e in page(QUICK | {"set": "misses.rule=hots"}).error)


def test_the_lab_compares_systems_as_the_command_line_does(page):
    app = press(page(QUICK, "lab"), "Run")
    found = app.session_state["jobs"]["compare"].answer["policies"]
    assert list(app.dataframe[0].value["system"]) == list(found)
    assert list(app.dataframe[0].value["tok/s"]) == [one["metrics"]["output_throughput"] for one in found.values()]
    assert "cacheable" in app.info[0].value
    assert "Choose a routing trace" in page({}, "lab").info[0].value


def test_capacity_and_plan_show_what_the_command_line_says(page):
    app = page(QUICK | {"ttft": "50", "model": "tiny-moe-8x16", "input": "8", "output": "4"}, "capacity")
    app = press(app, "Run")
    answers = {name: job.answer for name, job in app.session_state["jobs"].items()}
    assert app.metric[0].value == f"{answers['capacity']['rate']:.4g}"
    best = answers["plan"]["best"]
    assert f"{best['output_throughput']:.4g} tok/s" in app.success[0].value
    assert len(app.dataframe[0].value) == len(answers["plan"]["candidates"])
    assert page({}, "capacity").caption[0].value.startswith("Set a TTFT")


def test_the_timeline_shows_the_run_and_the_profiles(page):
    app = page(QUICK, "timeline")
    busy = app.session_state["jobs"]["replay"].answer["bottleneck"]["utilisation"]
    assert list(app.dataframe[0].value["resource"]) == list(busy)
    assert len(app.dataframe[1].value) >= 3


def test_the_divider_moves_memory_to_experts_as_slots_per_layer_does(page):
    app = page({"model": "gpt-oss-20b", "prompts": "2", "input": "8", "output": "4", "users": "2"})
    (divider,) = app.slider
    fits = divider.value
    assert divider.min == 1 and 1 < fits <= divider.max
    assert f"{fits} slots per layer" in divider.label and "for 2 at once" in divider.label
    divider.set_value(3).run()
    app = settled(app)
    assert next(n for n in app.number_input if n.label == "Expert slots").value == 3
    assert app.session_state["jobs"]["replay"].answer["memory"]["slots_per_layer"] == 3
    app = press(app, "As fits beside the KV caches of all requests")
    assert app.slider[0].value == fits
    assert not page({"model": "gpt-oss-20b", "policy": "all-resident", "prompts": "1", "output": "4"}).slider


def test_prices_that_are_entered_are_those_of_the_plan(page):
    app = page(QUICK | {"model": "tiny-moe-8x16", "input": "8", "output": "4"}, "capacity")
    box = next(n for n in app.number_input if n.label == "$ per hour, rtx-4090")
    assert box.value is None and box.placeholder == "not known"
    box.set_value(0.5).run()
    app = press(settled(app), "Run")
    plan = app.session_state["jobs"]["plan"].answer
    assert {row["usd_per_hour"] for row in plan["candidates"] if row["machine"] == "rtx-4090"} == {0.5}
    assert app.session_state["asked"].prices == "rtx-4090=0.5"
    (file,) = [word for word in app.session_state["jobs"]["plan"].words if word.endswith(".csv")]
    assert "rtx-4090,0.5," in Path(file).read_text()


def test_this_machine_is_a_choice_and_what_lacks_is_said(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no profile lies here
    app = page(QUICK | {"machine": "this"})
    assert any("machine 'this'" in error.value and "moesim calibrate" in error.value for error in app.error)


def test_answers_about_this_machine_are_not_those_of_an_older_profile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["plan", "--machine", "this,l4"]
    before = stamps(command)
    (tmp_path / "my-box").mkdir()
    (tmp_path / "my-box" / "meta.yaml").write_text("provenance: measured")
    assert not before and len(stamps(command)) == 1 and not stamps(["plan", "--machine", "l4"])


def test_predictions_beside_measurements_are_those_of_the_command_line(page, monkeypatch):
    row = {"id": "a-01", "group": "a", "metric": "decode_tok_s", "measured": 10.0, "predicted": 11.0, "error": 0.1}
    answer = {
        "cases": [row], "summary": {"decode_tok_s": {}}, "tolerances": {"decode_tok_s": 0.3},
        "regimes": {"PCIe-bound": {"cases": 1, "signed_bias": 0.1}},
    }  # fmt: skip
    began = jobs.subprocess.Popen

    def instead(arguments, **options):
        if "published" in arguments:  # minutes
            (Path(arguments[3]) / "answer.json").write_text(json.dumps(answer))
            arguments = [sys.executable, "-c", ""]
        return began(arguments, **options)

    monkeypatch.setattr(jobs.subprocess, "Popen", instead)
    app = press(page(QUICK, "timeline"), "Run")
    assert app.selectbox(key="metric").options == ["decode_tok_s"]
    assert list(app.dataframe[2].value["regime"]) == ["PCIe-bound"]


def test_what_would_help_is_a_tornado_of_the_gains(page):
    app = press(page(QUICK), "Run")
    found = app.session_state["jobs"]["whatif"].answer["changes"]
    assert app.dataframe[0].value["change"][0] in {f"{row['resource']}: {row['what']}" for row in found}


def test_lines_to_start_an_engine_are_on_the_first_page(page):
    app = page({"model": "gpt-oss-20b", "policy": "llama.cpp", "prompts": "1", "input": "4", "output": "4"})
    assert any("llama-server" in code.value and "# untested" in code.value for code in app.code)


def test_pinning_compares_with_what_is_chosen_next(page):
    app = page(QUICK)
    next(b for b in app.button if b.label.startswith("Pin as A")).click().run()
    next(n for n in app.number_input if n.label == "Expert slots").set_value(4).run()
    app = settled(app)
    told = [m.value for m in app.markdown if "Against A" in m.value]
    assert told and "slots 8 to 4" in told[0]


def test_a_bad_value_in_the_address_is_said(page):
    assert "slots=lots" in page(QUICK | {"slots": "lots"}).warning[0].value


def test_what_cannot_be_is_an_error_in_words(page):
    app = page(QUICK | {"policy": "LRUU"})
    assert any("LRU" in error.value for error in app.error)


def test_an_infeasible_question_is_answered(page):
    app = page({"model": "mixtral-8x7b", "policy": "all-resident", "prompts": "1", "input": "4", "output": "4"})
    assert any("OOM" in w.value for w in [*app.warning, *app.error])


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_examples_make_sense(name, tmp_path):
    one = EXAMPLES[name]
    assert from_query(to_query(one)) == (one, [])
    assert words(one, Files(TRACES, tmp_path))


# -- in a browser -------------------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no chromium; install the package of that name")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MOESIM_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from moesim.cli import main; main()", "dashboard", "--no-browser",
               "--port", str(port), "--traces", str(TRACES)]  # fmt: skip
    server = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://localhost:{port}"
    os.killpg(server.pid, 15)
    server.wait()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(served, browser):
    pages = []

    def open_page(path: str = "", **query: str):
        pages.append(browser.new_page(viewport={"width": 1366, "height": 1800}))
        pages[-1].set_default_timeout(90_000)
        address = "&".join(f"{name}={value}" for name, value in (QUICK | query).items())
        pages[-1].goto(f"{served}/{path}?{address}")
        return pages[-1]

    yield open_page
    for one in pages:
        one.close()


def test_browser_first_page_controls_link_and_downloads(opened):
    page = opened()
    page.get_by_text("output tok/s").first.wait_for()
    slots = page.get_by_role("spinbutton", name="Expert slots")
    slots.fill("4")
    slots.press("Enter")
    page.wait_for_function("location.search.includes('slots=4')")
    page.get_by_text("moesim replay").filter(has_text="--slots-per-layer 4").first.wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Summary (JSON)").click()
    summary = json.loads(download.value.path().read_text())
    assert summary["memory"]["slots_per_layer"] == 4
    with page.expect_download() as download:
        page.get_by_role("button", name="Report (HTML)").click()
    assert b"<html" in download.value.path().read_bytes()[:200]
    again = opened(slots="4")
    again.get_by_text("4 of 16 experts per layer").first.wait_for()
    again.get_by_text(f"{summary['metrics']['output_throughput']:.4g}").first.wait_for()


def test_browser_lab_capacity_and_timeline(opened):
    page = opened("lab")
    page.get_by_text("cacheable:").wait_for()
    page.get_by_role("button", name="Run").click()
    page.locator('[data-testid="stDataFrame"]').wait_for()
    page = opened("capacity", ttft="50")
    page.get_by_role("button", name="Run").first.click()
    page.get_by_text("breaks first").wait_for()
    page = opened("timeline")
    page.locator('[data-testid="stPlotlyChart"]').first.wait_for()
    page.locator('[data-testid="stDataFrame"]').first.wait_for()


def test_browser_uploads_good_and_bad(opened, tmp_path):
    page = opened()
    page.get_by_text("Upload a trace").click()
    chooser = page.locator('input[type="file"]')
    bad = tmp_path / "bad.parquet"
    bad.write_bytes(b"PAR1 no")
    chooser.set_input_files(bad)
    page.locator('[data-testid="stAlert"]', has_text="bad.parquet").wait_for()
    good = tmp_path / "mine.parquet"
    good.write_bytes((TRACES / "tiny-moe-8x16.parquet").read_bytes())
    chooser.set_input_files(good)
    page.wait_for_function("location.search.includes('mine.parquet')")


def test_browser_cancel(opened):
    page = opened(prompts="336", policy="fMoE")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("stopped").wait_for()
    page.get_by_role("button", name="Run again").wait_for()
