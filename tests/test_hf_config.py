"""config.json: every alias, every rule for which layers are what, precision, and files that are no MoE."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import ModelError
from moesim.model import Model, load_model
from moesim.model_files.hf_config import MAX_FILE, REFUSED_KEYS, model_from_config, read_config

CONFIGS = Path(__file__).resolve().parents[1] / "../shared/data/model_configs"
needs_configs = pytest.mark.skipif(
    not CONFIGS.is_dir(), reason="published config.json files are not beside the project"
)
CATALOGUE_NAME = {
    "config_16B.json": "deepseek-v2-lite",
    "config_236B.json": "deepseek-v2",
    "config_671B.json": "deepseek-v3",
    "config_v3.1.json": "deepseek-v3.1",
    "deepseek-v2-lite/config.json": "deepseek-v2-lite",
    "dbrx/config.json": "dbrx-base",
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}


def model(**changes: Any) -> Model:
    """MIXTRAL with changes; a key set to None is taken out."""
    values = {k: v for k, v in (MIXTRAL | changes).items() if v is not None}
    return model_from_config(values, "m", "config.json")


@needs_configs
@pytest.mark.parametrize("file", sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.json")))
def test_published_configs_agree_with_the_catalogue(file: str) -> None:
    name = CATALOGUE_NAME.get(file, file.removesuffix("_config.json").replace("--", "/"))
    ours, theirs = read_config(CONFIGS / file), load_model(name)
    for field in fields(Model):
        if field.name not in ("name", "source"):
            value = getattr(theirs, field.name)
            same = pytest.approx(value) if isinstance(value, float) else value
            assert getattr(ours, field.name) == same, field.name


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": None, "num_experts": 8},
        {"num_local_experts": None, "n_routed_experts": 8},
        {"num_local_experts": None, "moe_num_experts": 8},
        {"num_experts": 0},
        {"num_experts_per_tok": None, "moe_top_k": 2},
        {"num_experts_per_tok": None, "moe_k": 2},
        {"num_experts_per_tok": None, "moe_topk": [2] * 8},
        {"num_experts_per_tok": None, "num_experts_per_token": 2},
        {"intermediate_size": 500, "moe_intermediate_size": 96},
        {"intermediate_size": None, "expert_ffn_hidden_size": 96},
        {"intermediate_size": 500, "moe_intermediate_size": [96, 96]},
        {"head_dim": 16},
        {"sliding_window": None, "decoder_sparse_step": 1, "mlp_only_layers": []},
        {"sliding_window": 32, "use_sliding_window": False},
        {"n_shared_experts": 0, "first_k_dense_replace": 0, "moe_layer_freq": 1},
        {"torch_dtype": None, "dtype": "torch.float16"},
    ],
)
def test_aliases(changes: dict[str, Any]) -> None:
    assert model(**changes) == model()


def test_nested_text_model_takes_what_only_the_outer_level_says() -> None:
    inner = {k: v for k, v in MIXTRAL.items() if k != "torch_dtype"}
    outer = {"model_type": "vision", "hidden_size": 9, "torch_dtype": "float32", "vision_config": {"num_experts": 3}}
    nested = model_from_config({**outer, "text_config": inner, "tie_word_embeddings": True}, "m", "config.json")
    assert replace(nested, tied_embeddings=False) == model(torch_dtype="float32")
    assert nested.tied_embeddings
    deeper = model_from_config({"thinker_config": {"text_config": MIXTRAL}}, "m", "config.json")
    assert deeper == model()


def test_dbrx_nests_its_sizes() -> None:
    values = {
        "d_model": 64, "n_layers": 8, "n_heads": 4, "vocab_size": 100, "attn_config": {"kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
    }  # fmt: skip
    assert model_from_config(values, "m", "config.json") == model()


def test_latent_attention() -> None:
    mla = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    ours = model(**mla)
    assert ours.mla is not None
    assert (ours.mla.q_lora, ours.kv_width, ours.head_dim, ours.kv_heads) == (0, 40, 24, 4)
    indexed = model(**{**mla, "q_lora_rank": 48}, index_topk=64, index_n_heads=2, index_head_dim=16)
    assert indexed.kv_width == 40 + 16
    assert indexed.extra_params == 8 * (48 * 2 * 16 + 64 * (16 + 2))


# Which layers have experts, and what stands beside them


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, range(8)),
        ({"first_k_dense_replace": 3}, range(3, 8)),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2, 4, 6)),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 1, 1, 1, 1]}, (1, 2, 4, 5, 6, 7)),
        ({"decoder_sparse_step": 2}, (1, 3, 5, 7)),
        ({"mlp_only_layers": [0, 5]}, (1, 2, 3, 4, 6, 7)),
        ({"interleave_moe_layer_step": 4}, (3, 7)),
        ({"moe_layers": [1, 6], "interleave_moe_layer_step": 4}, (1, 6)),
        ({"moe_layers_enum": "2,3, 5"}, (2, 3, 5)),
        ({"expert_layer_period": 3, "expert_layer_offset": 1}, (1, 4, 7)),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 5, "moe_layer_interval": 1}, (2, 3, 4, 5)),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 2}, (1, 3, 5, 7)),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 6}, range(2, 8)),
        ({"n_dense_layers": 7}, (7,)),
    ],
)
def test_moe_layers(changes: dict[str, Any], layers: Any) -> None:
    ours = model(**changes, moe_intermediate_size=32)
    assert ours.moe_layers == tuple(layers)
    assert ours.dense_ffn == (0 if len(ours.moe_layers) == 8 else 96)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"n_shared_experts": 2}, 2 * 32),
        ({"num_shared_experts": 1, "moe_shared_expert_intermediate_size": 48}, 48),
        ({"shared_expert_intermediate_size": 40}, 40),
        ({"shared_expert_intermediate_size": 0}, 0),
        ({"shared_intermediate_size": 24}, 24),
        ({}, 0),
    ],
)
def test_shared_experts(changes: dict[str, Any], width: int) -> None:
    assert model(**changes, moe_intermediate_size=32).shared_ffn == width


# Windows and layers without a KV cache


@pytest.mark.parametrize(
    ("changes", "window", "layers"),
    [
        ({"sliding_window": 32}, 32, range(8)),
        ({"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 4}, 32, (0, 2, 4, 6)),
        ({"sliding_window": 32, "layer_types": ["full_attention"] * 8}, 0, ()),
        ({"attention_chunk_size": 32}, 32, (0, 1, 2, 4, 5, 6)),
        ({"attention_chunk_size": 32, "no_rope_layers": [1, 0] * 4}, 32, (0, 2, 4, 6)),
        ({"sliding_window": 32, "sliding_window_pattern": 2}, 32, (0, 2, 4, 6)),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 6}, 32, (6, 7)),
    ],
)
def test_windows(changes: dict[str, Any], window: int, layers: Any) -> None:
    ours = model(**changes)
    assert (ours.sliding_window, ours.sliding_layers) == (window, tuple(layers))


LINEAR = {
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
MAMBA1 = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto"}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 32, "mamba_d_conv": 4}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"full_attention_interval": 4, **LINEAR}, (3, 7)),
        ({"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, **LINEAR}, (3, 7)),
        ({"attn_layer_period": 8, "attn_layer_offset": 4, **MAMBA1}, (4,)),
        ({"layer_types": ["mamba"] * 7 + ["attention"], **MAMBA2}, (7,)),
        ({"layer_types": ["conv", "full_attention"] * 4, "conv_L_cache": 3}, (1, 3, 5, 7)),
        ({"attn_type_list": [0] * 7 + [1], "model_type": "MiniMaxText01"}, (7,)),
        ({"linear_attn_config": {"full_attn_layers": [4, 8], "num_heads": 4, "head_dim": 16}}, (3, 7)),
    ],
)
def test_hybrids_cache_in_their_attention_layers_only(changes: dict[str, Any], layers: Any) -> None:
    ours = model(**changes)
    assert ours.kv_layers == tuple(layers)
    assert ours.kv_bytes_per_token() == len(layers) * 2 * 2 * 16 * 2
    assert ours.kv_bytes(0) == ours.state_bytes > 0
    assert ours.extra_params > 0


def test_layers_of_one_block_each() -> None:
    """Nemotron-H: Mamba, experts, attention and plain FFNs take turns; the FFNs are not gated."""
    changes = {**MAMBA2, "hybrid_override_pattern": "MEM*EM-E", "mlp_hidden_act": "relu2", "moe_intermediate_size": 32}
    ours = model(**changes)
    assert (ours.moe_layers, ours.kv_layers, ours.dense_ffn, ours.ffn_matrices) == ((1, 4, 7), (3,), 0, 2)
    without_ffn = model(**{**changes, "hybrid_override_pattern": "MEM*EM*E"})
    assert ours.extra_params == without_ffn.extra_params + 2 * 64 * 96


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("Qwen3NextConfig", {"num_experts": 16, "num_hidden_layers": 8}),
        ("JambaConfig", {"num_experts": 4, "num_hidden_layers": 8}),
        ("GraniteMoeHybridConfig", {"num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"]}),
        ("KimiLinearConfig", {"num_experts": 8}),
        ("MiniMaxConfig", {"num_hidden_layers": 4}),
        ("Lfm2MoeConfig", {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "conv"]}),
        ("DeepseekV32Config", {"n_routed_experts": 8}),
        ("Llama4TextConfig", {"num_hidden_layers": 4, "interleave_moe_layer_step": 2}),
        ("Ernie4_5_MoeConfig", {"moe_num_experts": 8}),
        ("AfmoeConfig", {"num_experts": 8}),
        ("GptOssConfig", {"num_local_experts": 8}),
        ("NemotronHConfig", {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]}),
    ],
)
def test_parameters_agree_with_transformers(kind: str, shapes: dict[str, Any]) -> None:
    """The model class itself, built without memory, against our formulas: norms and biases apart."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    config = getattr(transformers, kind)(**shapes)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    exact = sum(p.numel() for p in built.parameters())
    ours = model_from_config(json.loads(config.to_json_string(use_diff=True)), "m", "config.json")
    assert ours.total_params == pytest.approx(exact, rel=0.001)


