"""Placements: what is written is read back, replays as it was exported, and bad files are named by layer and value."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PolicyError
from moesim.placement_files import eplb_json, llamacpp_override, placed, read_placement, trtllm_yaml
from moesim.policies.balance import balanced
from moesim.systems import load_system
from tests.conftest import small_trace

SOURCE = {"version": "test"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4]), st.integers(0, 3))
def test_round_trips(tmp_path_factory, seed, gpus, rounds):
    """Both formats, for models whose first layers are dense."""
    slots = 8 + gpus * rounds + -8 % gpus
    load = np.random.default_rng(seed).random((3, 8))
    given_slots, layers = balanced(load, slots, gpus), (2, 3, 5)
    folder = tmp_path_factory.mktemp("p")
    (folder / "e.json").write_text(eplb_json(given_slots, 8, layers, gpus, SOURCE))
    (folder / "t.yaml").write_text(trtllm_yaml(given_slots, layers, SOURCE))
    for name in ("e.json", "t.yaml"):
        assert np.array_equal(read_placement(folder / name, layers, 8, gpus), given_slots)


def test_eplb_maps_say_the_same_in_both_directions():
    slots = np.array([[0, 1, 2, 1], [2, 0, 1, 0]])
    data = json.loads(eplb_json(slots, 3, (0, 1), 2, SOURCE))
    assert data["logical_to_physical_map"] == [[[0, -1], [1, 3], [2, -1]], [[1, 3], [2, -1], [0, -1]]]
    assert data["logical_replica_count"] == [[1, 2, 1], [2, 1, 1]]
    assert data["num_gpus"] == 2 and data["moe_layers"] == [0, 1]


def test_trtllm_has_the_fields_of_its_load_balancer():
    data = yaml.safe_load(trtllm_yaml(np.array([[0, 1, 1, 0]]), (3,), SOURCE))
    assert data == {"num_slots": 4, "layer_updates_per_iter": 0, "initial_global_assignments": {3: [0, 1, 1, 0]}}


def test_maps_of_all_layers_are_taken_at_the_moe_layers(tmp_path):
    rows = [[0, 0], [1, 0], [0, 1]]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert read_placement(tmp_path / "p.json", (1, 2), 2, 2).tolist() == rows[1:]
    (tmp_path / "p.json").write_text(json.dumps({"phy2log": rows[1:]}))
    assert read_placement(tmp_path / "p.json", (1, 2), 2, 2).tolist() == rows[1:]


def test_llama_cpp_overrides_match_its_expert_tensors_only():
    pattern, _, where = llamacpp_override([0, 1, 12]).rpartition("=")
    assert where == "CPU"
    for name in ("blk.0.ffn_up_exps", "blk.12.ffn_gate_up_exps", "blk.1.ffn_down_chexps"):
        assert re.search(pattern, name + ".weight")
    for name in ("blk.2.ffn_up_exps", "blk.11.ffn_up_exps", "blk.0.ffn_up_shexp", "blk.0.attn_q", "blk.10.ffn_up_exps"):
        assert not re.search(pattern, name + ".weight")
    with pytest.raises(PolicyError, match="nothing to override"):
        llamacpp_override([])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[[0, 1]]", "1 layers, but the model has 2 MoE layers"),
        ("p.json", "[[0, 1], [0, 2]]", "layer 4: expert 2, but the model has 2"),
        ("p.json", "[[0, 1], [0, 0]]", "layer 4: expert 1 is on no GPU"),
        ("p.json", "[[0, 1], [0, 1, 1, 0]]", "layer 4: 4 slots; every layer must have as many"),
        ("p.json", "[[0, 1, 0], [0, 1, 0]]", "layer 3: 3 slots; .* divisible by 2 GPUs"),
        ("p.json", '[[0, "1"], [0, 1]]', "layer 3: must be a list of expert numbers"),
        ("p.json", "[[0, true], [0, 1]]", "layer 3: must be a list of expert numbers"),
        ("p.json", "{", "not JSON or YAML"),
        ("p.json", '{"a": 1}', "neither physical_to_logical_map"),
        ("p.yaml", "initial_global_assignments: {3: [0, 1]}", "layer 4 has no assignment"),
        ("p.yaml", "initial_global_assignments: [1]", "must map layer numbers"),
        ("p.yaml", "num_slots: 4\ninitial_global_assignments: {3: [0, 1], 4: [0, 1]}", "layer 3: 2 experts, but num_s"),
        ("p.yaml", "a: [", "not JSON or YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(PolicyError, match=message):
        read_placement(tmp_path / name, (3, 4), 2, 2)


def test_a_file_that_is_not_there_or_too_large(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read"):
        read_placement(tmp_path / "none.json", (3, 4), 2, 2)


@pytest.mark.parametrize(("form", "file"), [("eplb", "p.json"), ("trtllm", "p.yaml")])
def test_an_exported_placement_replays_as_the_system_it_is_of(tmp_path, small_config, trace_file, call, form, file):
    same = (trace_file, "--model", small_config, "--machine", "2xh200")
    code, out, _ = call("placement", "export", *same, "--format", form, "-o", tmp_path / file)
    assert code == 0 and out == ""
    words = ("replay", *same, "--policy", "EPLB", "--max-concurrency", 4, "--json", "--no-anchors")
    own = json.loads(call(*words)[1])
    read = json.loads(call(*words, "--placement", tmp_path / file)[1])
    assert read["metrics"] == own["metrics"]
    assert read["devices"] | {"placement": "balanced"} == own["devices"] and read["devices"]["placement"] == "given"
    assert f"experts are placed as {file} says" in read["notes"]
    # Another placement gives other loads.
    other = yaml.safe_load((tmp_path / file).read_text())
    rows = other.get("physical_to_logical_map") or list(other["initial_global_assignments"].values())
    for row in rows:
        row.sort()
    (tmp_path / "sorted.json").write_text(json.dumps(rows))
    sorted_ = json.loads(call(*words, "--placement", tmp_path / "sorted.json")[1])
    assert sorted_["devices"]["balancedness"] != own["devices"]["balancedness"]


def test_where_a_placement_makes_no_sense(tmp_path, small_config, trace_file, call):
    trace = small_trace()
    (tmp_path / "p.json").write_text(json.dumps([list(range(8))] * 3))
    with pytest.raises(PolicyError, match=r"take a machine such as 8xh200 .* not EPLB on 1 GPU$"):
        placed(load_system("EPLB"), tmp_path / "p.json", trace, 1)
    with pytest.raises(PolicyError, match="not LRU on 2 GPUs"):
        placed(load_system("LRU"), tmp_path / "p.json", trace, 2)
    with pytest.raises(PolicyError, match=r"set parallel.interval=0"):
        placed(load_system("EPLB(interval=5)"), tmp_path / "p.json", trace, 2)
    with pytest.raises(PolicyError, match="--placement FILE sets both"):
        load_system("EPLB").parallel.__class__("data", "expert", "given")
    same = (trace_file, "--model", small_config)
    code, _, err = call("placement", "export", *same, "--machine", "2xh200", "--policy", "all-resident")
    assert code == 2 and "take --policy EPLB" in err
    code, _, err = call("placement", "export", *same, "--format", "llama.cpp", "--machine", "h200")
    assert code == 2 and "take --policy llama.cpp" in err
    code, _, err = call("placement", "export", *same, "--format", "epl")
    assert code == 2 and "did you mean 'eplb'" in err


def test_export_for_llama_cpp_and_as_json(small_config, trace_file, call):
    words = ("placement", "export", trace_file, "--model", small_config, "--format", "llama.cpp", "--machine", "l4")
    code, out, _ = call(*words, "--policy", "llama.cpp(n_cpu_moe=2)")
    assert code == 0 and out.strip() == r"blk\.(0|1)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    told = json.loads(call(*words, "--policy", "llama.cpp(n_cpu_moe=2)", "--json")[1])
    assert told["format"] == "llama.cpp" and told["text"] == out.strip()
