"""Machines: the catalogue, names, and files that change a machine."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moesim.commands.machine import app
from moesim.efficiencies import SCALES, Efficiencies, check_term, efficiencies, read_table, terms
from moesim.errors import MachineError
from moesim.machine import PLATFORMS, catalogue, load_machine
from moesim.units import GIB


def write(tmp_path: Path, text: str, name: str = "box.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", catalogue())
def test_every_catalogue_machine_is_complete(name: str) -> None:
    machine = catalogue()[name]
    assert 10 * GIB <= machine.gpu.memory_bytes <= 300 * GIB
    assert 200 <= machine.gpu.hbm_gbps <= 10_000
    assert 20 <= machine.gpu.tflops <= 3_000
    assert machine.host.platform in PLATFORMS
    assert machine.host.dram_gbps > 0 and machine.host.reserve_bytes < machine.host.memory_bytes
    assert machine.source
    assert "host" in machine.assumed
    assert machine.unified == (machine.pcie.gbps == machine.gpu.hbm_gbps)


def test_figures_of_a_known_card() -> None:
    h200 = load_machine("h200")
    assert (h200.gpu.memory_bytes, h200.gpu.hbm_gbps, h200.gpu.tflops, h200.gpu.fp8_tflops) == (
        151397597184, 4800, 989, 1978,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "name"),
    [("rtx-4090", "rtx-4090"), ("RTX 4090", "rtx-4090"), ("rtx4090", "rtx-4090"), ("4090", "rtx-4090"),
     ("h200", "h200-sxm"), ("A100-80GB", "a100-80gb-sxm"), ("GB10", "dgx-spark")],
)  # fmt: skip
def test_names_and_aliases(spec: str, name: str) -> None:
    assert load_machine(spec).name == name


def test_aliases_are_unambiguous() -> None:
    spellings = [s for row in read_table("machines") for s in [row["name"], *row["aliases"].split()]]
    assert len(spellings) == len(set(spellings))


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(MachineError, match=r"machine 'rtx-4091': not in the catalogue; did you mean 'rtx-4090'"):
        load_machine("rtx-4091")


def test_file_overrides_nested_and_dotted_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "from: rtx-4090\ngpus: 2\nhost.memory: 96GiB\nhost:\n  dram_gbps: 88\n  cores: 12\npcie.gbps: 25\n"
        "nvme: null\nefficiencies: {hbm: 0.9}\n",
    )
    machine = load_machine(path)
    base = load_machine("rtx-4090")
    assert (machine.name, machine.gpus, machine.nvme) == ("box", 2, None)
    assert (machine.host.memory_bytes, machine.host.dram_gbps, machine.host.cores) == (96 * GIB, 88.0, 12)
    assert machine.pcie.gbps == 25.0 and machine.gpu == base.gpu
    assert [efficiencies(scale, machine.efficiencies).hbm for scale in SCALES] == [0.9] * 3
    assert efficiencies("low", machine.efficiencies).mfu == terms()["mfu"].low


def test_json_file_and_new_drive(tmp_path: Path) -> None:
    first = write(tmp_path, json.dumps({"from": "t4", "name": "mine", "nvme": {"gbps": 7}}), "m.json")
    machine = load_machine(str(first))
    assert machine.name == "mine" and machine.nvme is not None and machine.nvme.gbps == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("host.memory: 96GiB", "starts from no machine; add a line such as 'from: rtx-4090'"),
        ("from: rtx-4090\nhost.mem: 96GiB", "unknown key 'host.mem'; did you mean 'host.memory'"),
        ("from: rtx-4090\nefficiencies.hmb: 0.9", "efficiencies.hmb: unknown term; did you mean 'hbm'"),
        ("from: rtx-4090\nefficiencies.hbm: 80", "80 is a share of a rate; write 0.8 for 80 %"),
        ("from: rtx-4090\nefficiencies.hbm: .nan", "is not a positive number"),
        ("from: rtx-4090\nefficiencies.duplex: 3", "must be from 1"),
        ("from: rtx-4090\npcie.gbps: -1", "pcie.gbps: -1 must be a number above 0"),
        ("from: rtx-4090\npcie.gbps: 0", "must be a number above 0"),
        ("from: rtx-4090\npcie.gbps: .nan", "must be a number above 0"),
        ("from: rtx-4090\npcie.gbps: .inf", "must be a number above 0"),
        ("from: rtx-4090\npcie.gbps: true", "must be a number above 0"),
        (f"from: rtx-4090\npcie.gbps: 1{'0' * 400}", "pcie.gbps"),
        ("from: rtx-4090\npcie.duplex_gbps: 10", "must be from pcie.gbps"),
        ("from: rtx-4090\nhost.memory: lots", "host.memory: 'lots' must be a size such as 128GiB"),
        ("from: rtx-4090\nhost.reserve: 200GiB", "must be below host.memory"),
        ("from: rtx-4090\nhost.cores: 2.5", "must be a whole number"),
        ("from: rtx-4090\nhost.platform: laptop", "must be one of desktop, workstation, server"),
        ("from: rtx-4090\nhost: {cores: 4}\nhost.cores: 8", "host.cores is given twice"),
        ("from: strix-halo\npcie.gbps: 25", "one memory and no PCIe hop"),
        ("from: other.yaml", "must be a name of the catalogue"),
        ("- from: rtx-4090", "must be a mapping"),
        ("from: [", "not YAML or JSON"),
        ("from: !!python/object/apply:os.system ['true']", "not YAML or JSON"),
        ("from: rtx-4090\nx: &a {y: 1, x: *a}", "unknown key|not YAML"),
        ("\n".join(f"k{i}: 1" for i in range(200)), "more than 100 keys"),
        ("#" * 70000, "larger than"),
    ],
)
def test_bad_files_get_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(MachineError, match=message.replace("(", r"\(")) as error:
        load_machine(write(tmp_path, text))
    assert "box.yaml" in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be read"):
        load_machine(tmp_path / "none.yaml")


def test_unified_host_follows_the_gpu(tmp_path: Path) -> None:
    machine = load_machine(write(tmp_path, "from: strix-halo\ngpu.memory: 64GiB\ngpu.hbm_gbps: 200"))
    assert (machine.host.memory_bytes, machine.host.dram_gbps) == (64 * GIB, 200)


def test_terms_are_the_fields_and_their_bands_enclose_the_default() -> None:
    assert list(terms()) == list(Efficiencies.__dataclass_fields__)
    for term in terms().values():
        assert term.source and term.meaning
        slow, fast = (term.high, term.low) if term.unit == "us" else (term.low, term.high)
        assert 0 < slow <= term.default <= fast and math.isfinite(fast), term.name


def test_unknown_scale_and_term() -> None:
    with pytest.raises(MachineError, match="scale 'median'"):
        efficiencies("median")
    with pytest.raises(MachineError, match="unknown term"):
        check_term("speed", 1.0)


def test_commands() -> None:
    run = CliRunner().invoke
    listed = run(app, ["list"])
    assert listed.exit_code == 0 and "rtx-4090" in listed.stdout
    names = [m["name"] for m in json.loads(run(app, ["list", "--json"]).stdout)["machines"]]
    assert names == list(catalogue())
    told = json.loads(run(app, ["info", "h200", "--json"]).stdout)
    assert told["gpu"]["hbm_gbps"] == 4800 and told["terms"]["hbm"]["value"] == terms()["hbm"].default
    assert "handoff_us" in run(app, ["info", "rtx4090"]).stdout


def test_info_writes_a_file(tmp_path: Path) -> None:
    target = tmp_path / "info.json"
    assert CliRunner().invoke(app, ["info", "t4", "--json", "-o", str(target)]).exit_code == 0
    assert json.loads(target.read_text())["name"] == "t4"


def test_hosts_of_a_machine_file(tmp_path: Path) -> None:
    path = tmp_path / "pair.yaml"
    path.write_text("from: h200\ngpus: 16\nhosts: 2\nnetwork_gbps: 50\n")
    machine = load_machine(path)
    assert (machine.gpus, machine.hosts, machine.network_gbps) == (16, 2, 50.0)
    assert "in 2 hosts joined at 50 GB/s per GPU" in machine.summary
    path.write_text("from: h200\ngpus: 16\nhosts: 3\nnetwork_gbps: 50\n")
    with pytest.raises(MachineError, match=r"3 hosts cannot share 16 GPUs evenly"):
        load_machine(path)
    path.write_text("from: h200\ngpus: 16\nhosts: 2\n")
    with pytest.raises(MachineError, match=r"network_gbps: missing"):
        load_machine(path)
