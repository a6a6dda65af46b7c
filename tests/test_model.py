"""The catalogue against what publishers say, and the arithmetic of a model."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.commands.model import app
from moesim.errors import ModelError
from moesim.model import DATA, MLA, Model, TensorBytes, catalogue, load_model
from moesim.model_report import describe, format_model, layer_list
from tests import gguf_writer

SMALL = Model(
    name="small", layers=4, moe_layers=(1, 2, 3), hidden=64, experts=8, top_k=2, expert_ffn=32, shared_ffn=16,
    dense_ffn=128, heads=4, kv_heads=2, head_dim=16, vocab=100,
)  # fmt: skip

# Parameters that transformers 5.23 counts for the same shapes (meta device, text model), norms and biases included.
EXACT = {
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "Mixtral-8x22B-v0.1": 140_620_634_112,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "DeepSeek-V3": 671_026_404_352,
    "Qwen1.5-MoE-A2.7B": 14_315_784_192,
    "Qwen2-57B-A14B": 57_408_658_944,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-Coder-480B-A35B-Instruct": 480_154_875_392,
    "Qwen3-Next-80B-A3B-Instruct": 79_674_391_296,
    "Qwen3.5-35B-A3B": 34_660_610_688,
    "Qwen3.5-122B-A10B": 122_111_526_912,
    "Qwen3.5-397B-A17B": 396_346_350_336,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "Phi-3.5-MoE-instruct": 41_872_793_600,
    "dbrx-base": 131_596_523_520,
    "Jamba-v0.1": 51_570_323_328,
    "AI21-Jamba-1.5-Large": 398_555_145_696,
    "Llama-4-Scout-17B-16E": 107_769_861_120,
    "Llama-4-Maverick-17B-128E": 400_711_848_960,
    "GLM-4.5": 352_796_472_320,
    "GLM-4.5-Air": 106_851_586_048,
    "MiniMax-M2.5": 228_689_748_992,
    "switch-base-8": 619_339_008,
    "switch-base-256": 14_664_154_368,
}
with (DATA / "models.csv").open(newline="", encoding="utf-8") as _file:
    PUBLISHED = {row["name"]: row for row in csv.DictReader(_file)}
UNIT = {"M": 10**6, "B": 10**9, "T": 10**12}


def _number(text: str) -> tuple[float, float]:
    """A printed count such as 46.7B, and half a unit of its last digit."""
    digits, unit = text[:-1], UNIT[text[-1]]
    return float(digits) * unit, 0.5 * unit / 10 ** len(digits.partition(".")[2])


@pytest.mark.parametrize("name", [n for n, row in PUBLISHED.items() if row["published_total"]])
def test_total_is_within_one_percent_of_what_is_published(name: str) -> None:
    stated, rounding = _number(PUBLISHED[name]["published_total"])
    ours = load_model(name).total_params + int(PUBLISHED[name]["published_uncounted"] or 0)
    assert abs(ours - stated) <= max(0.01 * stated, rounding)


@pytest.mark.parametrize("name", [n for n, row in PUBLISHED.items() if row["published_active"]])
def test_active_parameters_match_a_convention_of_publishers(name: str) -> None:
    """They count both tables (Mistral, Qwen), the output head alone (OpenAI, DeepSeek), or neither (GLM, MiniMax),
    and round (37B for 36.6) or cut (3.3B for 3.35)."""
    model = load_model(name)
    stated, rounding = _number(PUBLISHED[name]["published_active"])
    table = model.vocab * model.hidden
    ours = (model.active_params + table, model.active_params, model.active_params - table)
    assert any(-rounding <= count - stated < 2 * rounding for count in ours)


@pytest.mark.parametrize("name", EXACT)
def test_total_agrees_with_transformers(name: str) -> None:
    """Only norms, biases and such vectors are left out."""
    left_out = EXACT[name] - load_model(name).total_params
    assert 0 <= left_out < 0.0004 * EXACT[name]


@pytest.mark.parametrize(
    ("name", "gib"), [("gpt-oss-20b", 12.8), ("gpt-oss-120b", 60.8)]
)  # model card, arXiv 2508.10925, table 1
def test_quantised_checkpoints_have_their_published_size(name: str, gib: float) -> None:
    assert load_model(name).total_bytes / 2**30 == pytest.approx(gib, rel=0.003)


@pytest.mark.parametrize(("experts", "gib"), [(8, 2.298), (64, 14.112), (128, 27.614), (256, 54.62)])
def test_switch_sizes_of_the_sida_paper(experts: int, gib: float) -> None:
    """arXiv 2310.18859, table 2: independent evidence for experts 3072 wide, stored in 32 bits."""
    assert load_model(f"switch-base-{experts}").total_bytes / 2**30 == pytest.approx(gib, rel=0.005)


@pytest.mark.parametrize(
    ("name", "per_token"),
    [("deepseek-v3", 70_272), ("qwen3-30b-a3b", 98_304), ("mixtral-8x7b", 131_072), ("qwen3.5-397b-a17b", 30_720)],
)
def test_kv_bytes_per_token(name: str, per_token: int) -> None:
    """DeepSeek-V3: 61 layers x (512 + 64) x 2 bytes, the 70 KB its paper gives (arXiv 2505.09343, table 1)."""
    assert load_model(name).kv_bytes_per_token() == per_token


@pytest.mark.parametrize("name", catalogue())
def test_every_entry_adds_up_and_says_where_it_is_from(name: str) -> None:
    model = load_model(name)
    result = describe(model)
    parts = {k: v for k, v in result["params"].items() if k not in ("total", "active", "one_expert")}
    assert sum(parts.values()) == model.total_params
    assert result["bytes"]["all_experts"] + result["bytes"]["other"] == model.total_bytes
    assert model.active_params < model.total_params
    assert model.source
    assert model.name in format_model(model)
    json.dumps(result, allow_nan=False)


def test_the_catalogue_holds_no_two_names_for_one_spelling() -> None:
    names = [name.lower() for name in catalogue()]
    assert len(set(names)) == len(names) >= 25


def test_deepseek_is_stored_in_blocks_of_fp8() -> None:
    model = load_model("deepseek-v3")
    scales = model.expert_params // (128 * 128) * 4
    assert model.expert_bytes() == model.expert_params + scales
    assert model.embedding_bits == 16


# Names and files


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("openai/gpt-oss-20b", "openai/gpt-oss-20b"),
        ("GPT-OSS-20B", "openai/gpt-oss-20b"),
        ("mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x7B-v0.1"),
        ("deepseek-v3", "deepseek-ai/DeepSeek-V3"),
        ("deepseek-v2", "deepseek-ai/DeepSeek-V2"),
        ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B"),
        ("switch-base-8", "google/switch-base-8"),
        ("dbrx", "databricks/dbrx-base"),
        (" olmoe ", "allenai/OLMoE-1B-7B-0924"),
    ],
)
def test_names(spec: str, name: str) -> None:
    assert load_model(spec).name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gpt-oss-21b", "unknown model 'gpt-oss-21b'.*; did you mean 'gpt-oss-20b'"),
        ("gpt-oss-2", "unknown model"),
        ("mixtral", r"may be mistralai/Mixtral-8x22B-v0.1, mistralai/Mixtral-8x7B-v0.1; write more"),
        ("", "unknown model ''"),
        ("no/such/path", "unknown model 'no/such/path': no catalogue name, no config.json"),
        ("missing.json", "cannot be read"),
        ("missing.gguf", "cannot be read"),
        ("nul\0.gguf", "cannot be read"),
        ("~nobody", "unknown model"),
    ],
)
def test_unknown_names(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=message):
        load_model(spec)


def test_directories(tmp_path: Path) -> None:
    home = tmp_path / "my-model"
    home.mkdir()
    with pytest.raises(ModelError, match=r"without a config\.json"):
        load_model(str(home))
    shipped = DATA / "tiny-moe-8x16.json"
    (home / "config.json").write_text(shipped.read_text())
    model = load_model(str(home))
    assert model.name == "my-model"
    assert replace(model, name="", source="") == replace(load_model("tiny-moe-8x16"), name="", source="")


# Arithmetic

models = st.builds(
    lambda layers, window, windowed, cached, bits: replace(
        SMALL,
        layers=layers,
        moe_layers=(0,),
        sliding_window=window,
        sliding_layers=tuple(range(min(windowed, layers))),
        attention_layers=tuple(range(min(cached, layers))),
        kv_bits=bits,
        state_bytes=128,
    ),
    st.integers(1, 12),
    st.integers(1, 50),
    st.integers(1, 12),
    st.integers(0, 12),
    st.sampled_from([16, 8, 4.5]),
)


@given(model=models, context=st.integers(0, 100))
def test_kv_cache_grows_by_what_a_token_adds(model: Model, context: int) -> None:
    """One byte of slack: each size is rounded up by itself."""
    grown = model.kv_bytes(context + 1) - model.kv_bytes(context)
    assert abs(grown - model.kv_bytes_per_token(context)) <= 1
    assert grown <= model.kv_bytes_per_token() + 1
    assert model.kv_bytes(0) == model.state_bytes


@given(model=models, context=st.integers(0, 100))
def test_kv_cache_by_counting_tokens_layer_by_layer(model: Model, context: int) -> None:
    kept = [min(context, model.sliding_window) if i in model.sliding_layers else context for i in model.kv_layers]
    bits = sum(kept) * 2 * model.kv_heads * model.head_dim * model.kv_bits
    assert model.kv_bytes(context) == pytest.approx(bits / 8 + model.state_bytes, abs=1)


def test_small_model_by_hand() -> None:
    expert, shared, dense, router = 3 * 64 * 32, 3 * 64 * 16, 3 * 64 * 128, 64 * 8
    attention, table = 64 * 64 + 2 * 64 * 32 + 64 * 64, 100 * 64
    assert SMALL.expert_params == expert
    assert (SMALL.shared_params, SMALL.dense_params, SMALL.router_params) == (shared, dense, router)
    assert SMALL.attention_params(0) == attention
    assert SMALL.embedding_params == 2 * table
    other = 2 * table + 4 * attention + dense + 3 * (shared + router)
    assert SMALL.total_params == other + 3 * 8 * expert
    assert SMALL.active_params == other - table + 3 * 2 * expert
    assert SMALL.expert_bytes() == 2 * expert
    assert SMALL.expert_bytes(bits=4.25) == expert * 4.25 / 8
    assert SMALL.other_bytes == 2 * other
    assert SMALL.kv_bytes_per_token() == 4 * 2 * 2 * 16 * 2
    assert SMALL.expert_flops(5) == 10 * expert
    assert SMALL.flops_per_token(0) == 2 * SMALL.active_params
    assert SMALL.flops_per_token(10) - SMALL.flops_per_token(0) == 4 * 10 * 4 * (4 * 16)


def test_latent_attention_by_hand() -> None:
    model = replace(SMALL, mla=MLA(q_lora=24, kv_lora=40, qk_nope=16, qk_rope=8, v_head=12))
    query, latent, out = 64 * 24 + 24 * 4 * 24, 64 * 48 + 40 * 4 * 28, 4 * 12 * 64
    assert model.attention_params(1) == query + latent + out
    assert replace(model, mla=replace(model.mla, q_lora=0)).attention_params(1) == 64 * 4 * 24 + latent + out
    assert model.kv_width == 48
    absorbed = 2 * 4 * (2 * 40 + 8)  # scores over latent and rope key, sums over the latent, for 4 heads
    assert model.flops_per_token(10) - model.flops_per_token(0) == 4 * 10 * absorbed
    assert replace(model, kv_extra=16).kv_width == 64


def test_layers_without_a_cache_have_their_weights_elsewhere() -> None:
    model = replace(SMALL, attention_layers=(3,), extra_params=1000)
    assert (model.attention_params(0), model.attention_params(3)) == (0, SMALL.attention_params(3))
    assert model.other_params == SMALL.other_params - 3 * SMALL.attention_params(0) + 1000


def test_embeddings_keep_their_own_precision() -> None:
    model = replace(SMALL, weight_bits=4, embedding_bits=16)
    kept = SMALL.embedding_params + 3 * SMALL.router_params
    assert model.other_bytes == 2 * kept + (SMALL.other_params - kept) / 2


def test_with_precision() -> None:
    assert SMALL.with_precision(expert_bits=4.25).expert_bytes() == SMALL.expert_params * 4.25 / 8
    assert SMALL.with_precision(weight_bits=8).other_bytes == SMALL.other_bytes / 2
    assert SMALL.with_precision(kv_bits=8).kv_bytes(100) == SMALL.kv_bytes(100) / 2
    assert SMALL.with_precision() == SMALL
    with pytest.raises(ModelError, match="expert_bits is 0"):
        SMALL.with_precision(expert_bits=0)


def test_real_sizes_go_before_bits() -> None:
    real = replace(SMALL, tensor_bytes=TensorBytes((10, 20, 30), 7))
    assert [real.expert_bytes(i) for i in range(3)] == [10, 20, 30]
    assert (real.total_expert_bytes, real.other_bytes) == (8 * 60, 7)
    assert real.expert_bytes(2, bits=16) == SMALL.expert_bytes()
    assert real.with_precision(kv_bits=8).tensor_bytes == real.tensor_bytes
    assert real.with_precision(expert_bits=16).total_expert_bytes == SMALL.total_expert_bytes
    assert real.with_precision(weight_bits=16).other_bytes == SMALL.other_bytes
    assert real.with_precision(weight_bits=16).expert_bytes(1) == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"layers": True}, "layers is True"),
        ({"hidden": -1}, "hidden is -1"),
        ({"hidden": 2.5}, "hidden is 2.5"),
        ({"experts": 1}, "experts is 1"),
        ({"top_k": 9}, "top_k is 9, but must be a whole number from 1 to 8"),
        ({"top_k": 0}, "top_k is 0"),
        ({"vocab": 0}, "vocab is 0"),
        ({"moe_layers": ()}, "no layer has routed experts"),
        ({"moe_layers": (1, 4)}, "layer numbers from 0 to 3"),
        ({"moe_layers": (2, 1)}, "ascending"),
        ({"moe_layers": (1, 1)}, "each once"),
        ({"attention_layers": (7,)}, "attention_layers"),
        ({"sliding_layers": (1,)}, "sliding window needs"),
        ({"sliding_window": 128}, "sliding window needs"),
        ({"kv_heads": 3}, "do not share 3 KV heads"),
        ({"kv_bits": float("nan")}, "kv_bits is nan"),
        ({"weight_bits": 65}, "weight_bits is 65"),
        ({"ffn_matrices": 4}, "ffn_matrices is 4"),
        ({"extra_params": -1}, "extra_params is -1"),
        ({"mla": MLA(0, 0, 16, 8, 16)}, "mla.kv_lora is 0"),
        ({"tensor_bytes": TensorBytes((1,), 1)}, "tensor_bytes"),
        ({"tensor_bytes": TensorBytes((1, 0, 1), 1)}, "tensor_bytes"),
    ],
)
def test_impossible_models_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        replace(SMALL, **change)


def test_negative_context() -> None:
    with pytest.raises(ModelError, match="context -1"):
        SMALL.kv_bytes(-1)


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), "none"), ((3,), "3"), ((0, 1, 2), "0-2"), ((1, 3, 5), "1-5 every 2"), ((0, 1, 5, 9), "0, 1, 5, 9")],
)
def test_layer_lists(layers: tuple[int, ...], text: str) -> None:
    assert layer_list(layers) == text


def test_the_page_on_models_shows_what_is_printed(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "bring-a-model.md").read_text(encoding="utf-8")
    file = gguf_writer.write(tmp_path / "Qwen3-30B-A3B-Q4_K_M.gguf", *gguf_writer.qwen3_30b_q4_k_m())
    assert format_model(replace(load_model(str(file)), source=file.name)) in page
    shapes = replace(load_model("gpt-oss-120b"), name="gpt-oss-120b", source="gpt-oss-120b/config.json")
    assert format_model(shapes) in page
    listed = CliRunner().invoke(app, ["list"]).stdout.splitlines()[:4]
    assert "\n".join(listed) in page


# The command line


def test_info_and_list(tmp_path: Path) -> None:
    run = CliRunner()
    page = run.invoke(app, ["info", "gpt-oss-20b"])
    assert page.exit_code == 0
    assert "20.91 B" in page.stdout
    assert "12.6 MiB" in page.stdout
    result = json.loads(run.invoke(app, ["info", "gpt-oss-20b", "--json"]).stdout)
    assert result["bytes"]["expert"]["min"] == 24_883_200 * 4.25 / 8
    file = tmp_path / "out.json"
    assert run.invoke(app, ["info", "gpt-oss-20b", "--json", "-o", str(file)]).stdout == ""
    assert json.loads(file.read_text()) == result
    rows = json.loads(run.invoke(app, ["list", "--json"]).stdout)["models"]
    assert [row["name"] for row in rows] == catalogue()
    assert len(run.invoke(app, ["list"]).stdout.splitlines()) == len(rows) + 1


def test_importing_models_loads_nothing_heavy() -> None:
    code = (
        "import sys, moesim.model, moesim.commands.model; moesim.model.load_model('deepseek-v3');"
        "print([m for m in ('torch', 'plotly', 'streamlit', 'pandas', 'numba', 'transformers', 'scipy.stats') "
        "if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
