"""Synthetic routing: the generator's parts by extreme cases, fits by the statistics they must reproduce."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from moesim.commands.trace_stats import register
from moesim.errors import TraceError
from moesim.model import load_model
from moesim.trace import DECODE, PREFILL, Trace
from moesim.trace.check import check
from moesim.trace.choices import count_choices
from moesim.trace.cut import cut
from moesim.trace.importers import import_trace
from moesim.trace.io import read, write
from moesim.trace.routing_model import GAPS, Batch, RoutingModel, draw_ids
from moesim.trace.stats import describe
from moesim.trace.summary import compare
from moesim.trace.synth import draw, fit, from_parameters, redraw
from tests.fakes import make_trace
from tests.scenes import random_trace


@pytest.fixture(scope="module")
def flat() -> RoutingModel:
    """3 layers, top-2 of 8, tasks a and b; every expert equally likely at any time."""
    model = from_parameters(8, 2, 3, skew=0, reuse=0.25, layer_correlation=0.25, request_spread=0, tasks=("a", "b"))
    parts = ("popularity", "recency", "taste", "transition")
    return replace(model, **{part: np.zeros_like(getattr(model, part)) for part in parts})


def gaps(value: float, up_to: int) -> np.ndarray:
    return np.where(np.append(GAPS, GAPS[-1] + 1) <= up_to, value, 0).astype(np.float32)


def test_draws_are_valid_traces_and_marked_synthetic(flat, tmp_path):
    trace = draw(flat, requests=5, prompt_tokens=3, decode_tokens=4, seed=1)
    check(trace, "drawn")
    assert trace.phase.reshape(5, 7).tolist() == [[PREFILL] * 3 + [DECODE] * 4] * 5
    assert trace.position.reshape(5, 7).tolist() == [list(range(7))] * 5
    write(trace, tmp_path / "drawn.parquet")
    back = read(tmp_path / "drawn.parquet")
    assert back.info.provenance == "synthetic"
    assert "not from recorded routing" in back.info.source
    assert back.info.extra["seed"] == 1
    assert (back.experts == trace.experts).all()


def test_same_seed_same_trace(flat):
    draws = [draw(flat, 6, 2, 5, seed=seed).experts for seed in (1, 1, 2)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_one_choice_follows_the_softmax_of_popularity(flat):
    weight = np.log(np.arange(1, 9) / 36)
    model = replace(flat, info=replace(flat.info, top_k=1), popularity=(flat.popularity + weight).astype(np.float32))
    share = draw(model, 400, 0, 50).popularity() / 20_000
    assert share == pytest.approx(np.tile(np.arange(1, 9) / 36, (3, 1)), abs=0.012)


def test_phases_and_tasks_have_their_own_popularity(flat):
    popularity = flat.popularity.copy()
    for phase in (PREFILL, DECODE):
        for task in (0, 1):
            start = 2 * (2 * phase + task)
            popularity[phase, task, :, start : start + 2] = 60
    trace = draw(replace(flat, popularity=popularity), 20, 3, 3, seed=2)
    task = np.array([name == "b" for name in trace.requests.task])[trace.request]
    expected = 2 * (2 * trace.phase.astype(int) + task)
    assert (np.sort(trace.experts, axis=2)[:, :, 0] == expected[:, None]).all()
    assert set(trace.requests.task) == {"a", "b"}
    assert set(draw(flat, 20, 1, 1, tasks=["b"]).requests.task) == {"b"}


def test_recency_keeps_experts_and_requests_apart(flat):
    model = replace(flat, recency=np.tile(gaps(60, 1), (2, 3, 1)))
    lengths = [(2, 9), (0, 1), (5, 3), (1, 30)]
    ragged = make_trace(np.zeros((51, 3, 2), int), 8, lengths, ["a", "b", "a", "b"])
    trace = redraw(model, ragged, seed=3)
    assert (trace.request == ragged.request).all()
    assert (trace.phase == ragged.phase).all()
    kept = np.sort(trace.experts, axis=2)
    first = kept[trace.first_row[:-1]][trace.request]
    assert (kept == first).all(), "with all weight on the last token's experts a request never leaves its first ones"
    assert len({tuple(row.ravel()) for row in kept[trace.first_row[:-1]]}) > 1


def test_transition_links_the_layers(flat):
    links = np.zeros_like(flat.transition)
    links[1:, :8] = 60 * np.roll(np.eye(8), 1, axis=1)
    trace = draw(replace(flat, transition=links), 30, 2, 8, seed=4)
    first, second, third = (np.sort(ids, axis=1) for ids in trace.experts.transpose(1, 0, 2))
    assert (np.sort((first + 1) % 8, axis=1) == second).all()
    assert (np.sort((second + 1) % 8, axis=1) == third).all()


def test_tastes_make_requests_differ(flat):
    alike, unlike = (
        describe(draw(replace(flat, taste=np.full(3, sd, np.float32)), 50, 0, 40)).reuse.same_request.mean()
        for sd in (0, 2)
    )
    assert alike == pytest.approx(0.25, abs=0.02)
    assert unlike > alike + 0.1


def test_blocks_do_not_change_what_is_drawn_from(flat, monkeypatch):
    model = replace(flat, recency=np.tile(gaps(60, 1), (2, 3, 1)))
    monkeypatch.setattr("moesim.trace.routing_model._CELLS", 100)
    kept = np.sort(draw(model, 11, 0, 6, seed=5).experts, axis=2).reshape(11, 6, 3, 2)
    assert (kept == kept[:, :1]).all()


def test_gate_weights_are_drawn_like_those_seen():
    trace = random_trace(4000, 2, 8, 2, seed=1, requests=20)
    first = np.random.default_rng(0).uniform(0.5, 1, (4000, 2)).astype(np.float16)
    trace = replace(trace, weights=np.stack([first, (1 - first).astype(np.float16)], axis=2))
    drawn = draw(fit(trace), 20, 0, 100)
    check(drawn, "drawn")
    assert drawn.weights.mean((0, 1)) == pytest.approx(trace.weights.mean((0, 1)), abs=0.02)
    assert drawn.weights.sum(2, dtype=np.float32).min() > 0.99


def test_a_phase_never_seen_is_named():
    seen = fit(random_trace(600, 2, 8, 2, seed=2, requests=6))
    assert seen.info.extra["unfitted_phase"] == "prefill"
    both = fit(random_trace(600, 2, 8, 2, seed=2, requests=6, prompt=20))
    assert "unfitted_phase" not in both.info.extra


def test_a_short_flat_trace_is_not_overfitted():
    """400 tokens are mostly noise; taking it for structure once made draws reuse experts twice as much."""
    trace = random_trace(400, 4, 8, 2, seed=0, requests=10, prompt=10)
    close(trace, fit(trace), reuse=0.15, hit=0.05)


def close(trace: Trace, model: RoutingModel, reuse: float = 0.05, hit: float = 0.03, unique: float = 0.03) -> None:
    """The trace and its requests drawn again agree: reuse and unique experts relatively, LRU hits in absolute."""
    rows = {row["statistic"]: row for row in compare(describe(trace), describe(redraw(model, trace, seed=9)))}
    for name, row in rows.items():
        if name.startswith("reuse"):
            assert row["ratio"] == pytest.approx(1, abs=reuse), name
        if name in ("lru_hit_25", "lru_hit_50", "lru_hit_75"):
            assert row["drawn"] == pytest.approx(row["original"], abs=hit), name
        if name.startswith("unique") or name in ("top_25_share", "entropy"):
            assert row["ratio"] == pytest.approx(1, abs=unique), name
        if name == "next_layer_recall":
            assert row["ratio"] == pytest.approx(1, abs=0.12), name


def test_fit_reproduces_the_shipped_trace(shipped):
    trace = read(shipped)
    model = fit(trace)
    close(trace, model)
    stats, again = describe(trace), describe(redraw(model, trace, seed=9))
    assert again.tasks.distance[0, 1:] == pytest.approx(stats.tasks.distance[0, 1:], abs=0.08)
    assert again.tasks.next_token_reuse == pytest.approx(stats.tasks.next_token_reuse, abs=0.05)
    assert draw(model, 2, 1, 1).info.source.startswith("drawn from a routing model fitted to real routing")


def test_fit_reproduces_recorded_gpt_oss_routing(public_data):
    path = public_data / "routing_gptoss20b" / "all_ids_nonrep.npz"
    whole = cut(import_trace("numpy", path, load_model("gpt-oss-20b"), phase="decode"), requests=120)
    six = replace(whole.info, moe_layers=whole.info.moe_layers[::4])
    trace = replace(whole, info=six, experts=np.ascontiguousarray(whole.experts[:, ::4]))
    close(trace, fit(trace))


@pytest.mark.parametrize("shape", [(8, 2, 4), (64, 8, 12), (16, 1, 3), (8, 2, 1)])
def test_parameters_come_out_as_asked(shape):
    model = from_parameters(*shape, skew=0.6, reuse=0.45, layer_correlation=0.5, tasks=("a", "b"), seed=3)
    trace = draw(model, 300, 0, 60, seed=4, tasks=["a"])
    check(trace, "drawn")
    stats = describe(trace)
    assert (stats.experts, stats.top_k, len(stats.moe_layers)) == shape
    assert stats.reuse.within[1].mean() == pytest.approx(0.45, abs=0.04)
    assert stats.skew.zipf.mean() == pytest.approx(0.6, abs=0.15)
    if stats.predictability:
        assert stats.predictability.from_layer.mean() == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer_correlation": 0.1}, "layer correlation 0.1 cannot be had together with the rest of skew 0.5"),
        ({"skew": 3}, "skew 3 gives one of 8 experts 84% of the choices, but top-2 routing gives one at most 50%"),
        ({"reuse": 1.5}, "reuse 1.5; must be 0 to 1"),
        ({"task_shift": -1}, "task shift -1; must be 0 to 1"),
    ],
)
def test_impossible_parameters_are_refused(given, message):
    with pytest.raises(TraceError, match=message):
        from_parameters(8, 2, 4, **given)


def test_impossible_shapes_and_counts_are_refused(flat):
    with pytest.raises(TraceError, match="top-8 of 8 experts"):
        from_parameters(8, 8, 4)
    for counts in ((0, 1, 1), (1, 0, 0), (1, -1, 5)):
        with pytest.raises(TraceError, match="draw at least one request of at least one token"):
            draw(flat, *counts)
    with pytest.raises(TraceError, match="GiB in memory"):
        draw(flat, 10**9, 10**6, 0)
    with pytest.raises(TraceError, match="unknown task 'code'; known: a, b"):
        draw(flat, 1, 1, 1, tasks=["code"])


def run(*arguments: object) -> str:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False).stdout


def test_stats_command(trace_file, tmp_path):
    assert "\nVerdict: cacheable: " in run("stats", trace_file)
    result = json.loads(run("stats", trace_file, "--json"))
    assert result["headline"]["lru_hit_50"] == pytest.approx(
        1 - np.mean([row[2] for row in result["lru"]["miss_ratio"]])
    )
    assert (result["provenance"], result["tasks"]["names"]) == ("real", ["a", "b"])
    run("stats", trace_file, "-o", tmp_path / "out.txt", "--plot", tmp_path / "page.html")
    assert "Verdict" in (tmp_path / "out.txt").read_text()
    assert "Misses by cache size" in (tmp_path / "page.html").read_text()


def test_synth_command(trace_file, tmp_path, capfd):
    out = tmp_path / "drawn.parquet"
    result = json.loads(
        run("synth", "--fit", trace_file, "--requests", 3, "--prompt-tokens", 2, "--output-tokens", 5, "--tasks", "b",
            "--compare", "--json", "-o", out)
    )  # fmt: skip
    assert (result["tokens"], result["provenance"]) == (21, "synthetic")
    assert result["comparison"][0]["statistic"] == "top_10_share"
    assert set(read(out).requests.task) == {"b"}
    assert "9 tokens of 3 requests, synthetic" in run(
        "synth", "--model", "mixtral-8x7b", "--requests", 3, "--prompt-tokens", 1, "--output-tokens", 2, "-o", out
    )
    assert read(out).info.model == load_model("mixtral-8x7b").name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --fit with a trace or --model"),
        (("--fit", "t", "--model", "m"), "give --fit with a trace or --model"),
        (("--fit", "t", "--layer-correlation", "0.5"), "--layer-correlation is for --model"),
        (("--model", "mixtral-8x7b", "--compare"), "--compare needs --fit"),
    ],
)
def test_contradictory_options_are_refused(arguments, message, tmp_path):
    with pytest.raises(TraceError, match=message):
        run("synth", *arguments, "-o", tmp_path / "out.parquet")


def test_the_fitted_trace_is_not_overwritten(trace_file):
    with pytest.raises(TraceError, match="is the trace to fit itself"):
        run("synth", "--fit", trace_file, "-o", trace_file)


def test_draws_follow_the_formula_wave_by_wave():
    """The module's formula in plain numpy, one (layer, token) at a time, with the same random numbers: bit for bit."""
    model = from_parameters(8, 2, 4, tasks=("a", "b"), seed=2)
    layers, experts = model.popularity.shape[2:]
    batch = Batch.of(np.array([1, 0, 1]), np.array([3, 0, 2]), np.array([5, 6, 0]))  # longest first
    rng = np.random.default_rng(5)
    taste = rng.standard_normal((layers, 3, experts), dtype=np.float32) * model.taste[:, None, None]
    expected = np.zeros((int(batch.length.sum()), layers, 2), dtype=np.int16)
    last_use = np.full((layers, 3, experts), -1000)
    for wave in range(int(batch.length[0]) + layers - 1):
        low, high = max(0, wave - int(batch.length[0]) + 1), min(layers, wave + 1)
        active = int((batch.length > wave - high + 1).sum())
        arrival = np.log(rng.standard_exponential((high - low, active, experts), dtype=np.float32))
        for layer in range(low, high):
            for r in np.flatnonzero(batch.length[:active] > wave - layer):
                token, task = wave - layer, batch.task[r]
                row = batch.start[r] + token
                score = model.popularity[DECODE if token >= batch.prompt[r] else PREFILL, task, layer] + taste[layer, r]
                score = score + model.recency[task, layer][np.searchsorted(GAPS, token - last_use[layer, r])]
                for below in expected[row, layer - 1] if layer else [experts] * 2:
                    score = score + model.transition[layer, below]
                picked = np.argsort(arrival[layer - low, r] - score)[:2]
                expected[row, layer], last_use[layer, r, picked] = picked, token
    assert (draw_ids(model, batch, np.random.default_rng(5)) == expected).all()


def test_choices_are_counted_by_layer():
    rng = np.random.default_rng(0)
    experts = rng.integers(-1, 6, size=(50, 3, 2)).astype(np.int16)
    rows = rng.integers(50, size=70)
    counts = count_choices(experts, rows, 6)
    for layer in range(3):
        chosen = experts[rows, layer]
        assert (counts[layer] == np.bincount(chosen[chosen >= 0], minlength=6)).all()
