"""`--machine this`: what is found is used, measured rates go before others, and what nobody knows is asked for."""

from __future__ import annotations

import json

import pytest

from moesim import hardware, this_machine
from moesim.costs.fit import fit_rows
from moesim.costs.fitted import Fitted, costs_of
from moesim.costs.roofline import Roofline
from moesim.errors import MachineError
from moesim.machine import load_machine
from moesim.memory import plan_memory
from moesim.model import load_model
from moesim.plan.spec import points_of
from moesim.profile import ALWAYS, CONDITIONS, Profile, write_profile
from moesim.question import Question
from moesim.units import GIB, MIB
from tests.conftest import ROOT

CARD = "NVIDIA GeForce RTX 4090, 24564, 23800, 580.1, 4, 8, GPU-1\n"
UNKNOWN = "NVIDIA RTX 6000 Ada Generation, 49140, 48000, 580.1, 4, 16, GPU-2\n"
CPU = {
    "name": "AMD Ryzen 9 7950X", "cores": 32, "usable_cores": 32, "physical_cores": 16, "sockets": 1,
    "limit_cores": None, "numa_nodes": 1,
}  # fmt: skip


@pytest.fixture
def box(monkeypatch, tmp_path):
    """Set up a computer and go to its folder."""

    def build(cards="", memory=64 * GIB, limit=None, **cpu):
        sizes = {"total_bytes": memory, "available_bytes": memory, "limit_bytes": limit}
        monkeypatch.setattr(hardware, "gpus", lambda: hardware.parse_gpus(cards))
        monkeypatch.setattr(hardware, "cpu", lambda: CPU | cpu)
        monkeypatch.setattr(hardware, "cpu_name", lambda: CPU["name"])
        monkeypatch.setattr(hardware, "memory", lambda: sizes)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return build


def rows(dram=60.0, pcie=13.0, nvme=5.0):
    """An expert of 8 MiB over threads, copies and cold reads, at such rates."""
    params = 3 * 512 * 1024
    experts = [
        {"family": "host_expert", "tokens": tokens, "hidden": 512, "ffn": 1024, "matrices": 3, "threads": threads,
         "dtype": "fp32", "seconds": max(4 * params / dram / 1e9 * 16 / threads, 2 * tokens * params / 1e12)}
        for tokens in (1, 64, 256) for threads in (1, 4, 16)
    ]  # fmt: skip
    copies = [
        {"family": "copy", "direction": d, "pinned": 1, "nbytes": 1 << i, "seconds": 1e-5 + (1 << i) / pcie / 1e9}
        for d in ("h2d", "d2h") for i in range(10, 30, 2)
    ]  # fmt: skip
    reads = [
        {"family": "read", "direct": 1, "depth": depth, "nbytes": 1 << i, "seconds": 1e-4 + (1 << i) / nvme / 1e9}
        for depth in (1, 4) for i in range(16, 28, 2)
    ]  # fmt: skip
    return experts + copies + reads


def measure(folder, date="2026-11-20", gpu="NVIDIA GeForce RTX 4090", measured=None, **conditions):
    measured = rows() if measured is None else measured
    meta = dict.fromkeys((*ALWAYS, *CONDITIONS["measured"]), None) | {
        "schema_version": 1, "name": folder.name, "moesim": "0", "machine": None, "provenance": "measured",
        "date": date, "gpu": gpu, "cpu": CPU["name"], "driver": "580.1" if gpu else None,
    }  # fmt: skip
    write_profile(Profile(folder.name, meta | conditions, measured, fit_rows(measured)), folder)


def test_a_gaming_box_with_a_profile(box):
    folder = box(CARD)
    measure(folder / "old", "2026-11-01", measured=rows(dram=50.0))
    measure(folder / "my-box", "2026-11-20")
    machine = load_machine("this")
    assert machine.name == "local-rtx-4090" and machine.profile == "my-box" and not machine.unified
    assert machine.gpu.memory_bytes == 24564 * MIB and machine.gpu.hbm_gbps == load_machine("rtx-4090").gpu.hbm_gbps
    host = machine.host
    assert (host.memory_bytes, host.cores, host.platform) == (64 * GIB, 16, "desktop")
    assert host.dram_gbps == pytest.approx(60, rel=0.01) and machine.pcie.gbps == pytest.approx(13, rel=0.02)
    assert machine.nvme.gbps == pytest.approx(5, rel=0.05) and machine.usd_per_hour is None
    assert isinstance(costs_of(machine), Fitted)
    assert Roofline(machine).host_gbps == pytest.approx(60, rel=0.01)  # measured on experts, so no share of it


