"""Tables of others: every column's meaning on hand-made files, corrupted twins, and the public tables where present."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from moesim.cli import app
from moesim.costs.fitted import Fitted
from moesim.costs.roofline import Roofline
from moesim.errors import CalibrationError
from moesim.machine import load_machine
from moesim.profile_import import FORMATS, aiconfigurator, freetoken, import_profile, llmservingsim, vidur
from moesim.profile_import.power_law import busiest

DATA = Path(__file__).parents[1] / "../shared/data"
BASE = {"framework": "VLLM", "version": "0.24.0", "device": "NVIDIA X", "kernel_source": "k"}


def table(path: Path, **columns: object) -> Path:
    """A Parquet table; scalars are repeated."""
    count = max((len(v) for v in columns.values() if isinstance(v, list)), default=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    full = {**BASE, **columns}
    pq.write_table(pa.table({k: v if isinstance(v, list) else [v] * count for k, v in full.items()}), path)
    return path


def moe(path: Path, **columns: object) -> Path:
    same = {
        "op_name": "moe", "moe_dtype": "bfloat16", "hidden_size": 1024, "inter_size": 512, "topk": 2, "num_experts": 8,
        "moe_tp_size": 2, "moe_ep_size": 1, "distribution": "balanced", "latency": 0.5,
    }  # fmt: skip
    return table(path, **same, **{"num_tokens": 1} | columns) if not columns else table(path, **(same | columns))


def rows_of(path: Path) -> list[dict]:
    return [row for rows in aiconfigurator.read(path).rows for row in rows]


# AIConfigurator


def test_dense_rows(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", op_name="gemm", gemm_dtype="fp8_block", m=[1, 2], n=64, k=128, latency=[0.5, 1.0])
    first, second = rows_of(tmp_path)
    assert first == {
        "family": "gemm", "m": 1, "n": 64, "k": 128, "dtype": "fp8_block", "kernel": "vllm k", "seconds": 0.0005,
    }  # fmt: skip
    assert second["seconds"] == 0.001


@pytest.mark.parametrize("tokens,devices,active,pairs", [(1, 1, 2, 2), (16, 1, 8, 32), (16, 4, 2, 8), (1, 8, 1, 1)])
def test_balanced_experts(tmp_path: Path, tokens: int, devices: int, active: int, pairs: int) -> None:
    moe(tmp_path / "a.parquet", num_tokens=tokens, moe_ep_size=devices)
    (row,) = rows_of(tmp_path)
    assert (row["active"], row["pairs"], row["routed"]) == (active, pairs, 2 * tokens)
    assert (row["ffn"], row["matrices"], row["dtype"]) == (256, 3, "bf16")


def test_skewed_experts_activate_fewer_and_load_the_busiest_more(tmp_path: Path) -> None:
    moe(tmp_path / "a.parquet", num_tokens=[4, 64, 64], distribution="power_law_1.2", moe_ep_size=[1, 1, 4])
    one, many, split = rows_of(tmp_path)
    assert 1 <= one["active"] < 8 and one["pairs"] == 8
    assert many["pairs"] == 128 and many["active"] <= 8
    assert 128 / 4 < split["pairs"] < 128 and split["active"] <= 2


@pytest.mark.parametrize(
    "tokens,experts,top_k,devices", [(1, 256, 8, 1), (1, 256, 8, 8), (3, 64, 4, 2), (5000, 16, 1, 4)]
)
def test_busiest_device_is_within_its_bounds(tokens: int, experts: int, top_k: int, devices: int) -> None:
    active, pairs = busiest(tokens, experts, top_k, devices, 1.2)
    assert 1 <= active <= min(experts // devices, tokens * top_k)
    assert tokens * top_k / devices <= pairs + 1e-9 <= tokens * top_k + 1e-9
    assert busiest(tokens, experts, top_k, devices, 1.2) == (active, pairs)


def test_attention_rows(tmp_path: Path) -> None:
    same = {"batch_size": 2, "num_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "attn_dtype": "fp8",
            "kv_cache_dtype": "fp8", "latency": 1.0}  # fmt: skip
    table(tmp_path / "context.parquet", op_name="context_attention", isl=128, step=16, **same)
    table(tmp_path / "generation.parquet", op_name="generation_attention", isl=1, step=99, window_size=32, **same)
    prefill, decode = rows_of(tmp_path)
    assert (prefill["family"], prefill["tokens"], prefill["past"], prefill["window"]) == (
        "attention_prefill",
        128,
        16,
        0,
    )
    assert (decode["family"], decode["context"], decode["window"]) == ("attention_decode", 100, 32)
    assert prefill["kernel"] == "vllm k fp8 math" and prefill["dtype"] == "fp8"


def test_collectives_count_bytes_and_deepep_microseconds(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", op_name="alltoall", nccl_dtype="half", num_gpus=8, message_size=512, latency=1.0)
    table(
        tmp_path / "b.parquet", op_name="ll", node_num=1, hidden_size=100, num_token=3, num_topk=2, num_experts=8,
        combine_avg_t_us=20.0, dispatch_avg_t_us=10.0,
    )  # fmt: skip
    nccl, dispatch, combine = rows_of(tmp_path)
    assert (nccl["what"], nccl["nbytes"], nccl["devices"], nccl["seconds"]) == ("all_to_all", 1024, 8, 1e-3)
    assert (dispatch["nbytes"], dispatch["seconds"]) == (600, pytest.approx(1e-5))
    assert (combine["nbytes"], combine["seconds"]) == (1200, pytest.approx(2e-5))


def test_the_newest_version_of_a_framework_is_taken(tmp_path: Path) -> None:
    for version, latency in (("0.9.1", 1.0), ("0.24.0", 2.0), ("0.3.0", 3.0)):
        path = tmp_path / version / "gemm_perf.parquet"
        table(path, op_name="gemm", gemm_dtype="bfloat16", m=1, n=1, k=1, latency=latency, version=version)
    found = aiconfigurator.read(tmp_path)
    assert [row["seconds"] for rows in found.rows for row in rows] == [0.002]
    assert found.engine == "vllm 0.24.0" and any("newest" in note for note in found.notes)


def test_unknown_tables_and_formats_are_told(tmp_path: Path) -> None:
    table(tmp_path / "gemm" / "x.parquet", op_name="gemm", gemm_dtype=["bfloat16", "int3"], m=1, n=1, k=1, latency=1.0)
    table(tmp_path / "y.parquet", something=1)
    found = aiconfigurator.read(tmp_path)
    assert len([row for rows in found.rows for row in rows]) == 1
    assert any("y.parquet: not used" in note for note in found.notes)
    assert any("1 rows of number formats" in note for note in found.notes)


@pytest.mark.parametrize(
    "change,said",
    [
        ({"latency": -1.0}, "row 0: latency"),
        ({"latency": float("nan")}, "row 0: latency"),
        ({"m": "one"}, None),
        ({"latency": "soon"}, "row 0"),
    ],
)
def test_bad_values_name_file_and_row(tmp_path: Path, change: dict, said: str | None) -> None:
    good = {"op_name": "gemm", "gemm_dtype": "bfloat16", "m": 1, "n": 1, "k": 1, "latency": 1.0}
    table(tmp_path / "a.parquet", **(good | change))
    with pytest.raises((CalibrationError, TypeError)) as caught:
        import_profile("aiconfigurator", tmp_path, "x", None)
    if said:
        assert said in str(caught.value) and "a.parquet" in str(caught.value)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not exist"):
        import_profile("aiconfigurator", tmp_path / "none", "x", None)
    with pytest.raises(CalibrationError, match=r"holds no \*.parquet"):
        import_profile("aiconfigurator", tmp_path, "x", None)
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(CalibrationError, match="not a Parquet file"):
        import_profile("aiconfigurator", tmp_path, "x", None)
    with pytest.raises(CalibrationError, match="did you mean 'vidur'"):
        import_profile("vidurr", tmp_path, "x", None)


def test_two_devices_are_not_one_machine(tmp_path: Path) -> None:
    for name in ("A", "B"):
        table(
            tmp_path / f"{name}.parquet", op_name="gemm", gemm_dtype="bfloat16", m=1, n=1, k=1, latency=1.0, device=name
        )
    with pytest.raises(CalibrationError, match="several devices"):
        aiconfigurator.read(tmp_path)


# The other formats


def bundle(folder: Path) -> Path:
    meta = "gpu: G\nvllm_version: 0.19.0\nmodel: Qwen/Qwen3-30B-A3B-Instruct-2507\nvariant: bf16\n"
    (folder / "tp2").mkdir(parents=True)
    (folder / "meta.yaml").write_text(meta)
    (folder / "tp2" / "moe.csv").write_text("tokens,activated_experts,time_us\n2,16,50\n4,20,60\n8,30,70\n")
    (folder / "tp2" / "attention.csv").write_text(
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n16,8,0,0,5\n0,0,4,100,7\n16,0,4,100,9\n"
    )
    (folder / "tp2" / "dense.csv").write_text("layer,tokens,time_us\nqkv_proj,3,4\nlayernorm,3,1\n")
    return folder


def test_llmservingsim(tmp_path: Path) -> None:
    found = llmservingsim.read(bundle(tmp_path))
    (rows,) = found.rows
    kinds = [row["family"] for row in rows]
    assert kinds == ["attention_prefill", "attention_decode", "grouped", "grouped", "grouped", "gemm"]
    prefill, decode, experts, dense = rows[0], rows[1], rows[2], rows[5]
    assert (prefill["tokens"], prefill["past"], prefill["heads"], prefill["kv_heads"]) == (16, 8, 16, 2)
    assert (decode["batch"], decode["context"], decode["seconds"]) == (4, 100, pytest.approx(7e-6))
    assert (experts["pairs"], experts["active"], experts["ffn"], experts["hidden"]) == (16, 16, 384, 2048)
    assert (dense["m"], dense["n"], dense["k"]) == (3, (32 + 2 * 4) * 128 // 2, 2048)


def test_llmservingsim_mistakes(tmp_path: Path) -> None:
    folder = bundle(tmp_path / "b")
    (folder / "tp2" / "moe.csv").write_text("tokens,time_us\n1,2\n")
    with pytest.raises(CalibrationError, match="lacks the column activated_experts"):
        list(llmservingsim.read(folder).rows)
    (folder / "tp2" / "moe.csv").write_text("tokens,activated_experts,time_us\n1,2,fast\n")
    with pytest.raises(CalibrationError, match=r"row 0: time_us 'fast' is not a number"):
        list(llmservingsim.read(folder).rows)
    (folder / "meta.yaml").write_text("gpu: G\n")
    with pytest.raises(CalibrationError, match="not a bundle's"):
        llmservingsim.read(folder)


def test_vidur(tmp_path: Path) -> None:
    dense = tmp_path / "compute" / "a100" / "m" / "mlp.csv"
    dense.parent.mkdir(parents=True)
    names = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    head = [f"time_stats.{name}.median" for name in names]
    head += ["n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "num_tokens"]
    dense.write_text(",".join([*head, "num_tensor_parallel_workers"]) + "\n1,2,3,4,8,2,1024,4096,True,16,2\n")
    link = tmp_path / "network" / "a100_dgx" / "send_recv.csv"
    link.parent.mkdir(parents=True)
    link.write_text("time_stats.send_recv.median,num_workers,size,devices_per_node\n0.02,2,2048,1\n")
    found = vidur.read(tmp_path)
    products, exchanges = found.rows
    assert found.gpu == "a100"
    assert [(r["n"], r["k"], r["seconds"]) for r in products] == [
        (768, 1024, 1e-3), (1024, 512, 2e-3), (4096, 1024, 3e-3), (1024, 2048, 4e-3),
    ]  # fmt: skip
    assert exchanges[0] == {
        "family": "collective", "what": "send_recv", "nbytes": 2048, "devices": 2, "kernel": "a100_dgx, 1 per node",
        "seconds": 2e-5,
    }  # fmt: skip


def test_freetoken(tmp_path: Path) -> None:
    data = {
        "version": 4, "gpu": "RTX X",
        "ceilings": {"cpu_stream_read_gbs": 80, "pcie_linear_h2d_gbs": 25.0, "pcie_linear_d2h_gbs": 20.0},
        "dtypes": {"q4": {"expert_bytes": 4_000_000, "cpu_moe_gbs": 60, "recommended": "cpu"}},
    }  # fmt: skip
    path = tmp_path / "benchbw.json"
    path.write_text(json.dumps(data))
    found = import_profile("freetoken", tmp_path, "x", None)
    assert found.meta["gpu"] == "RTX X"
    down = {curve.variant[0]: curve for curve in found.curves}
    assert down["h2d"].seconds(nbytes=4_000_000) == pytest.approx(4_000_000 / 25e9, rel=0.01)
    assert down["d2h"].seconds(nbytes=4_000_000) == pytest.approx(4_000_000 / 20e9, rel=0.01)


def test_freetoken_measured_together(tmp_path: Path) -> None:
    """Rates beside each other say what host memory holds; without them the machine's own figure stays."""
    alone = {"expert_bytes": 4_000_000, "cpu_moe_gbs": 60, "pcie_gather_gbs": 24}
    both = alone | {"cpu_moe_overlap_gbs": 14, "pcie_gather_overlap_gbs": 11}
    ceilings = {"cpu_stream_read_gbs": 80, "pcie_linear_h2d_gbs": 25.0, "pcie_linear_d2h_gbs": 20.0}
    found = {}
    for name, rates in (("alone", alone), ("both", both)):
        (tmp_path / "benchbw.json").write_text(json.dumps({"ceilings": ceilings, "dtypes": {"q4": rates}}))
        found[name] = Fitted(load_machine("rtx-4090"), import_profile("freetoken", tmp_path, name, None)).dram_gbps
    assert found["both"] == pytest.approx(25, rel=0.05)
    assert found["alone"] == Roofline(load_machine("rtx-4090")).dram_gbps


