"""What a machine can do, and what comes next, is said from what is there."""

from __future__ import annotations

import json

from moesim import doctor, hardware

SMI = "NVIDIA GeForce RTX 4090, 24564, 23800, 580.159.04, 4, 16, GPU-1\n"


def test_the_next_command_follows_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "gpus", list)
    assert doctor.examine(tmp_path)["next"].startswith("moesim trace synth")
    monkeypatch.setattr(hardware, "gpus", lambda: hardware.parse_gpus(SMI))
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    assert doctor.examine(tmp_path)["next"].startswith("moesim calibrate --device cuda:0")
    row = {"path": "mine", "name": "mine", "machine": "rtx-4090", "provenance": "measured", "date": "2026-01-01"}
    monkeypatch.setattr(doctor, "_this", lambda directory: {"machine": "local-rtx-4090", "summary": "", "error": None})
    monkeypatch.setattr(doctor, "profiles_in", lambda *given: [row | {"fresh": True, "changes": []}])
    assert doctor.examine(tmp_path)["next"].endswith("--machine this")
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "profiles_in", lambda *given: [row | {"fresh": False, "changes": ["driver"]}])
    assert doctor.examine(tmp_path)["next"] == "pip install 'moesim[gpu]'"


def test_a_broken_profile_is_named_and_stops_nothing(tmp_path, call):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "meta.yaml").write_text("provenance: guessed\n")
    code, out, err = call("doctor", tmp_path, "--json")
    assert code == 0 and not err
    assert "provenance" in json.loads(out)["profiles"][0]["error"]


def test_the_page_says_what_is_next(call, tmp_path):
    code, out, _ = call("doctor", tmp_path)
    assert code == 0 and "memory" in out and out.splitlines()[-1].startswith("next: ")
    code, _, err = call("doctor", tmp_path / "none")
    assert code == 2 and "not a directory" in err
