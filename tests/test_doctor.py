"""What a machine can do is said from what is there; names of cards lead to the catalogue or to nothing."""

from __future__ import annotations

import json

import pytest

from moesim import doctor
from moesim.units import GIB, MIB

SMI = "NVIDIA GeForce RTX 4090, 24564, 23800, 580.159.04, 4, 16\nSome GPU, [N/A], 5, 1, [N/A], 16\n"


@pytest.mark.parametrize(
    ("name", "gib", "machine"),
    [
        ("NVIDIA GeForce RTX 4090", 23.99, "rtx-4090"),
        ("NVIDIA H200", 140.4, "h200-sxm"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-sxm"),
        ("NVIDIA H100 PCIe", 79.6, "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "a100-40gb-sxm"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "a100-80gb-sxm"),
        ("NVIDIA A100 80GB PCIe", 80.0, "a100-80gb-pcie"),
        ("NVIDIA L40S", 45.0, "l40s"),
        ("Tesla T4", 15.0, "t4"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.6, "rtx-pro-6000"),
        ("NVIDIA GeForce RTX 4080 SUPER", 16.0, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16.0, None),
        ("NVIDIA H100 NVL", 93.6, None),
        ("NVIDIA GeForce RTX 3080", 12.0, None),
    ],
)
def test_a_card_is_found_in_the_catalogue_or_not_at_all(name, gib, machine):
    assert doctor.machine_named(name, int(gib * GIB)) == machine


def test_what_the_driver_lists():
    first, second = doctor.parse_gpus(SMI)
    assert first["memory_bytes"] == 24564 * MIB and first["pcie"] == "gen4 x16" and first["machine"] == "rtx-4090"
    assert second["memory_bytes"] is None and second["pcie"] is None and second["machine"] is None
    assert doctor.parse_gpus("No devices were found\n") == []


def test_the_next_command_follows_from_what_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", list)
    assert doctor.examine(tmp_path)["next"].startswith("moesim trace synth")
    monkeypatch.setattr(doctor, "_gpus", lambda: doctor.parse_gpus(SMI))
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    assert doctor.examine(tmp_path)["next"].startswith("moesim calibrate --device cuda:0")
    row = {"path": "mine", "name": "mine", "machine": "rtx-4090", "provenance": "measured", "date": "2026-01-01"}
    monkeypatch.setattr(doctor, "_profiles", lambda directory: [row | {"fresh": True, "changes": []}])
    assert doctor.examine(tmp_path)["next"].endswith("--machine mine")
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "_profiles", lambda directory: [row | {"fresh": False, "changes": ["driver"]}])
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
