"""Profiles: round trip, refusal without conditions, corrupted files, what ships, and the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from moesim.cli import app
from moesim.costs.fit import fit_rows
from moesim.errors import CalibrationError, MachineError
from moesim.machine import load_machine
from moesim.profile import (
    ALWAYS,
    CONDITIONS,
    MAX_META_BYTES,
    Profile,
    check_meta,
    machine_of,
    profile_path,
    read_profile,
    shipped,
    write_profile,
)
from moesim.profile_compare import compare

META = dict.fromkeys((*ALWAYS, *CONDITIONS["measured"]), "x") | {
    "schema_version": 1,
    "name": "box",
    "machine": "h100-sxm",
    "provenance": "measured",
    "gpu": None,
}


def rows() -> list[dict]:
    copies = [
        {"family": "copy", "direction": d, "pinned": 1, "concurrent": 1, "parts": 1, "both": 0, "nbytes": 1 << i,
         "seconds": 1e-5 + (1 << i) / 2.5e10, "mad_s": 1e-7, "n": 3, "samples": [1e-5, 2e-5, 3e-5]}
        for d in ("h2d", "d2h") for i in range(10, 30, 2)
    ]  # fmt: skip
    gemms = [
        {"family": "gemm", "m": m, "n": n, "k": 512, "dtype": "bf16", "seconds": 1e-5 + m * n * 1e-12, "n_samples": 1}
        for m in (1, 16, 256)
        for n in (512, 1024)
    ]
    return copies + gemms


@pytest.fixture
def profile() -> Profile:
    return Profile("box", META, rows(), fit_rows(rows()))


def test_round_trip(profile: Profile, tmp_path: Path) -> None:
    write_profile(profile, tmp_path / "box")
    again = read_profile(tmp_path / "box")
    assert again.meta == META and again.name == "box" and again.label == "measured profile box"
    assert sorted(map(str, again.samples)) == sorted(map(str, profile.samples))
    assert [c.to_dict() for c in again.curves] == [c.to_dict() for c in profile.curves]
    assert {p.name for p in (tmp_path / "box").iterdir()} == {
        "meta.yaml",
        "fit.json",
        "kernels.parquet",
        "links.parquet",
    }


def test_rows_are_kept_apart_by_kind(profile: Profile, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_profile(profile, tmp_path)
    assert set(pq.read_table(tmp_path / "kernels.parquet")["family"].to_pylist()) == {"gemm"}
    assert set(pq.read_table(tmp_path / "links.parquet")["family"].to_pylist()) == {"copy"}


@pytest.mark.parametrize("missing", [*ALWAYS, *CONDITIONS["measured"]])
def test_results_without_their_conditions_are_refused(profile: Profile, tmp_path: Path, missing: str) -> None:
    meta = {key: value for key, value in META.items() if key != missing}
    with pytest.raises(CalibrationError, match=missing):
        write_profile(replace(profile, meta=meta), tmp_path / "box")
    assert not (tmp_path / "box" / "meta.yaml").exists()


@pytest.mark.parametrize(
    "change,said",
    [
        ({"schema_version": 2}, "schema_version 2"),
        ({"provenance": "guessed"}, "guessed"),
        ({"date": ""}, "date is empty"),
    ],
)
def test_conditions_that_cannot_be(change: dict, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        check_meta(META | change, "here")


def test_imported_profiles_name_source_and_licence() -> None:
    meta = {k: META[k] for k in ALWAYS} | {"provenance": "imported", "gpu": "H100"}
    with pytest.raises(CalibrationError, match="source, licence"):
        check_meta(meta, "here")


@pytest.mark.parametrize(
    "file,content,said",
    [
        ("meta.yaml", "[", "not YAML"),
        ("meta.yaml", "- a", "must be a mapping"),
        ("meta.yaml", "a: " + "x" * (MAX_META_BYTES + 1), "larger than"),
        ("fit.json", "{}", "not a fit"),
        ("fit.json", "[1", "not a fit"),
        ("fit.json", '{"curves": [{"family": "gemm"}]}', "not a fit"),
        ("kernels.parquet", "PAR1 no", "not a Parquet file"),
    ],
)
def test_corrupted_files_are_one_line_errors(
    profile: Profile, tmp_path: Path, file: str, content: str, said: str
) -> None:
    write_profile(profile, tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(CalibrationError, match=said) as caught:
        read_profile(tmp_path)
    assert "\n" not in str(caught.value) and file in str(caught.value)


def test_bad_rows_are_named(profile: Profile, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_profile(profile, tmp_path)
    pq.write_table(pa.table({"family": ["gemm", "gemm"], "seconds": [1.0, -1.0]}), tmp_path / "kernels.parquet")
    with pytest.raises(CalibrationError, match=r"row 1: seconds -1\.0"):
        read_profile(tmp_path)


def test_unknown_profiles_and_bare_directories(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="did you mean 'h100-sxm'"):
        read_profile("h100-smx")
    with pytest.raises(CalibrationError, match="without their conditions"):
        read_profile(tmp_path)
    assert profile_path(tmp_path) is None


# What ships


@pytest.mark.parametrize("name", ["a100-sxm", "h100-sxm", "h200-sxm"])
def test_imported_profiles_hold_curves_with_their_source_and_no_rows(name: str) -> None:
    path = profile_path(name)
    assert path is not None and {p.name for p in path.iterdir()} == {"meta.yaml", "fit.json"}
    assert (path / "fit.json").stat().st_size < 2 << 20
    found = read_profile(name)
    assert found.meta["licence"] == "Apache-2.0" and "aiconfigurator" in found.meta["source"]
    assert load_machine(found.meta["machine"]).profile == name
    for curve in found.curves:
        assert curve.points >= 3 and 0 <= curve.holdout_median_error <= curve.p90


def test_a_measured_profile_ships_with_its_rows_and_is_asked_for_by_name() -> None:
    assert shipped() == ["a100-sxm", "h100-measured", "h100-sxm", "h200-measured", "h200-sxm"]
    for card, gpu in (("h200", "NVIDIA H200"), ("h100", "NVIDIA H100 80GB HBM3")):
        found = read_profile(f"{card}-measured")
        assert found.meta["provenance"] == "measured" and found.meta["gpu"] == gpu
        assert len(found.samples) == sum(curve.points for curve in found.curves) > 4000
        assert load_machine(f"{card}-measured").profile == f"{card}-measured"
        assert load_machine(card).profile == f"{card}-sxm"
    found = read_profile("h200-measured")
    rows = compare(found, read_profile("h200-sxm"))
    beside = {row["beside"]: row["median"] for row in rows if row["curve"].startswith("gemm bf16")}
    assert len(beside) == 2 and all(0.8 < ratio < 1.1 for ratio in beside.values())  # torch's products in both engines


def test_machines_without_a_profile_are_specification_sheets() -> None:
    assert load_machine("rtx-4090").profile == ""


def test_a_profile_brings_its_machine(profile: Profile, tmp_path: Path) -> None:
    write_profile(profile, tmp_path / "box")
    machine = load_machine(tmp_path / "box")
    assert machine.name == "h100-sxm" and machine.profile == str(tmp_path / "box")
    write_profile(replace(profile, meta=META | {"machine": None}), tmp_path / "box")
    with pytest.raises(CalibrationError, match="machine: NAME"):
        machine_of(tmp_path / "box")


def test_machine_files_choose_their_profile(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("from: h100\nhost.memory: 64GiB\n")
    assert load_machine(file).profile == ""
    file.write_text("from: h100\nprofile: h100-sxm\n")
    assert load_machine(file).profile == "h100-sxm"
    file.write_text("from: h100\nprofile: 3\n")
    with pytest.raises(MachineError, match="profile"):
        load_machine(file)


# Commands


def run(*words: str) -> str:
    result = CliRunner().invoke(app, ["profile", *words])
    assert result.exit_code == 0, result.output
    return result.output


def test_list() -> None:
    text = run("list")
    assert "h200-sxm" in text and "specification-sheet only:" in text and "rtx-4090" in text
    assert len(json.loads(run("list", "--json"))["profiles"]) == 5


def test_show_has_what_a_script_needs(profile: Profile, tmp_path: Path) -> None:
    write_profile(profile, tmp_path / "box")
    page = tmp_path / "page.html"
    report = json.loads(run("show", str(tmp_path / "box"), "--json", "--plot", str(page)))
    for family in report["families"].values():
        assert {"holdout_median_error", "p90", "points", "range", "curves"} <= set(family)
    assert report["families"]["gemm"]["points"] == 6 and report["families"]["copy"]["range"]["nbytes"] == [
        1024,
        1 << 28,
    ]
    assert "nbytes" in page.read_text() and page.read_text().count("<section>") == 3
    assert "hold-out error" in run("show", str(tmp_path / "box"))


def test_compare_finds_the_factor(profile: Profile, tmp_path: Path) -> None:
    slow = fit_rows([row | {"seconds": 2 * row["seconds"]} for row in rows()])
    write_profile(profile, tmp_path / "a")
    write_profile(Profile("b", META | {"name": "b"}, (), slow), tmp_path / "b")
    found = json.loads(run("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"))["curves"]
    assert len(found) == 3
    for row in found:
        assert row["median"] == pytest.approx(2, rel=0.02)


def test_check_tells_what_changed(profile: Profile, tmp_path: Path) -> None:
    from moesim.profile_compare import conditions_here

    here = {key: value for key, value in conditions_here().items() if value}
    write_profile(replace(profile, meta=META | {"driver": None} | here), tmp_path / "fresh")
    assert "as they were" in run("check", str(tmp_path / "fresh"))
    write_profile(replace(profile, meta=META | {"driver": None} | here | {"torch": "1.0"}), tmp_path / "stale")
    result = CliRunner().invoke(app, ["profile", "check", str(tmp_path / "stale")])
    assert result.exit_code == 1 and "torch: measured with 1.0" in result.output
    assert "imported" in run("check", "h100-sxm")


def test_sparse_says_where_it_pays_and_on_what_basis() -> None:
    report = json.loads(run("sparse", "rtx-3090", "--json"))
    gains = [report["speedup"][str(1 << i)] for i in range(15)]
    assert gains[0] < 1 < gains[-1] < 2 and report["break_even_rows"] > 1
    assert report["weight_bytes"] == 14336 * 4096 * 2 * 0.5625 and "imported" in report["basis"]
    assert "pays from" in run("sparse", "h100")


def test_meta_is_yaml_a_person_can_read(profile: Profile, tmp_path: Path) -> None:
    write_profile(profile, tmp_path)
    assert yaml.safe_load((tmp_path / "meta.yaml").read_text())["name"] == "box"