def test_answers_name_the_machine_and_say_what_it_rests_on(box, call, small_config):
    measure(box(CARD) / "my-box")
    code, out, _ = call(
        "replay", "--model", small_config, "--machine", "this", "--num-prompts", 2, "--random-input-len", 4,
        "--random-output-len", 2, "--no-anchors", "--json",
    )  # fmt: skip
    summary = json.loads(out)
    assert code == 0 and summary["inputs"]["machine"]["name"] == "local-rtx-4090"
    assert summary["inputs"]["arguments"]["machine"]["name"] == "local-rtx-4090"
    assert summary["inputs"]["costs"] == "measured profile my-box" and '"this"' not in out
    note, assumed = summary["notes"][:2]
    assert "RTX 4090, rates of rtx-4090 in the catalogue" in note and "60.2 GB/s" in note and "13 GB/s measured" in note
    assert "desktop by the CPU's name" in assumed


def test_a_sweep_asks_once_and_for_the_machine_it_runs_on(box, tmp_path):
    measure(box(CARD) / "my-box")
    points = points_of({"base": {"trace": "t.parquet"}, "grid": {"machine": ["this", "l4"]}})
    assert [getattr(p.question.machine, "name", p.question.machine) for p in points] == ["local-rtx-4090", "l4"]


def test_without_a_profile_the_rate_of_memory_is_asked_for(box):
    folder = box(CARD)
    with pytest.raises(MachineError, match=r"host memory is not known; run `moesim calibrate --device cuda:0.*: this"):
        load_machine("this")
    file = folder / "mine.yaml"
    file.write_text("from: this\nhost.dram_gbps: 77\n")
    machine = load_machine(file)
    assert machine.name == "mine" and machine.host.dram_gbps == 77 and machine.host.cores == 16
    assert machine.pcie.gbps == 25.5 / 2 and "8/16" in machine.source  # a x8 slot
    assert machine.nvme is None and "no drive" in machine.assumed
    assert Roofline(machine).host_gbps == pytest.approx(0.85 * 77)


def test_a_stale_profile_is_not_used_and_said(box):
    measure(box(CARD) / "my-box", driver="570.0")
    with pytest.raises(MachineError, match=r"my-box: driver: measured with 570.0, now 580.1"):
        load_machine("this")


def test_a_profile_of_the_cpu_is_none_of_a_machine_with_a_gpu(box):
    measure(box(CARD) / "my-cpu", gpu=None)
    with pytest.raises(MachineError, match="host memory is not known"):
        load_machine("this")


def test_an_unknown_card_is_asked_for_and_then_taken(box):
    folder = box(UNKNOWN)
    measure(folder / "my-box", gpu="NVIDIA RTX 6000 Ada Generation")
    message = r"RTX 6000 Ada Generation' \(48 GiB\) is not in the catalogue.*gpu.hbm_gbps: ..., gpu.tflops: ..."
    with pytest.raises(MachineError, match=message):
        load_machine("this")
    file = folder / "ada.yaml"
    file.write_text("from: this\ngpu.hbm_gbps: 960\ngpu.tflops: 364\n")
    machine = load_machine(file)
    assert machine.gpu.name == "NVIDIA RTX 6000 Ada Generation" and machine.gpu.memory_bytes == 49140 * MIB
    assert (machine.gpu.hbm_gbps, machine.gpu.tflops, machine.gpu.fp8_tflops) == (960, 364, None)
    assert machine.profile == "my-box" and machine.host.dram_gbps == pytest.approx(60, rel=0.01)
    file.write_text("from: this\ngpu.hbm_gbps: -1\ngpu.tflops: 364\n")
    with pytest.raises(MachineError, match=r"gpu.hbm_gbps: -1 must be a number above 0"):
        load_machine(file)


def test_a_link_nobody_knows_is_asked_for(box):
    box(CARD.replace("4, 8,", "[N/A], [N/A],"))
    with pytest.raises(MachineError, match=r"pcie.gbps: ..., host.dram_gbps: ..."):
        load_machine("this")


