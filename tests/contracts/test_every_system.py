"""What every policy must keep, for every system there is, on a drawn trace and on real routing."""

from __future__ import annotations

import inspect
import random
from dataclasses import replace

import pytest

from moesim import contracts
from moesim.contracts import CONTRACTS, Broken, DoesNotApply, Ground, check, small_ground
from moesim.engine import simulate
from moesim.errors import MoesimError
from moesim.machine import load_machine
from moesim.model import load_model
from moesim.policies import Misses, Placement
from moesim.prediction import Beliefs, Transitions
from moesim.systems import SYSTEMS, System, load_system
from moesim.trace.cut import cut
from moesim.trace.importers import import_trace
from moesim.trace.io import read
from moesim.trace.synth import draw, from_parameters
from moesim.transforms.transform import Transformed, nothing

# All that the field knows them by: a name that is missing or changed breaks users' scripts.
NAMES = (
    "SiDA", "Samoyeds", "HEXA-MoE", "eMoE", "fMoE", "HOBBIT", "MC", "AdapMoE", "EEP", "SEER-MoE", "MEO", "TSEP",
    "on-demand", "DeepSpeed", "static", "LRU", "LFU", "FIFO", "Belady", "Mixtral-Offloading", "Pre-gated",
    "MoE-Infinity", "ProMoE", "Fiddler", "KTransformers", "ExpertFlow", "EPLB", "all-resident",
)  # fmt: skip
VARIANTS = (
    "SiDA(variant='code')", "HOBBIT(variant='cooperative')", "MoE-Infinity(eviction='code')", "MC(odp=True)",
    "KTransformers(gpu_experts=2, defer=1)", "AdapMoE(gating=True)", "MEO(level='task')", "eMoE(variant='L', period=2)",
    "Belady-window(window=2)", "LRU(scope='global')", "EEP(merge=True)",
)  # fmt: skip
GROUND = small_ground()


def hold(system: System, ground: Ground) -> None:
    broken = [f"{v.contract}: {v.detail}" for v in check(system, ground) if v.held is False]
    assert not broken, broken


def test_every_name_of_the_field_is_known():
    assert {name.lower() for name in NAMES} <= {name.lower() for name in SYSTEMS}


ENGINES = ("events", "compiled")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*SYSTEMS, *VARIANTS])
def test_every_system_keeps_the_contracts(name, engine):
    hold(load_system(name), replace(GROUND, engine=engine))


def ground(trace, model, tokens):
    """The first tokens of a trace, on a machine."""
    first = cut(trace, first_tokens=tokens)
    return Ground(first, model, load_machine("rtx-4090"), slots=trace.info.experts // 3)


@pytest.fixture(scope="module")
def shipped_ground(shipped):
    trace = read(shipped)
    return ground(trace, load_model(trace.info.model), 80)


@pytest.fixture(scope="module")
def gpt_oss_ground(public_data):
    model = load_model("gpt-oss-20b")
    path = public_data / "routing_gptoss20b" / "all_ids_nonrep.npz"
    return ground(import_trace("numpy", path, model, phase="decode"), model, 10)


@pytest.fixture(scope="module")
def mixtral_ground():
    model = load_model("mixtral-8x7b")
    routing = from_parameters(8, 2, 32, model=model.name, moe_layers=model.moe_layers, tasks=("a", "b"))
    return ground(draw(routing, 3, 2, 2, seed=1), model, 12)


@pytest.fixture(scope="module")
def bare_ground():
    """Expert ids and nothing else."""
    trace = replace(GROUND.trace, weights=None, probabilities=None)
    return replace(GROUND, trace=replace(trace, requests=replace(trace.requests, task=("",) * len(trace.requests))))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("on", ["bare", "shipped", "gpt_oss", "mixtral"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_serves_real_and_drawn_routing(name, on, engine, request):
    hold(load_system(name), replace(request.getfixturevalue(f"{on}_ground"), engine=engine))


def test_both_engines_are_meant():
    """A contract is tried on the engine that its ground names, not on what `auto` would take."""
    assert set(ENGINES) | {"auto"} == set(simulate.ENGINES)
    for engine in ENGINES:
        _, outcome = contracts._serve(load_system("LRU"), replace(GROUND, engine=engine))
        assert outcome.engine == engine


WRONG = ("None", "-1", "0", "1000000000", "1e300", "1.5", "'x'", "()", "(1,)", "[]", "True")


@pytest.mark.parametrize("name", SYSTEMS)
def test_arguments_of_any_kind_and_size_are_refused_or_served(name):
    for parameter in inspect.signature(SYSTEMS[name]).parameters:
        for value in WRONG:
            try:
                contracts.conservation(load_system(f"{name}({parameter}={value})"), GROUND)
            except MoesimError as refused:
                assert "\n" not in str(refused)


# -- the contracts themselves can be broken ------------------------------------------------------------------------


def lru(**parts):
    return replace(load_system("LRU"), **parts)


class Peeks:
    def predict(self, trace, seed):
        return Beliefs(trace.experts, distance=1)


class PeeksWithinTheToken:
    """Believes at the start of a step what the step's first layer will choose."""

    def predict(self, trace, seed):
        named = trace.experts.copy()
        named[:, 1:] = named[:, :1]
        named[:, 0] = -1
        return Beliefs(named, distance=0)


class Dice:
    def score(self, expert):
        return random.random()


class Forgetful:
    """Holds back half of the memory, which leaves some layers nothing."""

    def split(self, total, expert_bytes, experts):
        return [0] * len(expert_bytes)


class Overdone:
    """Says that it altered more weight than there is."""

    def apply(self, model, trace, seed):
        shares = {kind: share + 0.5 for kind, share in nothing(trace).items()}
        return Transformed(model, trace, shares)


@pytest.mark.parametrize(
    ("contract", "system"),
    [
        (contracts.fidelity, lru(transforms=(Overdone(),))),
        (contracts.causality, lru(predictor=Peeks())),
        (contracts.causality, lru(predictor=PeeksWithinTheToken())),
        (contracts.same_bytes_twice, lru(eviction=Dice())),
    ],
)
def test_a_policy_that_breaks_a_contract_is_found(contract, system):
    with pytest.raises(Broken):
        contract(system, GROUND)


def test_a_policy_that_cannot_go_on_is_found():
    found = {v.contract: v for v in check(lru(capacity=Forgetful()), GROUND)}
    assert found["progress-with-one-slot"].held is False
    assert "waiting for a slot" in found["conservation"].detail


def test_an_engine_that_evicts_what_is_pinned_or_in_use_is_found(monkeypatch):
    from moesim.engine.cache import Pool

    def any_victim(self, guarded=False):
        return next((e for e in self.entries.values() if e.landed and not e.busy), None)

    monkeypatch.setattr(Pool, "victim", any_victim)
    placed = Placement("hot", pinned=True)
    pinned = System("x", misses=Misses("reroute"), placement=placed, predictor=Transitions(block=4))
    with pytest.raises(Broken, match="pinned"):
        contracts.evicts_only_idle(pinned, replace(GROUND, engine="events"))


def test_contracts_say_when_they_have_nothing_to_say():
    with pytest.raises(DoesNotApply, match="looks ahead"):
        contracts.causality(load_system("oracle"))
    assert len(CONTRACTS) == len(list(check(load_system("EPLB"), GROUND)))
