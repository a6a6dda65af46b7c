"""GGUF headers: real sizes, every layout we read, and files that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moesim.errors import ModelError
from moesim.model import Model, load_model
from moesim.model_files.gguf import BLOCKS, MAX_HEADER, read_header
from moesim.model_files.hf_config import model_from_config
from tests import gguf_writer as w

SHAPES = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 96,
}


def test_mixtral_has_the_files_bytes(tmp_path: Path) -> None:
    model = load_model(str(w.write(tmp_path / "small-Q4_K_M.gguf", *w.mixtral())))
    one = 2 * w.size((256, 512), w.Q4_K) + w.size((512, 256), w.Q6_K)
    other = w.size((256, 96), w.Q8_0) + w.size((256, 96), w.Q6_K) + 4 * 256
    other += 2 * (w.size((256, 768), w.Q8_0) + 4 * 256 + 4 * 256 * 4)
    assert model.name == "small-Q4_K_M"
    assert (model.experts, model.top_k, model.moe_layers, model.expert_ffn) == (4, 2, (0, 1), 512)
    assert model.expert_bytes(0) == model.expert_bytes(1) == one
    assert model.total_expert_bytes == 2 * 4 * one
    assert model.other_bytes == other
    assert model.expert_bits == pytest.approx(8 * one / (3 * 256 * 512))
    assert model.kv_bytes_per_token() == 2 * 2 * 2 * 64 * 2


def test_shapes_agree_with_the_config_of_the_same_model(tmp_path: Path) -> None:
    real = load_model(str(w.write(tmp_path / "m.gguf", *w.mixtral())))
    config = {**SHAPES, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    ours = model_from_config(config, "m", "config")
    norms = 256 * (2 + 1)
    assert real.total_params == ours.total_params + norms
    assert real.kv_bytes(1000) == ours.kv_bytes(1000)


def test_experts_of_different_precision_by_layer(tmp_path: Path) -> None:
    values, tensors = w.mixtral()
    tensors |= w.stacked(1, 4, w.Q8_0)
    model = load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))
    assert model.expert_bytes(1) == 3 * w.size((256, 512), w.Q8_0) > model.expert_bytes(0)
    assert model.total_expert_bytes == 4 * (model.expert_bytes(0) + model.expert_bytes(1))
    four = model.with_precision(expert_bits=4)
    assert four.expert_bytes(1) == 3 * 256 * 512 // 2
    assert four.other_bytes == model.other_bytes


def test_a_well_known_quant_has_its_well_known_size(tmp_path: Path) -> None:
    """Qwen3-30B-A3B-Q4_K_M.gguf in Qwen/Qwen3-30B-A3B-GGUF has 18,556,685,824 bytes, 6 MB of them vocabulary."""
    model = load_model(str(w.write(tmp_path / "m.gguf", *w.qwen3_30b_q4_k_m())))
    assert 0 < 18_556_685_824 - model.total_bytes < 10_000_000
    assert model.total_params == load_model("qwen3-30b-a3b").total_params
    sizes = {model.expert_bytes(i) for i in range(48)}
    assert sizes == {3 * 1_572_864 * 144 // 256, (2 * 144 + 210) * 1_572_864 // 256}
    assert model.kv_bytes_per_token() == load_model("qwen3-30b-a3b").kv_bytes_per_token()


def test_bits_per_weight_of_every_type() -> None:
    """As llama.cpp's quantize lists them; ids are those of ggml.h."""
    named = {
        0: 32, 1: 16, 2: 4.5, 3: 5, 6: 5.5, 7: 6, 8: 8.5, 10: 2.625, 11: 3.4375, 12: 4.5, 13: 5.5, 14: 6.5625,
        15: 9.125, 16: 2.0625, 17: 2.3125, 18: 3.0625, 19: 1.5625, 20: 4.5, 21: 3.4375, 22: 2.5625, 23: 4.25, 24: 8,
        25: 16, 26: 32, 27: 64, 28: 64, 29: 1.75, 30: 16, 34: 1.6875, 35: 2.0625, 39: 4.25, 40: 4.5, 41: 1.125,
    }  # fmt: skip
    assert {kind: 8 * size / block for kind, (block, size) in BLOCKS.items()} == named