def test_cards_that_are_alike_are_counted(box):
    folder = box(CARD + CARD.replace("GPU-1", "GPU-9"))
    measure(folder / "my-box")
    machine = load_machine("this")
    assert machine.name == "local-2xrtx-4090" and machine.gpus == 2 and not machine.others
    box(CARD + "NVIDIA GeForce RTX 3090, 24576, 23800, 580.1, 4, 8, GPU-3\n")
    unlike = load_machine("this")
    assert unlike.name == "local-rtx-4090+rtx-3090" and [m.gpu.name for m in unlike.others] == ["rtx-3090"]
    box(CARD + UNKNOWN)
    with pytest.raises(MachineError, match="CUDA_VISIBLE_DEVICES"):
        load_machine("this")


def test_a_computer_without_a_gpu(box):
    folder = box(memory=128 * GIB, limit=32 * GIB, physical_cores=16, limit_cores=8)
    with pytest.raises(MachineError, match=r"calibrate --device cpu.*gpu.hbm_gbps: ..., gpu.tflops: ..."):
        load_machine("this")
    measure(folder / "my-box", gpu=None)
    machine = load_machine("this")
    assert machine.name == "local-cpu" and machine.unified and machine.cpu_only and not machine.profile
    assert machine.gpu.memory_bytes == machine.host.memory_bytes == 32 * GIB and machine.host.cores == 8
    assert machine.gpu.hbm_gbps == pytest.approx(60, rel=0.01) and 0.9 < machine.gpu.tflops < 16.1
    roofline = Roofline(machine)
    assert roofline.gemm(1, 1e9, 1e9) == pytest.approx(1e9 / 60e9, rel=0.01)  # as measured, not a share of it
    ledger = plan_memory(load_model("tiny-moe-8x16"), machine, all_resident=True)
    assert ledger.gpu["CUDA context"] == 0 and ledger.verdict == "FITS"
    assert "without a GPU" in machine.summary and "GPU's" in machine.assumed


def test_a_plan_without_a_gpu_keeps_all_in_memory(box, call):
    measure(box() / "my-box", gpu=None)
    words = "--random-input-len", 4, "--random-output-len", 4, "--max-concurrency", 2, "--bits", 32
    code, out, _ = call("plan", "--model", "tiny-moe-8x16", "--machine", "this", *words, "--json")
    result = json.loads(out)
    assert code == 0 and [row["policy"] for row in result["candidates"]] == ["all-resident"]
    assert "llama-server -m MODEL.gguf -t 16 -np 2" in result["best"]["flags"]["llama.cpp"]
    assert result["best"]["machine"] == "local-cpu" and "Ryzen" in result["machines"]["local-cpu"]["notes"][0]


@pytest.mark.parametrize("command", ["whatif", "capacity"])
def test_every_command_takes_it(box, call, command):
    measure(box(CARD) / "my-box")
    trace, slo = ROOT / "traces" / "tiny-moe-8x16.parquet", ["--goodput", "ttft:100000"] * (command == "capacity")
    code, out, _ = call(command, trace, "--machine", "this", "--slots-per-layer", 8, *slo, "--json")
    assert code == 0 and "local-rtx-4090" in out and '"this"' not in out


def test_the_word_is_known_only_as_a_machine():
    assert Question(machine="l4").machine == "l4"
    with pytest.raises(MachineError):
        load_machine("thi")


@pytest.mark.parametrize(
    ("cpu", "sockets", "platform"),
    [
        ("AMD Ryzen 9 7950X 16-Core Processor", 1, "desktop"),
        ("AMD Ryzen Threadripper PRO 7965WX 24-Cores", 1, "workstation"),
        ("Intel(R) Xeon(R) w9-3495X", 1, "workstation"),
        ("Intel(R) Xeon(R) Platinum 8480+", 1, "server"),
        ("AMD EPYC 9654 96-Core Processor", 2, "server"),
        ("12th Gen Intel(R) Core(TM) i9-12900K", 1, "desktop"),
    ],
)
def test_the_platform_follows_from_the_cpus_name(cpu, sockets, platform):
    assert this_machine._platform(cpu, sockets) == platform