@pytest.mark.parametrize(
    "text,said",
    [
        ("{", "not JSON"),
        ("[]", "no 'ceilings'"),
        ('{"version": 3, "ceilings": {}}', "version 3"),
        ('{"ceilings": {"pcie_linear_h2d_gbs": 0}}', "pcie_linear_h2d_gbs 0 is not a number above 0"),
    ],
)
def test_freetoken_mistakes(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "benchbw.json").write_text(text)
    with pytest.raises(CalibrationError, match=said):
        list(freetoken.read(tmp_path).rows)


def test_command_writes_a_profile(tmp_path: Path) -> None:
    sizes = [1, 2, 4, 8]
    table(
        tmp_path / "in" / "a.parquet", op_name="gemm", gemm_dtype="bfloat16", m=sizes, n=64, k=64,
        latency=[0.01 * m for m in sizes],
    )  # fmt: skip
    words = ["profile", "import", "--format", "aiconfigurator", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--machine", "h100", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["families"]["gemm"]["points"] == 4 and report["meta"]["machine"] == "h100-sxm"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"meta.yaml", "fit.json"}


def test_every_format_has_source_and_licence() -> None:
    import importlib

    for form in FORMATS:
        module = importlib.import_module(f"moesim.profile_import.{form}")
        assert module.SOURCE and module.LICENCE


# The public tables (not part of the repository)

A100 = "aiconfigurator_other_gpus/data/a100_sxm"


@pytest.mark.parametrize(
    "part,family,median,p90", [("gemm/vllm", "gemm", 0.06, 0.2), ("attention", "attention_decode", 0.08, 0.3)]
)
def test_a_random_half_predicts_the_other(part: str, family: str, median: float, p90: float) -> None:
    path = DATA / A100 / part
    if not path.exists():
        pytest.skip(f"no measured tables at {path}")
    found = import_profile("aiconfigurator", path, "x", None)
    curve = found.of_family(family)[0]
    assert curve.points > 2000 and curve.holdout_median_error < median and curve.p90 < p90
