"""Trace files: round trips, every rule of the schema, damage, and the cache of decoded arrays."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.trace import Requests, Trace, TraceInfo, cache, io
from moesim.trace.check import check_matches


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(a: Trace, b: Trace) -> bool:
    arrays, others = cache.arrays_of(a), cache.arrays_of(b)
    return (
        a.info == b.info
        and (a.requests.request_id, a.requests.task) == (b.requests.request_id, b.requests.task)
        and arrays.keys() == others.keys()
        and all(x.dtype == others[n].dtype and np.array_equal(x, others[n]) for n, x in arrays.items())
    )


@st.composite
def traces(draw) -> Trace:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    experts, layers = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    k = draw(st.integers(1, min(experts, 6)))
    lengths = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(any), min_size=1, max_size=5))
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=len(lengths), max_size=len(lengths), unique=True))
    prompt = np.array([p + draw(st.integers(0, 3)) for p, _ in lengths], np.int32)
    tokens = sum(p + d for p, d in lengths)
    positions = [[*range(p), *range(n, n + d)] for (p, d), n in zip(lengths, prompt, strict=True)]
    ids = rng.random((tokens, layers, experts)).argsort(axis=-1)[..., :k].astype(np.int16)
    if draw(st.booleans()) and k > 1:
        ids[rng.random(ids.shape[:2]) < 0.3, k - 1] = -1
    weights = rng.dirichlet(np.ones(k), (tokens, layers)).astype(np.float16)
    weights[ids < 0] = 0
    probabilities = rng.dirichlet(np.ones(experts), (tokens, layers)).astype(np.float16)
    return Trace(
        info=TraceInfo("m", experts, k, tuple(range(1, layers + 1)), extra={"b": [1, None], "a": "ü"}),
        requests=Requests(
            request_id=tuple(names),
            task=tuple(draw(st.sampled_from(["", "code"])) for _ in names),
            prompt_tokens=prompt,
            arrival_ns=rng.integers(0, 2**62, len(names)) if draw(st.booleans()) else None,
        ),
        experts=ids,
        request=np.repeat(np.arange(len(names), dtype=np.int32), [p + d for p, d in lengths]),
        phase=np.concatenate([np.repeat(np.array([0, 1], np.uint8), both) for both in lengths]),
        position=np.concatenate(positions).astype(np.int32),
        weights=weights if draw(st.booleans()) else None,
        probabilities=probabilities if draw(st.booleans()) else None,
    )


@given(traces(), st.integers(1, 12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path, monkeypatch, trace, row_group):
    monkeypatch.setattr(io, "ROW_GROUP", row_group)
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)
    io.write(trace, tmp_path / "t.parquet")
    decoded = io.read(tmp_path / "t.parquet")
    cached = io.read(tmp_path / "t.parquet")
    assert same(decoded, trace) and same(cached, trace)
    assert decoded.content_hash == cached.content_hash != ""
    assert not cached.experts.flags.writeable and not decoded.experts.flags.writeable


def test_same_trace_same_bytes(tmp_path, trace):
    other = replace(trace, info=replace(trace.info, extra={"b": 1, "a": 2}))
    io.write(other, tmp_path / "a.parquet")
    io.write(replace(trace, info=replace(trace.info, extra={"a": 2, "b": 1})), tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_the_file_is_what_the_schema_says(tmp_path, trace):
    io.write(trace, tmp_path / "t.parquet")
    schema = pq.read_schema(tmp_path / "t.parquet")
    assert schema.names == [
        "request_id", "task", "phase", "position", "prompt_tokens", "arrival_ns", "experts", "weights", "probabilities",
    ]  # fmt: skip
    assert schema.field("experts").type == pa.list_(pa.int16(), 6)
    assert schema.field("weights").type == pa.list_(pa.float16(), 6)
    assert schema.field("probabilities").type == pa.list_(pa.float16(), 24)
    assert json.loads(schema.metadata[b"moesim"])["schema_version"] == 1
    column = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(0).column(6)
    assert column.compression == "ZSTD" and column.has_dictionary_page


def test_optional_columns_are_left_out(tmp_path, trace):
    bare = replace(
        trace,
        weights=None,
        probabilities=None,
        requests=replace(trace.requests, task=("", ""), arrival_ns=None),
    )
    io.write(bare, tmp_path / "t.parquet")
    assert pq.read_schema(tmp_path / "t.parquet").names[-1] == "experts"
    assert same(io.read(tmp_path / "t.parquet"), bare)


def test_tables_of_other_tools_are_read(tmp_path, trace):
    """Plain strings, int64 numbers, variable-length lists and float32 weights, as pandas or polars write them."""
    io.write(trace, tmp_path / "t.parquet")
    table = pq.read_table(tmp_path / "t.parquet")
    plain = {"request_id": pa.string(), "task": pa.large_string(), "phase": pa.string(), "position": pa.int64()}
    plain |= {"experts": pa.list_(pa.int64()), "weights": pa.large_list(pa.float32())}
    for name, kind in plain.items():
        table = with_column(table, name, table[name].to_pylist(), kind)
    pq.write_table(table, tmp_path / "u.parquet")
    assert same(io.read(tmp_path / "u.parquet"), trace)


# --- one fault each ---------------------------------------------------------------------------------------------------


def with_column(table: pa.Table, name: str, values, kind: pa.DataType | None = None) -> pa.Table:
    index = table.schema.names.index(name)
    return table.set_column(index, name, pa.array(values, kind or table.schema.field(name).type))


def edited(name: str, row: int, value):
    def edit(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        kind = table.schema.field(name).type
        if isinstance(values[row], list) and len(values[row]) != kind.list_size:
            kind = pa.list_(kind.value_type)
        return with_column(table, name, values, kind)

    return edit


def item(index: int, value):
    return lambda old: [*old[:index], value, *old[index + 1 :]]


def meta(**changes):
    def edit(table: pa.Table) -> pa.Table:
        info = {**json.loads(table.schema.metadata[b"moesim"]), **changes}
        info = {name: value for name, value in info.items() if value != "absent"}
        return table.replace_schema_metadata({"moesim": json.dumps(info)})

    return edit


FAULTS = {
    "no metadata": (lambda t: t.replace_schema_metadata(None), "no 'moesim' metadata"),
    "metadata not json": (lambda t: t.replace_schema_metadata({"moesim": "{"}), "metadata is not JSON"),
    "metadata not object": (lambda t: t.replace_schema_metadata({"moesim": "[]"}), "must be a JSON object"),
    "metadata key missing": (meta(top_k="absent"), "metadata lacks 'top_k'"),
    "metadata key unknown": (meta(expert=8), "unknown metadata key 'expert'; did you mean 'experts'?"),
    "metadata type": (meta(experts="8"), "metadata 'experts' is '8'; must be of type int"),
    "metadata bool": (meta(top_k=True), "metadata 'top_k' is True"),
    "metadata layers type": (meta(moe_layers=[1, 2, "3"]), "must be whole numbers"),
    "schema version": (meta(schema_version=2), "schema_version 2, but this moesim reads 1"),
    "k above experts": (meta(top_k=9), "top_k 9, but tiny has 8 experts"),
    "no experts": (meta(experts=0), "0 experts; must be 1 to 32767"),
    "absurd experts": (meta(experts=10**12), "1000000000000 experts"),
    "absurd layers": (meta(moe_layers=list(range(5000))), "5000 MoE layers; must be 1 to 1024"),
    "no layers": (meta(moe_layers=[]), "0 MoE layers"),
    "layers out of order": (meta(moe_layers=[1, 3, 2]), "moe_layers [1, 3, 2] must be layer numbers in rising order"),
    "layers do not match": (meta(moe_layers=[1, 2, 3, 4]), "row 0: experts has 6 values; must be 8 (4 layers x 2)"),
    "physical ids": (meta(id_space="physical"), "id_space 'physical'; must be 'logical'"),
    "provenance": (meta(provenance="guess"), "provenance 'guess'"),
    "no model": (meta(model=""), "empty model name"),
    "missing column": (lambda t: t.drop_columns("prompt_tokens"), "no column 'prompt_tokens'"),
    "unknown column": (lambda t: t.append_column("tasks", t["task"]), "unexpected column 'tasks'; did you mean 'task'"),
    "empty": (lambda t: t.slice(0, 0), "no tokens"),
    "null": (edited("task", 1, None), "column 'task' has 1 empty values"),
    "null expert": (edited("experts", 1, item(2, None)), "column 'experts' has 1 empty values"),
    "text position": (lambda t: with_column(t, "position", ["x"] * 9, pa.string()), "'position' is string"),
    "number request": (lambda t: with_column(t, "request_id", [1] * 9, pa.int64()), "'request_id' is int64; must be"),
    "experts no list": (lambda t: with_column(t, "experts", [1] * 9, pa.int16()), "'experts' is int16; must be lists"),
    "list length": (edited("experts", 4, lambda old: old[:-1]), "row 4: experts has 5 values; must be 6"),
    "expert too high": (edited("experts", 4, item(3, 8)), "row 4, layer 2: expert 8, but tiny has 8 (0 to 7)"),
    "expert too low": (edited("experts", 4, item(5, -2)), "row 4, layer 3: expert -2"),
    "expert wraps": (
        lambda t: with_column(t, "experts", [[65536, 1] * 3] + [[0, 1] * 3] * 8, pa.list_(pa.int64())),
        "row 0: expert 65536",
    ),
    "expert twice": (edited("experts", 2, [0, 1, 5, 5, 0, 1]), "row 2, layer 2: experts [5, 5]; an expert may"),
    "unused rank first": (edited("experts", 2, [0, 1, -1, 5, 0, 1]), "row 2, layer 2: experts [-1, 5]; unused ranks"),
    "padding row": (edited("experts", 8, [-1] * 6), "row 8: no expert at any layer"),
    "weight nan": (edited("weights", 3, item(0, float("nan"))), "row 3, layer 1: weight nan"),
    "weight inf": (edited("weights", 3, item(2, float("inf"))), "row 3, layer 2: weight inf"),
    "weight negative": (edited("weights", 3, item(5, -0.25)), "row 3, layer 3: weight -0.25"),
    "weights above 1": (edited("weights", 3, [0.7, 0.5, 0, 0, 0, 0]), "row 3, layer 1: weights sum to 1.2"),
    "weight of unused": (
        lambda t: edited("experts", 3, [0, 1, 2, -1, 0, 1])(edited("weights", 3, [0.5] * 6)(t)),
        "row 3, layer 2: weight 0.5 on an unused rank",
    ),
    "probability nan": (edited("probabilities", 3, item(0, float("nan"))), "row 3, layer 1: probability nan"),
    "probabilities short": (edited("probabilities", 3, [0.0625] * 24), "row 3, layer 1: probabilities sum to 0.5"),
    "request returns": (edited("request_id", 8, "a"), "row 8: request_id 'a' appears again"),
    "empty request id": (lambda t: with_column(t, "request_id", ["a"] * 5 + [""] * 4), "row 5: request_id ''"),
    "positions repeat": (edited("position", 1, 0), "row 1: prefill token at position 0"),
    "position negative": (edited("position", 0, -1), "row 0: prefill token at position -1"),
    "phase unknown": (edited("phase", 7, "Decode"), "row 7: phase 'Decode'"),
    "prefill after decode": (edited("phase", 7, "prefill"), "row 7: prefill token at position 9"),
    "prompt differs": (edited("prompt_tokens", 7, 6), "row 7: prompt_tokens differs from the first row"),
    "prompt too small": (lambda t: with_column(t, "prompt_tokens", [2] * 9), "row 2: prefill token at position 2"),
    "prompt too large": (lambda t: with_column(t, "prompt_tokens", [8] * 9), "row 3: decode token at position 3"),
    "prompt negative": (lambda t: with_column(t, "prompt_tokens", [3] * 5 + [-7] * 4), "row 5: prompt_tokens -7"),
    "arrival differs": (edited("arrival_ns", 6, 1), "row 6: arrival_ns differs from the first row"),
    "arrival negative": (lambda t: with_column(t, "arrival_ns", [0] * 5 + [-1] * 4), "row 5: arrival_ns -1"),
    "task differs": (edited("task", 6, "code"), "row 6: task differs from the first row"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path, trace, fault):
    edit, message = FAULTS[fault]
    path = tmp_path / "t.parquet"
    io.write(trace, path)
    broken = edit(pq.read_table(path))
    pq.write_table(broken, path)
    with pytest.raises(TraceError) as error:
        io.read(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_fault_in_a_later_row_group_has_its_row_in_the_file(tmp_path, trace, monkeypatch):
    path = tmp_path / "t.parquet"
    io.write(trace, path)
    table = edited("experts", 7, [1, 2, 3, 3, 4, 5])(pq.read_table(path))
    pq.write_table(edited("position", 7, 2**40)(with_column(table, "position", range(9), pa.int64())), path)
    monkeypatch.setattr(io, "ROW_GROUP", 4)
    monkeypatch.setattr("moesim.trace.check.CHUNK", 4)
    with pytest.raises(TraceError, match=re.escape("row 7: position 1099511627776; must be")):
        io.read(path)
    pq.write_table(table, path)
    with pytest.raises(TraceError, match=re.escape("row 7, layer 2: experts [3, 3]")):
        io.read(path)


def test_write_refuses_what_read_would(tmp_path, trace):
    with pytest.raises(TraceError, match="expert 9"):
        io.write(replace(trace, experts=np.full_like(trace.experts, 9)), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="experts is int64"):
        io.write(replace(trace, experts=trace.experts.astype(np.int64)), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="grouped by request"):
        io.write(replace(trace, request=trace.request[::-1].copy()), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="of another length"):
        io.write(replace(trace, requests=replace(trace.requests, task=("x",))), tmp_path / "t.parquet")
    with pytest.raises(TraceError, match="cannot be written as JSON"):
        io.write(replace(trace, info=replace(trace.info, extra={"x": float("nan")})), tmp_path / "t.parquet")
    assert not list(tmp_path.glob("*.parquet"))


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        io.read(tmp_path / "none.parquet")
    with pytest.raises(TraceError, match="Is a directory"):
        io.read(tmp_path)
    for content in (b"", b"PAR1", b"token,layer\n1,2\n"):
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(TraceError, match="not a whole Parquet file"):
            io.read(tmp_path / "t.parquet")


def test_damage_is_never_read_as_a_trace(tmp_path, trace):
    """Every truncation, and bit flips anywhere: an error, or the same arrays (the footer has no checksum)."""
    path = tmp_path / "t.parquet"
    io.write(trace, path)
    whole = path.read_bytes()
    for end in range(0, len(whole), 61):
        path.write_bytes(whole[:end])
        with pytest.raises(TraceError):
            io.read(path)
    rng = np.random.default_rng(1)
    for at in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            found = io.read(path)
        except TraceError:
            continue
        assert same(replace(found, info=trace.info), trace)


def test_too_large_is_refused_before_memory_is_taken(tmp_path, trace, monkeypatch):
    io.write(trace, tmp_path / "t.parquet")
    monkeypatch.setattr("moesim.trace.check.MAX_BYTES", 500)
    with pytest.raises(TraceError, match="cut it into parts"):
        io.read(tmp_path / "t.parquet")


def test_matches_model(trace, model):
    check_matches(trace, model)
    for name, value, message in (
        ("experts", 9, "experts 8, but model tiny has 9"),
        ("top_k", 1, "top_k 2, but model tiny has 1"),
        ("moe_layers", (1, 2), "MoE layers 3, but model tiny has 2"),
    ):
        with pytest.raises(TraceError, match=message):
            check_matches(trace, SimpleNamespace(**{**vars(model), name: value}))


# --- cache ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path, trace, monkeypatch, cache_folder):
    """A trace file whose arrays lie in the cache, and its entry there."""
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)
    io.write(trace, tmp_path / "t.parquet")
    io.read(tmp_path / "t.parquet")
    (entry,) = (cache_folder / "traces").iterdir()
    return tmp_path / "t.parquet", entry


def test_second_read_does_not_decode(cached, trace, monkeypatch):
    monkeypatch.setattr(io, "_parse", None)
    assert same(io.read(cached[0]), trace)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing array", "description", "no description", "a file"])
def test_a_damaged_cache_is_rebuilt(cached, trace, damage, monkeypatch):
    path, entry = cached
    array, description = entry / "experts.npy", entry / "trace.json"
    if damage == "truncated":
        array.write_bytes(array.read_bytes()[:-4])
    elif damage == "flipped":
        array.write_bytes(array.read_bytes()[:-1] + b"\x07")
    elif damage == "missing array":
        array.unlink()
    elif damage == "description":
        description.write_text(description.read_text().replace("tiny", "tony"))
    elif damage == "no description":
        description.unlink()
    else:
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
        entry.write_text("in the way")
    assert same(io.read(path), trace)
    if damage != "a file":
        monkeypatch.setattr(io, "_parse", None)
        assert same(io.read(path), trace)


def test_another_file_under_the_same_name_is_decoded(cached, trace):
    io.write(replace(trace, weights=None), cached[0])
    assert io.read(cached[0]).weights is None


def test_no_cache_where_it_cannot_be_written(tmp_path, trace, monkeypatch):
    monkeypatch.setattr(cache, "SMALLEST_BYTES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "file" / "below"))
    io.write(trace, tmp_path / "t.parquet")
    assert same(io.read(tmp_path / "t.parquet"), trace)
    assert same(io.read(tmp_path / "t.parquet"), trace)


def test_cache_is_bounded(cached, trace, monkeypatch):
    path, entry = cached
    size = sum(file.stat().st_size for file in entry.iterdir())
    monkeypatch.setattr(cache, "LIMIT_BYTES", size + 200)
    io.write(replace(trace, weights=None), path)
    io.read(path)
    (left,) = entry.parent.iterdir()
    assert left != entry


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("MOESIM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "moesim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "moesim"


def test_a_million_tokens_load_in_about_a_second(tmp_path, benchmark, monkeypatch):
    monkeypatch.setattr(cache, "LIMIT_BYTES", 0)  # every load is a first load
    tokens, layers = 1_000_000, 32
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, (tokens, layers), dtype=np.int16)
    ids = np.stack([first, (first + rng.integers(1, 8, (tokens, layers), dtype=np.int16)) % 8], axis=-1)
    trace = Trace(
        info=TraceInfo("m", 8, 2, tuple(range(layers))),
        requests=Requests(("a",), ("",), np.array([0], np.int32)),
        experts=ids,
        request=np.zeros(tokens, np.int32),
        phase=np.ones(tokens, np.uint8),
        position=np.arange(tokens, dtype=np.int32),
    )
    io.write(trace, tmp_path / "t.parquet")
    benchmark(io.read, tmp_path / "t.parquet")
