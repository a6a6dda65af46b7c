"""What this computer has: cards lead to the catalogue or to nothing, limits of containers count."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from moesim import hardware
from moesim.units import GIB, MIB

SMI = "NVIDIA GeForce RTX 4090, 24564, 23800, 580.159.04, 4, 16, GPU-1a2b\nSome GPU, [N/A], 5, 1, [N/A], 16, GPU-3c\n"


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
    assert hardware.machine_named(name, int(gib * GIB)) == machine


def test_what_the_driver_lists():
    first, second = hardware.parse_gpus(SMI)
    assert first["memory_bytes"] == 24564 * MIB and first["pcie"] == "gen4 x16" and first["machine"] == "rtx-4090"
    assert second["memory_bytes"] is None and second["pcie"] is None and second["machine"] is None
    assert hardware.parse_gpus("No devices were found\n") == []


def test_the_driver_is_asked_without_nvidia_smi_where_its_library_is_there(monkeypatch):
    def refuse(handle):
        raise RuntimeError("not supported")

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.159.04",
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "NVIDIA H200",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=140 * GIB, free=139 * GIB),
        nvmlDeviceGetMaxPcieLinkGeneration=refuse,
        nvmlDeviceGetMaxPcieLinkWidth=lambda handle: 16,
        nvmlDeviceGetUUID=lambda handle: "GPU-1",
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(hardware, "_nvidia_smi", lambda: pytest.fail("asked twice"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (gpu,) = hardware.gpus()
    assert gpu["machine"] == "h200-sxm" and gpu["memory_bytes"] == 140 * GIB and gpu["pcie"] is None


@pytest.mark.parametrize(
    ("devices", "left"),
    [(None, [0, 1]), ("1", [1]), ("1,0", [1, 0]), ("", []), ("GPU-3", [1]), ("0,7,1", [0]), ("-1", [])],
)
def test_cards_are_left_out_as_cuda_leaves_them_out(devices, left):
    found = hardware.parse_gpus(SMI)
    assert hardware.visible(found, devices) == [found[i] for i in left]


@pytest.mark.parametrize(
    ("text", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("max 100000", None), ("", None)]
)
def test_a_container_may_have_fewer_cores(text, cores):
    assert hardware._quota(text) == cores


def test_hyperthreads_are_one_core(monkeypatch):
    places = {0: ("0", "0"), 1: ("0", "0"), 2: ("0", "1"), 3: ("1", "0")}
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(places), raising=False)
    monkeypatch.setattr(hardware, "_place", places.get)
    cpu = hardware.cpu()
    assert (cpu["usable_cores"], cpu["physical_cores"], cpu["sockets"]) == (4, 3, 2)
    monkeypatch.setattr(hardware, "_place", lambda number: None)
    assert hardware.cpu()["physical_cores"] is None
