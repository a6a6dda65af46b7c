"""Importers: a small golden input each, and twins of it that are wrong in one way."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.model import load_model
from moesim.trace import DECODE, PREFILL, io
from moesim.trace.importers import FORMATS, import_trace
from moesim.trace.importers.layer_counts import draw

REAL = Path(__file__).parents[2] / "../shared/data/routing_gptoss20b"
GPT_OSS = load_model("gpt-oss-20b")


def test_unknown_formats_and_options(tmp_path, model):
    with pytest.raises(TraceError, match="unknown trace format 'numppy'; did you mean 'numpy'"):
        import_trace("numppy", tmp_path, model)
    with pytest.raises(TraceError, match="format numpy does not use --tokens; it takes --phase, --prompt-tokens"):
        import_trace("numpy", tmp_path, model, phase="decode", tokens=3)
    with pytest.raises(TraceError, match="format numpy needs --phase"):
        import_trace("numpy", tmp_path, model)
    with pytest.raises(TraceError, match="format counts needs --tokens"):
        import_trace("counts", tmp_path, model)


@pytest.mark.parametrize("name", FORMATS)
def test_missing_and_foreign_files(tmp_path, model, name):
    options = {"tokens": 4} if name == "counts" else {"phase": "prefill"}
    with pytest.raises(TraceError, match="No such file"):
        import_trace(name, tmp_path / "none", model, **options)
    for content in (b"", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04 nothing", b"\x00\xff" * 100):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(TraceError, match="file: "):
            import_trace(name, tmp_path / "file", model, **options)


# --- numpy ------------------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    ids = np.array([[[0, 1], [2, 3], [4, 5]]] * 5, np.uint8)
    ids[3] = [[7, 0], [1, 2], [3, 4]]
    return {
        "ids": ids,
        "probs": np.full((5, 3, 2), [0.75, 0.25], np.float32),
        "offsets": np.array([0, 2, 5]),
        "prompt_len": np.array([3, 9], np.int32),
        "task": np.array(["code", "prose"]),
    }


def test_npz_of_decode_rows(tmp_path, model):
    path = tmp_path / "run.npz"
    np.savez_compressed(path, **arrays())
    trace = import_trace("numpy", path, model, phase="decode", engine="vllm 0.21")
    assert np.array_equal(trace.experts, arrays()["ids"])
    assert trace.requests.request_id == ("run-0", "run-1") and trace.requests.task == ("code", "prose")
    assert trace.requests.prompt_tokens.tolist() == [3, 9]
    assert trace.position.tolist() == [3, 4, 9, 10, 11] and (trace.phase == DECODE).all()
    assert trace.request.tolist() == [0, 0, 1, 1, 1]
    assert trace.weights is not None and trace.weights[0, 0].tolist() == [0.75, 0.25]
    assert trace.info.moe_layers == (1, 2, 3)
    assert (trace.info.engine, trace.info.source, trace.info.provenance) == ("vllm 0.21", "run.npz", "real")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64])
def test_npy_of_one_request(tmp_path, model, dtype):
    path = tmp_path / "run.npy"
    np.save(path, arrays()["ids"].astype(dtype))
    prefill = import_trace("numpy", path, model, phase="prefill", task="code")
    assert prefill.position.tolist() == [0, 1, 2, 3, 4] and (prefill.phase == PREFILL).all()
    assert prefill.requests.prompt_tokens.tolist() == [5] and prefill.requests.task == ("code",)
    both = import_trace("numpy", path, model, phase="both", prompt_tokens=3)
    assert both.position.tolist() == [0, 1, 2, 3, 4] and both.phase.tolist() == [0, 0, 0, 1, 1]
    part = import_trace("numpy", path, model, phase="prefill", prompt_tokens=8)
    assert part.requests.prompt_tokens.tolist() == [8] and (part.phase == PREFILL).all()
    with pytest.raises(TraceError, match="give --prompt-tokens N"):
        import_trace("numpy", path, model, phase="decode")


NPZ_FAULTS = {
    "no ids": ({"ids": None}, "no array 'ids'"),
    "unknown array": ({"probz": np.zeros(1)}, "unexpected array 'probz'; did you mean 'probs'"),
    "float ids": ({"ids": np.zeros((5, 3, 2))}, "ids are float64"),
    "flat ids": ({"ids": np.zeros((5, 6), int)}, "ids has shape [5, 6]; must have 3 dimensions"),
    "swapped axes": (
        {"ids": arrays()["ids"].swapaxes(0, 1)},
        "ids have shape [3, 5, 2], but tiny needs [tokens, 3 MoE",
    ),
    "no tokens": ({"ids": np.zeros((0, 3, 2), int)}, "ids hold no tokens"),
    "pickled": ({"ids": np.full((5, 3, 2), None)}, "Object arrays cannot be loaded"),
    "expert too high": ({"ids": arrays()["ids"] + 1}, "row 3, layer 1: expert 8, but tiny has 8 (0 to 7)"),
    "expert wraps": ({"ids": arrays()["ids"].astype(np.int64) + 65536}, "row 0: expert 65536"),
    "expert twice": ({"ids": np.ones((5, 3, 2), int)}, "row 0, layer 1: experts [1, 1]"),
    "offsets short": ({"offsets": np.array([0, 2, 4])}, "offsets go from 0 to 4; must go from 0 to the 5 tokens"),
    "offsets late": ({"offsets": np.array([1, 2, 5])}, "offsets go from 1 to 5"),
    "offsets empty": ({"offsets": np.array([], int)}, "offsets go from nothing"),
    "offsets fall": ({"offsets": np.array([0, 6, 5])}, "offsets give request 1 -1 tokens"),
    "offsets float": ({"offsets": np.array([0.0, 2, 5])}, "offsets is float64"),
    "prompts many": ({"prompt_len": np.array([1, 2, 3])}, "prompt_len has 3 values, but there are 2 requests"),
    "prompts wrap": ({"prompt_len": np.array([1, 2**32])}, "prompt_len 4294967296"),
    "prompts negative": ({"prompt_len": np.array([1, -2])}, "row 2: prompt_tokens -2"),
    "prompts absent": ({"prompt_len": None}, "give --prompt-tokens N"),
    "probs shape": ({"probs": np.ones((5, 3))}, "probs has shape [5, 3]; must have 3 dimensions"),
    "probs size": ({"probs": np.ones((5, 3, 3))}, "probs are float64 [5, 3, 3]"),
    "probs above 1": ({"probs": np.full((5, 3, 2), 0.6)}, "row 0, layer 1: weights sum to 1.2"),
    "probs too large": ({"probs": np.full((5, 3, 2), 1e9)}, "weight inf"),
    "tasks of numbers": ({"task": np.array([1, 2])}, "task is int64 [2]; must be 2 strings"),
}


@pytest.mark.parametrize("fault", NPZ_FAULTS)
def test_each_fault_of_an_npz_is_named(tmp_path, model, fault):
    change, message = NPZ_FAULTS[fault]
    np.savez(tmp_path / "run.npz", **{n: a for n, a in {**arrays(), **change}.items() if a is not None})
    with pytest.raises(TraceError) as error:
        import_trace("numpy", tmp_path / "run.npz", model, phase="decode")
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "run.npz")) and "\n" not in str(error.value)


def test_npz_contradicting_options(tmp_path, model):
    np.savez(tmp_path / "run.npz", **arrays())
    for options, message in (
        ({"phase": "decod"}, "phase 'decod'; did you mean 'decode'"),
        ({"phase": "decode", "prompt_tokens": 4}, "--prompt-tokens 4 contradicts it"),
        ({"phase": "decode", "task": "x"}, "--task x contradicts it"),
        ({"phase": "prefill"}, "prefill token"),  # more rows than the prompt has tokens
    ):
        if options == {"phase": "prefill"}:
            np.savez(tmp_path / "run.npz", **{**arrays(), "prompt_len": np.array([3, 2])})
        with pytest.raises(TraceError, match=message):
            import_trace("numpy", tmp_path / "run.npz", model, **options)


def test_truncated_and_absurd_npz(tmp_path, model):
    path = tmp_path / "run.npz"
    np.savez_compressed(path, **arrays())
    whole = path.read_bytes()
    for end in range(0, len(whole), 23):
        path.write_bytes(whole[:end])
        with pytest.raises(TraceError):
            import_trace("numpy", path, model, phase="decode")
    header = str({"descr": "<i8", "fortran_order": False, "shape": (10**12, 3, 2)}).encode().ljust(117) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ids.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(TraceError, match="GiB; split it"):
        import_trace("numpy", path, model, phase="decode")


@pytest.mark.skipif(not REAL.exists(), reason="../shared/data/routing_gptoss20b is not here")
@pytest.mark.parametrize(
    ("name", "tokens", "requests"), [("all_ids_nonrep", 162219, 494), ("small40_ids_probs", 20140, 40)]
)
def test_real_routing_of_gpt_oss_20b(tmp_path, monkeypatch, name, tokens, requests):
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))
    trace = import_trace("numpy", REAL / f"{name}.npz", GPT_OSS, phase="decode")
    with np.load(REAL / f"{name}.npz") as arrays:
        assert np.array_equal(trace.experts, arrays["ids"])
        assert np.array_equal(trace.first_row, arrays["offsets"])
        assert np.array_equal(trace.position[trace.first_row[:-1]], arrays["prompt_len"])
        assert (trace.weights is not None) == ("probs" in arrays)
    assert (trace.tokens, len(trace.requests)) == (tokens, requests)
    io.write(trace, tmp_path / "t.parquet")
    assert np.array_equal(io.read(tmp_path / "t.parquet").experts, trace.experts)


@pytest.mark.skipif(not REAL.exists(), reason="../shared/data/routing_gptoss20b is not here")
def test_real_counts_of_gpt_oss_20b():
    trace = import_trace("counts", REAL / "expert_counts.csv", GPT_OSS, tokens=5000)
    counts = np.loadtxt(REAL / "expert_counts.csv", delimiter=",", skiprows=1, dtype=np.int64)
    asked = np.zeros((24, 32))
    asked[counts[:, 0], counts[:, 1]] = counts[:, 2]
    asked *= 4 / asked.sum(axis=1, keepdims=True)
    assert np.abs(trace.popularity() / 5000 - asked).max() < 0.03  # 4 standard deviations of a share at 5000 tokens


# --- long csv ---------------------------------------------------------------------------------------------------------

# Two requests of the tiny model: a with 1 prefill and 1 decode token, b with 1 prefill token.
LONG = """request,token,layer,rank,expert,phase,weight,task
a,0,1,0,3,prefill,0.75,code
a,0,1,1,2,prefill,0.25,code
a,0,2,0,0,prefill,0.5,code
a,0,2,1,1,prefill,0.5,code
a,0,3,0,7,prefill,1.0,code
a,0,3,1,6,prefill,0.0,code
a,4,1,0,1,decode,0.75,code
a,4,1,1,2,decode,0.25,code
a,4,2,0,3,decode,0.75,code
a,4,2,1,4,decode,0.25,code
a,4,3,0,5,decode,0.75,code
a,4,3,1,6,decode,0.25,code
b,0,1,0,1,prefill,0.75,prose
b,0,1,1,0,prefill,0.25,prose
b,0,2,0,1,prefill,0.75,prose
b,0,2,1,0,prefill,0.25,prose
b,0,3,0,1,prefill,0.75,prose
b,0,3,1,0,prefill,0.25,prose
"""


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("order", ["as written", "reversed within requests", "by layer"])
def test_long_csv_in_any_order(tmp_path, model, order):
    header, *rows = LONG.splitlines()
    if order == "reversed within requests":
        rows = rows[11::-1] + rows[:11:-1]
    elif order == "by layer":
        rows = sorted(rows, key=lambda row: row.split(",")[2])
    trace = import_trace("csv", write_csv(tmp_path / "r.csv", "\n".join([header, *rows])), model)
    assert trace.experts.tolist() == [
        [[3, 2], [0, 1], [7, 6]],
        [[1, 2], [3, 4], [5, 6]],
        [[1, 0], [1, 0], [1, 0]],
    ]
    assert trace.requests.request_id == ("a", "b") and trace.requests.task == ("code", "prose")
    assert trace.phase.tolist() == [PREFILL, DECODE, PREFILL] and trace.position.tolist() == [0, 1, 0]
    assert trace.requests.prompt_tokens.tolist() == [1, 1]
    assert trace.weights is not None and trace.weights[0].tolist() == [[0.75, 0.25], [0.5, 0.5], [1, 0]]


def test_long_csv_with_required_columns_only(tmp_path, model):
    rows = [",".join(row.split(",")[1:5]) for row in LONG.splitlines()[:13]]
    path = write_csv(tmp_path / "r.csv", "\n".join(rows))
    trace = import_trace("csv", path, model, phase="decode", prompt_tokens=7, task="code")
    assert trace.requests.request_id == ("r",) and trace.requests.task == ("code",)
    assert trace.position.tolist() == [7, 8] and trace.weights is None
    with pytest.raises(TraceError, match="no column phase; add it, or say with --phase"):
        import_trace("csv", path, model)
    with pytest.raises(TraceError, match="give --prompt-tokens N"):
        import_trace("csv", path, model, phase="decode")


CSV_FAULTS = {
    "missing column": (("rank,", "rang,"), "no column 'rank'; the header must name token, layer, rank, expert"),
    "unknown column": (("weight,", "weigth,"), "unexpected column 'weigth'; did you mean 'weight'"),
    "double column": (("phase,", "task,"), "unexpected column 'task'"),
    "not a number": (("a,4,1,0,1", "a,4,1,0,x"), "invalid value 'x'"),
    "empty value": (("a,4,1,0,1", "a,4,1,0,"), "row 6: column 'expert' is empty"),
    "ragged": (("a,4,1,0,1", "a,4,1,0"), "Expected 8 columns, got 7"),
    "rank missing": (("a,4,2,1,4,decode,0.25,code\n", ""), "row 6: token 4 has 5 rows; needs 6 (3 layers x 2)"),
    "rank twice": (("a,4,2,1,4", "a,4,2,0,4"), "row 6: token 4 repeats a rank of a layer"),
    "rank too high": (("a,4,2,1,4", "a,4,2,2,4"), "row 9: rank 2; tiny has ranks 0 to 1"),
    "dense layer": (("a,4,2,1,4", "a,4,0,1,4"), "row 9: layer 0 is not one of tiny's MoE layers, 1 to 3"),
    "layer too high": (("a,4,2,1,4", "a,4,4,1,4"), "row 9: layer 4 is not one of"),
    "token negative": (("b,0,1,0,1", "b,-1,1,0,1"), "row 12: token -1"),
    "expert too high": (("a,4,2,1,4", "a,4,2,1,8"), "row 1, layer 2: expert 8, but tiny has 8"),
    "expert wraps": (("a,4,2,1,4", "a,4,2,1,65540"), "row 9: expert 65540"),
    "expert twice": (("a,4,2,1,4", "a,4,2,1,3"), "row 1, layer 2: experts [3, 3]"),
    "weight nan": (("a,4,2,1,4,decode,0.25", "a,4,2,1,4,decode,nan"), "weight nan"),
    "phase unknown": (("a,4,2,1,4,decode", "a,4,2,1,4,decoding"), "row 9: phase 'decoding'; did you mean 'decode'"),
    "phase differs": (("a,4,2,1,4,decode", "a,4,2,1,4,prefill"), "row 9: phase differs from another row"),
    "task differs": (("a,4,2,1,4,decode,0.25,code", "a,4,2,1,4,decode,0.25,math"), "task differs from another row"),
    "only a header": ((LONG.partition("\n")[2], ""), "no rows below the header"),
}


@pytest.mark.parametrize("fault", CSV_FAULTS)
def test_each_fault_of_a_long_csv_is_named(tmp_path, model, fault):
    (old, new), message = CSV_FAULTS[fault]
    assert old in LONG
    with pytest.raises(TraceError) as error:
        import_trace("csv", write_csv(tmp_path / "r.csv", LONG.replace(old, new, 1)), model)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "r.csv")) and "\n" not in str(error.value)


def test_long_csv_phases_and_prompts(tmp_path, model):
    path = write_csv(tmp_path / "r.csv", LONG)
    assert import_trace("csv", path, model, prompt_tokens=5).position.tolist() == [0, 5, 0]
    with pytest.raises(TraceError, match="--phase decode contradicts it"):
        import_trace("csv", path, model, phase="decode")
    write_csv(
        path, LONG.replace("b,0,", "c,0,").replace("prefill", "X").replace("decode", "prefill").replace("X", "decode")
    )
    with pytest.raises(TraceError, match=r"number 1 \(from 0\) has no prefill rows"):
        import_trace("csv", path, model)
    with pytest.raises(TraceError, match=r"row 1: prefill token .*prefill rows must come before decode rows"):
        import_trace("csv", path, model, prompt_tokens=5)


# --- counts -----------------------------------------------------------------------------------------------------------

COUNTS = """layer,expert,count
1,0,50
1,1,30
1,2,20
2,7,10
2,6,10
3,5,1
3,4,4
3,3,3
3,2,2
"""


def test_counts_become_a_synthetic_trace(tmp_path, model):
    path = write_csv(tmp_path / "c.csv", COUNTS)
    trace = import_trace("counts", path, model, tokens=20000, seed=3)
    assert trace.info.provenance == "synthetic" and trace.info.extra["seed"] == 3
    assert "order of tokens" in trace.info.extra["lost"]
    assert trace.tokens == 20000 and (trace.phase == DECODE).all()
    share = trace.popularity() / 20000
    assert share[0, 0] == 1 and share[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]  # count 50 of 100 at top-2: every token
    assert np.abs(share[0, 1:3] - [0.6, 0.4]).max() < 0.02
    assert np.abs(share[2, 2:6] - [0.4, 0.6, 0.8, 0.2]).max() < 0.02
    again = import_trace("counts", path, model, tokens=20000, seed=3)
    assert np.array_equal(again.experts, trace.experts)
    assert not np.array_equal(import_trace("counts", path, model, tokens=20000, seed=4).experts, trace.experts)


@given(st.lists(st.integers(0, 10**6), min_size=4, max_size=12), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None)
def test_a_draw_has_different_experts_that_have_counts(counts, k, seed):
    ceiling = sum(counts) // k
    counts = np.minimum(counts, ceiling)
    if k * counts.max() > counts.sum() or counts.sum() == 0:
        return
    drawn = draw(np.random.default_rng(seed), counts, k, 50)
    assert drawn.shape == (50, k)
    assert all(len(set(row)) == k for row in drawn.tolist())
    assert (counts[drawn] > 0).all()


COUNT_FAULTS = {
    "missing column": (("layer,", "layer_id,"), "no column 'layer'"),
    "dense layer": (("2,7,10", "0,7,10"), "row 3: layer 0 is not a MoE layer of tiny"),
    "expert too high": (("2,7,10", "2,8,10"), "row 3: expert 8, but tiny has 8"),
    "negative": (("2,7,10", "2,7,-1"), "row 3: count -1"),
    "huge": (("2,7,10", "2,7,9000000000000000000"), "row 3: count 9000000000000000000"),
    "twice": (("2,7,10", "2,6,10"), "row 4: layer 2, expert 6 appears twice"),
    "layer missing": (("2,7,10\n2,6,10\n", ""), "layer 2 has no counts"),
    "more than once per token": (("1,0,50", "1,0,51"), "layer 1, expert 0 has 51 of 101 counts"),
}


@pytest.mark.parametrize("fault", COUNT_FAULTS)
def test_each_fault_of_counts_is_named(tmp_path, model, fault):
    (old, new), message = COUNT_FAULTS[fault]
    with pytest.raises(TraceError) as error:
        import_trace("counts", write_csv(tmp_path / "c.csv", COUNTS.replace(old, new, 1)), model, tokens=10)
    assert message in str(error.value)


def test_counts_need_tokens(tmp_path, model):
    path = write_csv(tmp_path / "c.csv", COUNTS)
    for tokens, message in ((0, "no tokens"), (-1, "no tokens"), (10**12, "cut it into parts")):
        with pytest.raises(TraceError, match=message):
            import_trace("counts", path, model, tokens=tokens)


def test_imported_traces_survive_the_file(tmp_path, model):
    trace = import_trace("csv", write_csv(tmp_path / "r.csv", LONG), model)
    io.write(trace, tmp_path / "t.parquet")
    assert io.read(tmp_path / "t.parquet").info == trace.info
