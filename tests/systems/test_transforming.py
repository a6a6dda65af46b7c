"""Systems that change the model or its routing before serving: SiDA, MC, EEP, SEER-MoE, MEO, TSEP."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs.roofline import Roofline
from moesim.costs.table import CostTable
from moesim.errors import MoesimError, PolicyError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.page import format_run
from moesim.prediction import Oracle
from moesim.question import Question, Scene, run
from moesim.systems import SYSTEMS, load_system, with_setting
from moesim.transforms import MixedBits, Prune
from tests.conftest import small_trace
from tests.fakes import make_trace
from tests.scenes import serve

TRANSFORMING = (
    "SiDA", "sida(variant='code')", "SiDA(top_k=3)", "Samoyeds", "MC", "MC(bits=1.57, odp=True)", "EEP",
    "EEP(experts=2, merge=True)", "EEP(top_k=1)", "seer-moe(experts=4)", "SEER-MoE(by='count', top_k=1)", "MEO",
    "MEO(level='task', k=2)", "TSEP",
)  # fmt: skip


@pytest.fixture
def ask(small_config):
    """run(policy, **question) on the small trace and model, weights and probabilities included."""

    def answer(policy, trace=None, anchors=False, settings=(), **question):
        question = {"model": str(small_config), "slots_per_layer": 4} | question
        return run(trace or small_trace(weights=True), policy, Question(**question), settings, anchors)

    return answer


@pytest.mark.parametrize("policy", TRANSFORMING)
def test_every_request_is_served_and_the_altered_weight_is_told(ask, policy):
    s = ask(policy).summary
    m, fidelity = s["metrics"], s["routing_fidelity"]
    assert m["completed"] == 6 and m["total_output_tokens"] == 6 * 31 and m["total_input_tokens"] == 60
    assert m["hits"] + m["lates"] + m["misses"] == m["lookups"]
    rows = [fidelity["overall"], *fidelity["by_task"].values()]
    assert all(sum(row.values()) == pytest.approx(1) for row in rows) and fidelity["overall"]["exact"] < 1
    assert sum(np.array(shares) for shares in fidelity["by_layer"].values()) == pytest.approx(np.ones(3))
    assert any("quality is not modelled" in note for note in s["notes"])
    assert s["inputs"]["model"]["experts"] == 8, "inputs name the model as it comes"
    assert "routing" in format_run(ask(policy))


def test_anchors_are_those_of_the_model_as_it_comes(ask):
    pruned, plain = ask("EEP(experts=2)", anchors=True).summary, ask("LRU", anchors=True).summary
    for name in ("all_resident", "no_cache", "lru", "oracle"):
        assert pruned["anchors"][name] == plain["anchors"][name]
    assert pruned["anchors"]["of_sample"]["requests"] == plain["anchors"]["of_sample"]["requests"]


def test_transforms_combine_with_any_other_choice(ask):
    s = ask("LRU", settings=["transforms=EEP(experts=4)", "predictor=transitions"]).summary
    assert s["inputs"]["system"]["transforms"][0]["kind"] == "Prune"
    assert s["metrics"]["misses"] == 12, "4 experts of 3 layers fit the 4 slots: each is loaded once"
    assert with_setting(load_system("EEP"), "transforms=none").transforms == ()
    both = replace(load_system("LRU"), transforms=(Prune(4), MixedBits(2.5)))
    assert ask(both).summary["routing_fidelity"]["overall"]["lower_precision"] == 1


def test_predictors_learn_on_the_transformed_trace(ask, small_config):
    seen = []

    class Spy(Oracle):
        def predict(self, trace, seed):
            seen.append(trace.info.experts)
            return super().predict(trace, seed)

    ask(replace(load_system("LRU"), transforms=(Prune(4),), predictor=Spy()))
    assert seen == [4]


def test_expert_bits_count_as_lower_precision(ask):
    fidelity = ask("LRU", settings=["expert_bits=4"]).summary["routing_fidelity"]["overall"]
    assert fidelity["lower_precision"] == 1 and fidelity["exact"] == 0
    assert ask("LRU", settings=["expert_bits=16"]).summary["routing_fidelity"]["overall"]["exact"] == 1


# -- bytes per expert ---------------------------------------------------------------------------------------------


def test_each_expert_is_copied_at_its_own_size(ask):
    """On demand, one request, decode only: every choice of every token crosses the link once."""
    base = small_trace(weights=True)
    ids = base.experts[:20]
    trace = replace(make_trace(ids, 8), info=replace(base.info), weights=base.weights[:20])
    system = replace(load_system("on-demand"), transforms=(MixedBits(2.5),))
    result = ask(system, trace=trace, slots_per_layer=None)
    scene = Scene(trace, Question(model=result.summary["inputs"]["arguments"]["model"])).under(system)
    sizes = scene.model.expert_sizes
    moved = sum(sizes[layer][e] for token in ids for layer, chosen in enumerate(token) for e in chosen)
    assert result.summary["metrics"]["h2d_bytes"] == moved
    assert len({size for row in sizes for size in row}) > 1


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_slots_hold_the_largest_expert(ask, slots):
    s = ask("LRU", settings=["transforms=MC"], slots_per_layer=slots).summary
    assert s["metrics"]["completed"] == 6
    assert s["memory"]["peak_resident_expert_bytes"] <= s["memory"]["expert_bytes"]
    if slots == 8:
        assert s["metrics"]["evictions"] == 0


# -- MC, EEP ------------------------------------------------------------------------------------------------------


def test_mc_needs_one_of_the_papers_bits_and_weights_for_odp(ask):
    with pytest.raises(PolicyError, match=r"2\.54"):
        load_system("MC(bits=3)")
    with pytest.raises(PolicyError, match="leave odp out"):
        ask("MC(odp=True)", trace=small_trace())
    assert ask("MC", trace=small_trace()).summary["metrics"]["completed"] == 6


def _decode_ms(experts, top_k, batch):
    """One decode step of Mixtral-8x7B on an A100, `batch` sequences of 512 tokens, all experts resident."""
    model = load_model("mixtral-8x7b")
    machine = load_machine("a100-80gb-sxm")
    table = CostTable(replace(model, experts=experts), machine, Roofline(machine), offloaded=False)
    active = min(experts, top_k * batch)
    return (
        table.step_ns(batch, batch)
        + sum(table.layers_ns([], [512] * batch))
        + 32 * table.grouped_ns(active, top_k * batch)
    )


def test_eep_pays_at_batch_32_and_hardly_at_batch_1():
    """EEP, table 10, decode: 1.05 at batch 1 (2 experts are read either way), 1.60 at 32, 1.29 at 256."""
    speed_up = {batch: _decode_ms(8, 2, batch) / _decode_ms(4, 2, batch) for batch in (1, 32, 256)}
    assert speed_up[1] == pytest.approx(1.05, abs=0.06)
    assert 1.3 < speed_up[32] < 2.0
    assert speed_up[1] < speed_up[256] < speed_up[32]
    fewer = {batch: _decode_ms(8, 2, batch) / _decode_ms(8, 1, batch) for batch in (1, 32)}
    assert fewer[1] > 1.2 and fewer[32] < 1.15, "top-1: 1.34 at batch 1, 1.06 at 32"


# -- MEO, TSEP ----------------------------------------------------------------------------------------------------


def test_meo_refuses_more_sequences_than_it_has_buffers_for(ask):
    assert ask("MEO(sequences=2)", max_concurrency=2).summary["metrics"]["completed"] == 6
    with pytest.raises(PolicyError, match="2 sequences, but 3"):
        ask("MEO(sequences=2)", max_concurrency=3)


def test_meo_reads_k_experts_once_and_one_from_then_on(ask):
    """6 requests x 3 layers: 4 experts and their sum in the prompt's step, the sum in each of 31 - 1 decode steps."""
    s = ask("MEO(k=4)").summary
    steps = s["metrics"]["lookups"] / (6 * 3)
    assert steps == 5 + 30
    one = s["memory"]["expert_bytes"] / (8 + 6) / 3
    assert one == load_model(s["inputs"]["arguments"]["model"]).expert_bytes(), "8 experts and a buffer per request"