@pytest.mark.parametrize("version", [2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    assert load_model(str(w.write(tmp_path / "m.gguf", *w.mixtral(), version=version))).experts == 4


def test_leading_dense_layer_shared_expert_and_prediction_layer(tmp_path: Path) -> None:
    """As GLM and DeepSeek: layer 0 dense, a shared expert, and a last layer that is not run."""
    values, tensors = w.mixtral(layers=4)
    values |= {"llama.nextn_predict_layers": 1}
    for part in ("gate_inp", "gate_exps", "up_exps", "down_exps"):
        del tensors[f"blk.0.ffn_{part}.weight"]
    tensors |= {f"blk.0.ffn_{m}.weight": ((256, 1024), w.Q8_0) for m in ("gate", "up")}
    tensors |= {"blk.0.ffn_down.weight": ((1024, 256), w.Q8_0)}
    for i in (1, 2, 3):
        tensors |= {f"blk.{i}.ffn_{m}_shexp.weight": ((256, 128), w.Q8_0) for m in ("gate", "up")}
        tensors |= {f"blk.{i}.ffn_down_shexp.weight": ((128, 256), w.Q8_0)}
    model = load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))
    assert (model.layers, model.moe_layers, model.dense_ffn, model.shared_ffn) == (3, (1, 2), 1024, 128)
    with_prediction = sum(w.size(shape, kind) for shape, kind in tensors.values())
    assert model.total_bytes < with_prediction


def test_one_tensor_per_expert_as_before_2024(tmp_path: Path) -> None:
    values, tensors = w.mixtral()
    for i in range(2):
        for part, shape in (("gate", (256, 512)), ("up", (256, 512)), ("down", (512, 256))):
            _, kind = tensors.pop(f"blk.{i}.ffn_{part}_exps.weight")
            tensors |= {f"blk.{i}.ffn_{part}.{e}.weight": (shape, kind) for e in range(4)}
    old = load_model(str(w.write(tmp_path / "old.gguf", values, tensors)))
    new = load_model(str(w.write(tmp_path / "new.gguf", *w.mixtral())))
    assert (old.expert_bytes(1), old.other_bytes, old.expert_ffn) == (new.expert_bytes(1), new.other_bytes, 512)


def test_latent_attention(tmp_path: Path) -> None:
    """DeepSeek-V2 shapes scaled down: 4 heads, key 48 = 32 + 16 rope, value 32, latents of 64 and 96."""
    values, tensors = w.mixtral()
    values = {k.replace("llama.", "deepseek2."): v for k, v in values.items()} | {
        "general.architecture": "deepseek2",
        "deepseek2.attention.kv_lora_rank": 64,
        "deepseek2.attention.q_lora_rank": 96,
        "deepseek2.attention.key_length": 80,
        "deepseek2.attention.value_length": 64,
        "deepseek2.attention.key_length_mla": 48,
        "deepseek2.attention.value_length_mla": 32,
        "deepseek2.rope.dimension_count": 16,
    }
    for i in range(2):
        for part in ("q", "k", "v", "output"):
            del tensors[f"blk.{i}.attn_{part}.weight"]
        tensors |= {
            f"blk.{i}.attn_q_a.weight": ((256, 96), w.Q8_0),
            f"blk.{i}.attn_q_b.weight": ((96, 192), w.Q8_0),
            f"blk.{i}.attn_kv_a_mqa.weight": ((256, 80), w.Q8_0),
            f"blk.{i}.attn_k_b.weight": ((32, 64, 4), w.Q8_0),
            f"blk.{i}.attn_v_b.weight": ((64, 32, 4), w.Q8_0),
            f"blk.{i}.attn_output.weight": ((128, 256), w.Q8_0),
        }
    model = load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))
    assert model.mla is not None
    assert (model.mla.qk_nope, model.mla.qk_rope, model.mla.v_head) == (32, 16, 32)
    assert model.kv_bytes_per_token() == 2 * (64 + 16) * 2
    assert model.extra_params == 256 * 3  # norms alone: the attention formula covers all projections


def test_gpt_oss_window_and_four_bit_experts(tmp_path: Path) -> None:
    values, tensors = w.mixtral(layers=4, kind=w.MXFP4)
    values = {k.replace("llama.", "gpt-oss."): v for k, v in values.items()}
    values |= {"general.architecture": "gpt-oss", "gpt-oss.attention.sliding_window": 128}
    tensors |= {f"blk.{i}.ffn_{m}_exps.bias": ((512, 4), w.F32) for i in range(4) for m in ("gate", "up")}
    model = load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))
    assert (model.sliding_window, model.sliding_layers) == (128, (0, 2))
    assert model.expert_bytes() == 3 * 256 * 512 * 17 // 32 + 2 * 512 * 4
    assert model.kv_bytes(1000) == (2 * 1000 + 2 * 128) * 2 * 2 * 64 * 2