# Precision


def bits(**quantization: Any) -> tuple[float, float, float]:
    ours = model(quantization_config=quantization)
    return ours.expert_bits, ours.weight_bits, ours.embedding_bits or 0


def test_unquantised_types() -> None:
    assert (model().expert_bits, model().kv_bits) == (16, 16)
    assert (model(torch_dtype="float32").weight_bits, model(torch_dtype="float32").kv_bits) == (32, 32)
    with pytest.raises(ModelError, match="'int3' are unknown"):
        model(torch_dtype="int3")


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8 + 32 / 128**2),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4 + 20 / 64),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4.5),
    ],
)
def test_methods(quantization: dict[str, Any], expected: float) -> None:
    assert bits(**quantization) == pytest.approx((expected, expected, 16))


def test_mxfp4_converts_experts_only() -> None:
    assert bits(quant_method="mxfp4") == (4.25, 16, 16)


@pytest.mark.parametrize(
    "pattern",
    ["self_attn", "model.layers.*.self_attn", "re:.*self_attn.*", "re:.*(q|k|v|o)_proj", "re:.*\\.(q|k)_proj$"],
)
def test_modules_left_alone(pattern: str) -> None:
    assert bits(quant_method="fp8", modules_to_not_convert=[pattern, "lm_head"]) == (8, 16, 16)