def test_tsep_switches_models_through_a_cache(ask):
    """Requests alternate between tasks a and b: with one slot per layer every request loads its task's 3 experts."""
    s = ask("LRU", settings=["transforms=TSEP"], slots_per_layer=1).summary
    assert s["metrics"]["misses"] == 6 * 3
    assert ask("LRU", settings=["transforms=TSEP"], slots_per_layer=2).summary["metrics"]["misses"] == 2 * 3


# -- SiDA ---------------------------------------------------------------------------------------------------------


def test_sida_never_stalls_for_a_wrong_prediction():
    """What the hash names is what is executed: the same copies and times, whatever share of it is right."""
    trace = make_trace([[[0], [1]], [[2], [3]], [[0], [1]]], 4)
    engine = replace(load_system("SiDA"), transforms=())
    outcome = serve(trace, engine, slots=4)
    assert outcome.counts.misses == 0 and outcome.counts.lates == 4 and outcome.counts.hits == 2
    assert outcome.counts.prefetched_bytes == outcome.counts.prefetch_used_bytes


def test_sidas_released_code_moves_everything_before_the_batch():
    """Mixer 100, expert 10, copy 1000 per layer. Paper: layer 0 waits 900, layer 1 is copied meanwhile.

    paper: 1000 + 10 (layer 0), 2000 + 10 (layer 1). code: 2000 at once, then 2 x (100 + 10).
    """
    trace = make_trace([[[0], [1]]], 4)
    paper = serve(trace, replace(load_system("SiDA"), transforms=()), slots=4)
    code = serve(trace, replace(load_system("SiDA(variant='code')"), transforms=()), slots=4)
    assert (paper.elapsed_ns, code.elapsed_ns) == (2010, 2220)
    assert code.counts.hits == 2 and code.counts.lates == 0 and code.counts.spent["pcie"] == 2000


def test_sida_evicts_first_in_first_out_over_all_layers():
    """Two slots in all; four experts in turn: each new one takes the place of the oldest."""
    trace = make_trace([[[0], [0]], [[1], [1]], [[0], [0]]], 4)
    outcome = serve(trace, replace(load_system("SiDA"), transforms=()), slots=1)
    assert outcome.counts.evictions == 4 and outcome.counts.hits == 0


def test_sida_variants_are_checked():
    with pytest.raises(PolicyError, match="paper"):
        load_system("SiDA(variant='paper2')")
    with pytest.raises(MoesimError, match="hash top_k"):
        load_system("SiDA(top_k=0)")


def test_names_ignore_case():
    for name in ("sida", "SAMOYEDS", "mc", "eep", "Seer-Moe", "meo", "tsep"):
        assert load_system(name).source
    assert np.all([name in SYSTEMS for name in ("SiDA", "Samoyeds", "MC", "EEP", "SEER-MoE", "MEO", "TSEP")])