def test_window_pattern_from_the_file(tmp_path: Path) -> None:
    values, tensors = w.mixtral(layers=4)
    values |= {
        "llama.attention.sliding_window": 64,
        "llama.attention.sliding_window_pattern": [True, False, True, True],
    }
    assert load_model(str(w.write(tmp_path / "m.gguf", values, tensors))).sliding_layers == (0, 2, 3)
    values["llama.attention.sliding_window_pattern"] = 2
    assert load_model(str(w.write(tmp_path / "m.gguf", values, tensors))).sliding_layers == (0, 2)


def test_hybrid_layers_hold_no_cache(tmp_path: Path) -> None:
    """As Qwen3-Next: linear attention in layer 0, with a fused attn_qkv of its own."""
    values, tensors = w.mixtral()
    values |= {
        "llama.ssm.conv_kernel": 4,
        "llama.ssm.inner_size": 256,
        "llama.ssm.state_size": 32,
        "llama.ssm.group_count": 2,
    }
    for part in ("q", "k", "v", "output"):
        del tensors[f"blk.0.attn_{part}.weight"]
    tensors |= {"blk.0.attn_qkv.weight": ((256, 384), w.Q8_0), "blk.0.ssm_out.weight": ((256, 256), w.Q8_0)}
    model = load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))
    assert model.kv_layers == (1,)
    assert model.state_bytes == 256 * 32 * 4 + (256 + 2 * 2 * 32) * 4 * 2
    assert model.extra_params == 256 * (384 + 256) + 256 * 3


def test_tied_embeddings_and_ungated_experts(tmp_path: Path) -> None:
    values, tensors = w.mixtral()
    tensors = {k: v for k, v in tensors.items() if k != "output.weight" and "gate_exps" not in k}
    model = load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))
    assert model.tied_embeddings
    assert model.ffn_matrices == 2


def test_split_file(tmp_path: Path) -> None:
    values, tensors = w.mixtral()
    names = list(tensors)
    first = w.write(tmp_path / "m-00001-of-00002.gguf", values | {"split.count": 2}, {n: tensors[n] for n in names[:5]})
    with pytest.raises(ModelError, match=r"part m-00002-of-00002\.gguf is missing"):
        load_model(str(first))
    second = w.write(tmp_path / "m-00002-of-00002.gguf", {"split.count": 2}, {n: tensors[n] for n in names[5:]})
    whole = load_model(str(w.write(tmp_path / "whole.gguf", values, tensors)))
    for part in (first, second):
        model = load_model(str(part))
        assert (model.name, model.total_bytes, model.expert_bytes(1)) == ("m", whole.total_bytes, whole.expert_bytes(1))
    lone = tmp_path / "renamed.gguf"
    lone.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match="one part of a split model"):
        load_model(str(lone))