@pytest.mark.parametrize("pattern", ["gate", "lm_head", "model.layers.*.mlp.gate", "re:.*mlp.gate$", "q"])
def test_routers_and_heads_left_alone_leave_the_rest_quantised(pattern: str) -> None:
    assert bits(quant_method="fp8", modules_to_not_convert=[pattern]) == (8, 8, 16)


def test_layers_left_alone_count_by_their_weights() -> None:
    half = [f"model.layers.{i}.self_attn" for i in range(4)]
    assert bits(quant_method="fp8", modules_to_not_convert=half) == (8, 12, 16)
    with pytest.raises(ModelError, match="experts of different precision"):
        bits(quant_method="fp8", modules_to_not_convert=["model.layers.3.block_sparse_moe.experts"])


def test_compressed_tensors() -> None:
    """Kimi-K2-Thinking: 4 bits in groups of 32 for experts, everything else left alone."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    ignore = ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"]
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ignore}
    assert bits(**config) == (4.5, 16, 16)
    weights["symmetric"] = False
    assert bits(**config)[0] == 4 + 20 / 32
    weights |= {"num_bits": 4, "type": "float", "group_size": 16}
    assert bits(**config)[0] == 4.5
    weights |= {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]}
    assert bits(**config)[0] == 8 + 32 / 128**2
    with pytest.raises(ModelError, match="config_groups"):
        bits(quant_method="compressed-tensors")


def test_groups_with_their_own_targets() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        return {"targets": list(targets), "weights": {"num_bits": bits, "type": "int", "strategy": "channel"}}

    groups = {"a": group(4, "re:.*experts.*"), "b": group(8, "Linear")}
    assert bits(quant_method="compressed-tensors", config_groups=groups) == (4, 8, 16)


def test_quant_config_in_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    quantization = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["*self_attn*", "lm_head"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    ours = load_model(str(tmp_path))
    assert (ours.expert_bits, ours.weight_bits, ours.kv_bits) == (4.5, 16, 8)


def test_deepseeks_own_configs_are_fp8() -> None:
    assert model(torch_dtype=None, dtype="fp8").expert_bits == 8 + 32 / 128**2


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "exl3"}, "method 'exl3' is unknown"),
        ({}, "method '' is unknown"),
        ({"quant_method": "gptq"}, "needs bits"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size is 0"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*experts.*": {"bits": 8}}}, "precision per module"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "two sizes"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "'MIXED_PRECISION' is unknown"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "list of names"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["re:(a+)+$"]}, "too complicated"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["re:" + "(a|b)" * 30]}, "alternatives"),
    ],
)
def test_quantisation_that_cannot_be_read(quantization: dict[str, Any], message: str) -> None:
    quantization = {"note": "", **quantization}
    with pytest.raises(ModelError, match=message):
        model(quantization_config=quantization)


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": None, "num_experts_per_tok": None}, "a dense model"),
        ({"num_local_experts": 1}, "a dense model"),
        ({"num_local_experts": None}, r"looks like an MoE \(num_experts_per_tok\)"),
        ({"num_local_experts": None, "moe_config": {"n": 8}}, "looks like an MoE"),
        ({"num_experts_per_tok": None}, "needs num_experts_per_tok or"),
        ({"num_experts_per_tok": 9}, "top_k is 9"),
        ({"num_local_experts": "8"}, "num_local_experts is '8'"),
        ({"num_local_experts": -8}, "num_local_experts is -8"),
        ({"num_local_experts": True}, "num_local_experts is True"),
        ({"num_experts": 16}, r"num_experts, num_local_experts contradict each other: \[16, 8\]"),
        ({"hidden_size": None}, "needs hidden_size"),
        ({"hidden_size": 66}, "needs head_dim, as 4 heads"),
        ({"hidden_size": 0}, "hidden_size .* is 0"),
        ({"hidden_size": 1 << 60}, "hidden_size is"),
        ({"num_hidden_layers": 10**9}, "must be 1 to 10000"),
        ({"num_attention_heads": 0}, "must be at least 1"),
        ({"vocab_size": None}, "needs vocab_size"),
        ({"moe_intermediate_size": [32, 64]}, r"moe_intermediate_size is \[32, 64\]"),
        ({"mlp_layer_types": ["sparse"] * 3}, "must list all 8 layers"),
        ({"mlp_layer_types": ["sparse"] * 7 + ["odd"]}, "mlp_layer_types has 'odd'"),
        ({"first_k_dense_replace": 8}, "no layer has routed experts"),
        ({"decoder_sparse_step": 0}, "must be at least 1"),
        ({"layer_types": ["telepathy"] * 8}, "kind 'telepathy' are unknown"),
        ({"layer_types": ["mamba"] * 8}, "hold no KV cache, but their kind is unknown"),
        ({"layer_types": ["sliding_attention"] * 8}, "sliding_window is missing"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"zero_expert_num": 4}, "experts that compute nothing"),
        ({"model_type": "jetmoe"}, "routed too"),
        ({"v_head_dim": 8}, "v_head_dim 8 differs"),
        ({"moe_layers_enum": "1,x"}, "moe_layers_enum"),
        ({"mlp_only_layers": ["a"]}, "list of layer numbers"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model(**changes)


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_what_would_be_read_almost_right_is_refused(key: str) -> None:
    with pytest.raises(ModelError, match=f"{REFUSED_KEYS[key]} \\({key}\\)"):
        model(**{key: 4})
    assert model(**{key: 0}) == model()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ("{", "not a JSON file"),
        ("[" * 100_000, "not a JSON file"),
        ('{"text_config":' * 900 + "{}" + "}" * 900, "a dense model"),
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("{}", "a dense model"),
        ('{"num_experts": 1e400}', "num_experts is inf"),
        ('{"num_experts": NaN}', "num_experts is nan"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=message):
        read_config(path)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_FILE + 1)
    with pytest.raises(ModelError, match="larger than 16 MiB"):
        read_config(path)


def test_binary_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ModelError, match="not a JSON file"):
        read_config(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)
KEYS = sorted(
    {*MIXTRAL, *LINEAR, *MAMBA1, *MAMBA2, "layer_types", "mlp_layer_types", "kv_lora_rank", "qk_nope_head_dim"}
    | {"v_head_dim", "qk_rope_head_dim", "q_lora_rank", "sliding_window", "quantization_config", "text_config"}
    | {"attn_layer_period", "moe_layer_freq", "moe_layers", "full_attention_interval", "attention_chunk_size"}
    | {"n_shared_experts", "hybrid_override_pattern", "linear_attn_config", "index_topk", "moe_layers_enum"}
)
METHODS = st.sampled_from(["fp8", "gptq", "awq", "mxfp4", "modelopt", "compressed-tensors", "bitsandbytes"])
QUANT_KEYS = ["bits", "group_size", "weight_block_size", "modules_to_not_convert", "ignore", "config_groups", "dynamic"]
QUANTIZATION = st.dictionaries(st.sampled_from(QUANT_KEYS), JSON, max_size=4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), quant=QUANTIZATION, method=METHODS)
def test_any_config_gives_a_model_or_a_model_error(changes: dict[str, Any], quant: dict, method: str) -> None:
    values = {**MIXTRAL, "quantization_config": {"quant_method": method, **quant}, **changes}
    try:
        assert isinstance(model_from_config(values, "m", "config.json"), Model)
    except ModelError as error:
        assert str(error)