def test_a_forks_type_is_measured_by_its_place(tmp_path: Path) -> None:
    """ik_llama.cpp's types are not in our table; a tensor's data ends where the next one's starts."""
    values, tensors = w.mixtral(layers=1)
    body = w.header(values, tensors)
    table = body.replace(struct.pack("<3QI", 256, 512, 4, w.Q4_K), struct.pack("<3QI", 256, 512, 4, 139))
    path = tmp_path / "m.gguf"
    path.write_bytes(table)
    aligned = -(-w.size((256, 512, 4), w.Q4_K) // 32) * 32
    assert read_header(path).tensors["blk.0.ffn_gate_exps.weight"].bytes == aligned


def test_tensor_data_is_never_read(tmp_path: Path) -> None:
    """The header alone is enough, so a download can be cut after it; a sparse tail costs nothing either."""
    path = w.write(tmp_path / "m.gguf", *w.mixtral())
    before = load_model(str(path))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    assert load_model(str(path)) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.expert_count": 0}, "moesim simulates MoE models only"),
        ({"llama.expert_count": 8}, "stacks 4 experts, but the header says 8"),
        ({"llama.expert_used_count": 9}, "top_k is 9"),
        ({"llama.block_count": 0}, "layers; must be"),
        ({"llama.block_count": 1 << 30}, "layers; must be"),
        ({"llama.embedding_length": "wide"}, "must be one whole number"),
        ({"llama.attention.head_count_kv": [2, 1]}, "must be one whole number"),
        ({"llama.attention.value_length": 32}, "only equal sizes"),
        ({"llama.attention.key_length": 4096, "llama.attention.value_length": 4096}, "fewer weights than its metadata"),
        ({"general.architecture": ""}, "general.architecture"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, change: dict, message: str) -> None:
    values, tensors = w.mixtral()
    with pytest.raises(ModelError, match=message):
        load_model(str(w.write(tmp_path / "m.gguf", values | change, tensors)))


def test_dense_model(tmp_path: Path) -> None:
    values, tensors = w.mixtral()
    tensors = {k: v for k, v in tensors.items() if "exps" not in k}
    with pytest.raises(ModelError, match="0 layers have expert tensors"):
        load_model(str(w.write(tmp_path / "m.gguf", values, tensors)))


def _claims(tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def _tensor(name: str = "x", dims: int = 1, shape: tuple[int, ...] = (4,), kind: int = 0) -> bytes:
    return w.text(name) + struct.pack(f"<I{len(shape)}QIQ", dims, *shape, kind, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut off"),
        (b"GG", "cut off"),
        (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
        (_claims(tensors=1 << 63), "9223372036854775808 tensors"),
        (_claims(keys=1 << 40), "metadata keys"),
        (_claims(keys=1, rest=struct.pack("<Q", 1 << 62)), "bytes in a text"),
        (_claims(keys=1, rest=struct.pack("<Q", 60000)), "cut off"),
        (_claims(keys=1, rest=w.text("k") + struct.pack("<I", 99)), "unknown type 99"),
        (_claims(keys=1, rest=w.text("k") + struct.pack("<IIQ", 9, 4, 1 << 50)), "items in 'k'"),
        (_claims(keys=1, rest=w.text("k") + struct.pack("<IIQ", 9, 9, 1)), "array 'k' of type 9"),
        (_claims(keys=1, rest=w.text("k") + struct.pack("<IIQ", 9, 10, 1 << 22)), "cut off"),
        (_claims(tensors=1, rest=_tensor(dims=5)), "5 dimensions"),
        (_claims(tensors=1, rest=_tensor(dims=0)), "0 dimensions"),
        (_claims(tensors=1, rest=_tensor(dims=2, shape=(1 << 40, 1 << 40))), "cannot be"),
        (_claims(tensors=1, rest=_tensor(shape=(0,))), "cannot be"),
        (_claims(tensors=2, rest=_tensor() * 2), "listed twice"),
        (_claims(tensors=1, rest=_tensor(shape=(100,), kind=w.Q4_K)), "blocks of 256"),
        (_claims(tensors=1, rest=_tensor(kind=12345)), "unknown type 12345"),
        (_claims(1, 1, w.text("general.alignment") + w.value(0) + _tensor(kind=200)), "alignment 0"),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message):
        load_model(str(path))


def test_an_endless_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """Many long texts: each is within bounds, all together are not; a sparse file makes them free to claim."""
    path = tmp_path / "m.gguf"
    count = MAX_HEADER // (16 << 20) + 1
    with path.open("wb") as file:
        file.write(_claims(keys=1, rest=w.text("k") + struct.pack("<IIQ", 9, 8, count)))
        for _ in range(count):
            file.write(struct.pack("<Q", 16 << 20))
            file.seek(16 << 20, 1)
        file.write(b"end")
    with pytest.raises(ModelError, match="larger than 512 MiB"):
        load_model(str(path))


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    values, tensors = w.mixtral(layers=1)
    data, path = w.header(values, tensors), tmp_path / "m.gguf"
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(ModelError, match="cut off"):
            load_model(str(path))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
@example(changes=[(8667, b"\n")])
def test_damaged_files_give_a_model_or_a_model_error(tmp_path: Path, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(w.header(*w.mixtral(layers=1)))
    for at, new in changes:
        start = at % len(data)
        data[start : start + len(new)] = new[: len(data) - start]
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(data))
    try:
        assert isinstance(load_model(str(path)), Model)
    except ModelError as error:
        assert "\n" not in str(error).replace(str(path), "")
