"""What every policy must keep, built in or your own: `moesim policy check`, and functions for a test-suite.

    from moesim import contracts

    @pytest.mark.parametrize("contract", contracts.CONTRACTS)
    def test_my_policy(contract):
        contract(my_system)

A contract raises `Broken` where it does not hold and `DoesNotApply` where it has nothing to say.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from moesim.costs.fitted import costs_of
from moesim.costs.table import CostTable
from moesim.engine.own import own_predict, own_split
from moesim.engine.residency import DEMAND, H2D, LATE
from moesim.engine.serve import Limits
from moesim.engine.simulate import Outcome, Setting, calibration_popularity, simulate
from moesim.errors import MoesimError
from moesim.machine import Machine, load_machine
from moesim.model import Model, load_model
from moesim.systems.system import System
from moesim.trace import DECODE, PREFILL, Requests, Trace, TraceInfo
from moesim.transforms import apply_all
from moesim.workload import from_trace


class Broken(AssertionError):
    """A contract does not hold; says what was found."""


class DoesNotApply(Exception):
    """A contract has nothing to say about a system; says why."""


@dataclass(frozen=True, eq=False)
class Ground:
    """What a contract is tried on. slots: expert slots per layer; together: requests served at a time.

    engine: as of moesim.engine.simulate; auto is the one that a replay would take.
    """

    trace: Trace
    model: Model
    machine: Machine
    slots: int = 5
    together: int = 2
    engine: str = "auto"


@dataclass(frozen=True)
class Verdict:
    """held: None where the contract does not apply; detail: what was found, or why not."""

    contract: str
    what: str
    held: bool | None
    detail: str = ""


def small_ground(seed: int = 0) -> Ground:
    """Ten requests of two tasks, three MoE layers of 8 experts, two per token, with weights and probabilities."""
    rng = np.random.default_rng([seed, 0xC0])
    tokens, layers, experts, k, requests = 80, 3, 8, 2, 10
    taste = rng.dirichlet(np.full(experts, 0.5), (2, layers))  # what each task likes
    request = np.repeat(np.arange(requests), tokens // requests).astype(np.int32)
    odds = taste[request % 2] * rng.dirichlet(np.full(experts, 0.7), (tokens, layers)) + 1e-3
    odds /= odds.sum(axis=2, keepdims=True)
    chosen = np.argsort(-odds, axis=2, kind="stable")[:, :, :k]
    weights = np.take_along_axis(odds, chosen, axis=2)
    model = replace(
        load_model("mixtral-8x7b"), name="contract", layers=layers, moe_layers=tuple(range(layers)), hidden=512,
        expert_ffn=1024, heads=4, kv_heads=2, head_dim=64, vocab=1000,
    )  # fmt: skip
    position = np.tile(np.arange(tokens // requests), requests).astype(np.int32)
    trace = Trace(
        info=TraceInfo("contract", experts, k, model.moe_layers, provenance="synthetic"),
        requests=Requests(
            tuple(f"r{i}" for i in range(requests)),
            tuple("ab"[i % 2] for i in range(requests)),
            np.full(requests, 3, dtype=np.int32),
        ),
        experts=chosen.astype(np.int16),
        request=request,
        phase=np.where(position < 3, PREFILL, DECODE).astype(np.uint8),
        position=position,
        weights=(weights / weights.sum(axis=2, keepdims=True)).astype(np.float16),
        probabilities=odds.astype(np.float16),
    )
    return Ground(trace, model, load_machine("rtx-4090"))


def _setting(system: System, ground: Ground, slots: int, together: int, seed: int = 0) -> Setting:
    served = apply_all(system.transforms, ground.model, ground.trace, seed)
    bits = system.expert_bits
    model = served.model if bits is None else served.model.with_precision(expert_bits=bits)
    costs = costs_of(ground.machine, graph=system.graph, repacked=system.repacked, native=system.native)
    table = CostTable(model, ground.machine, costs, not system.all_resident, system.kernel)
    least = 2 if system.misses.rule == "precision" else 1  # one copy of each precision is the least it works with
    slots = min(max(slots, least), model.experts)
    one_each = sum(table.expert_bytes(layer) for layer in range(served.trace.layers))
    limits = Limits(clients=1 << 30, sequences=together, batch_tokens=8192, chunk=0, kv_bytes=1 << 60)
    return Setting(
        served.trace, table, from_trace(served.trace), limits,
        expert_bytes=slots * one_each, shared_bytes=0, host_bytes=0, seed=seed,
    )  # fmt: skip


def _serve(system: System, ground: Ground, slots: int | None = None) -> tuple[Setting, Outcome]:
    setting = _setting(system, ground, ground.slots if slots is None else slots, ground.together)
    return setting, simulate(setting, system, detail=True, engine=ground.engine)


def _require(held: bool, found: str) -> None:
    if not held:
        raise Broken(found)


def conservation(system: System, ground: Ground | None = None) -> None:
    """Every token of every request is served once; every lookup is a hit, late or a miss; all time is accounted for."""
    ground = ground or small_ground()
    setting, out = _serve(system, ground)
    steps, counts = out.records.steps, out.counts
    served = int(steps.column("prefill_tokens").sum() + steps.column("decode_tokens").sum())
    _require(served == setting.trace.tokens, f"{served} tokens were served, the trace has {setting.trace.tokens}")
    requests = sorted(out.records.requests.column("request").tolist())
    _require(requests == list(range(len(setting.trace.requests))), f"requests {requests} were finished")
    total = counts.hits + counts.lates + counts.misses
    _require(total == counts.lookups, f"{counts.lookups} lookups gave {total} hits, lates and misses")
    spent = sum(counts.spent.values()) + out.idle_ns
    _require(spent == out.elapsed_ns, f"{spent} ns are accounted for, {out.elapsed_ns} ns went by")


def fidelity(system: System, ground: Ground | None = None) -> None:
    """No more routed weight is altered, before or in serving, than was routed in any layer for any task."""
    ground = ground or small_ground()
    done = apply_all(system.transforms, ground.model, ground.trace, 0)
    _require(np.array_equal(done.trace.request, ground.trace.request), "a transform must keep every row of the trace")
    cells, shares = (ground.trace.layers, len(ground.trace.tasks)), list(done.altered.values())
    shaped = all(share.shape == cells and (share >= 0).all() for share in shares)
    _require(shaped and bool(np.all(sum(shares) <= 1 + 1e-9)), f"altered shares must be parts of one, {cells} of them")
    setting, out = _serve(system, ground)
    trace = setting.trace
    for layer in range(trace.layers):
        weights = trace.routed_weight(layer).sum(axis=1)
        routed = np.bincount(trace.task_of_row, weights, minlength=len(trace.tasks))
        altered = out.counts.altered.sum(axis=0)[layer]
        _require(bool((altered <= routed).all()), f"layer {layer}: {altered} of {routed} parts were altered")


def residency(system: System, ground: Ground | None = None) -> None:
    """What is on the device never takes more than the memory for experts."""
    ground = ground or small_ground()
    if system.all_resident:
        raise DoesNotApply("every expert has a place of its own")
    for slots in sorted({1, 2, ground.slots}):
        setting, out = _serve(system, ground, slots)
        peak, room = out.peak_resident_bytes, setting.expert_bytes
        _require(peak <= room, f"{slots} slots per layer: {peak} bytes were resident, {room} is the limit")


def evicts_only_idle(system: System, ground: Ground | None = None) -> None:
    """No pinned expert leaves, and none in use: what a layer's step was brought once is not brought again for it."""
    ground = ground or small_ground()
    for slots in (1, ground.slots):
        setting, out = _serve(system, ground, slots)
        moved, layers = out.records.transfers, out.records.layers
        copied = moved.column("link") == H2D
        asked = copied & np.isin(moved.column("kind"), (DEMAND, LATE))
        pieces = setting.table.matrices if system.transfer.unit == "matrix" else 1
        for layer, pinned in enumerate(_pinned(system, setting)):
            here = moved.column("layer") == layer
            back = pinned & set(moved.column("expert")[copied & here].tolist())
            _require(not back, f"layer {layer}: experts {back} are pinned, and yet had to be brought again")
            mine = asked & here
            starts, experts = layers.column("start")[layers.column("layer") == layer], moved.column("expert")[mine]
            event = np.searchsorted(starts, moved.column("end")[mine], side="right")
            pairs = Counter(zip(event.tolist(), experts.tolist(), strict=True))
            twice = next((pair for pair, count in pairs.items() if count > pieces), None)
            _require(twice is None, f"layer {layer}: an expert was brought twice for one step: (step, id) {twice}")


def _pinned(system: System, setting: Setting) -> list[set[int]]:
    """The experts of each layer that were placed for good; none where a policy's own code placed them."""
    popularity = calibration_popularity(setting.trace)
    if not system.placement.pinned or system.placement.own is not None or system.all_resident:
        return [set() for _ in popularity]
    one = [setting.table.expert_bytes(layer) for layer in range(len(popularity))]
    sizes = own_split(system.capacity, setting.expert_bytes, one, popularity.shape[1])
    order = np.argsort(-popularity, axis=1, kind="stable").tolist()
    return [set(best[: size // each]) for best, size, each in zip(order, sizes, one, strict=True)]


def same_bytes_twice(system: System, ground: Ground | None = None) -> None:
    """The same inputs give the same records, bit for bit."""
    ground = ground or small_ground()
    (_, one), (_, two) = _serve(system, ground), _serve(system, ground)
    _require(one.counts == two.counts, "two runs of the same question count differently")
    for name in ("steps", "layers", "transfers", "requests", "kernels"):
        a, b = getattr(one.records, name), getattr(two.records, name)
        same = all(np.array_equal(a.column(c), b.column(c)) for c in a.columns)
        _require(same, f"two runs of the same question differ in their {name}; draw random numbers from the seed")


def progress_with_one_slot(system: System, ground: Ground | None = None) -> None:
    """One expert slot per layer (one of each precision) is enough to serve every request."""
    ground = ground or small_ground()
    if system.all_resident:
        raise DoesNotApply("every expert has a slot of its own")
    setting, out = _serve(system, ground, 1)
    left = len(setting.trace.requests) - len(out.records.requests)
    _require(left == 0, f"{left} requests were never finished")


def all_resident_never_stalls(system: System, ground: Ground | None = None) -> None:
    """With a slot for every expert, and all of them there from the start, nothing is waited for."""
    ground = ground or small_ground()
    if not system.cache:
        raise DoesNotApply("it keeps no experts")
    if system.misses.rule == "precision":
        raise DoesNotApply("part of its memory is kept for low-precision copies")
    full = (
        system if system.all_resident else replace(system, placement=replace(system.placement, start="all", own=None))
    )
    setting, out = _serve(full, ground, ground.model.experts + len(ground.trace.requests))
    if not system.all_resident and out.counts.evictions == 0 and out.peak_resident_bytes < setting.expert_bytes:
        raise DoesNotApply("its capacity rule leaves part of the memory empty")
    waited = {cause: out.counts.spent[cause] for cause in ("pcie", "nvme", "host")}
    _require(not any(waited.values()), f"all experts fit and yet the GPU waited, in ns: {waited}")


def causality(system: System, ground: Ground | None = None) -> None:
    """A belief rests on the past alone: changing later tokens and later layers of a trace changes no earlier belief."""
    ground = ground or small_ground()
    provenance = getattr(system.predictor, "provenance", "own")
    if provenance in ("none", "oracle", "assumed"):
        why = {"none": "it predicts nothing", "oracle": "it looks ahead, and says so"}
        raise DoesNotApply(why.get(provenance, "its accuracy is stated: it is drawn from the answer"))
    trace = apply_all(system.transforms, ground.model, ground.trace, 0).trace
    before = own_predict(system.fresh().predictor, trace, 0)
    rng = np.random.default_rng(0)
    rows = sorted({1, trace.tokens // 3, trace.tokens // 2, trace.tokens - 2})
    for row, layer in [(row, layer) for row in rows for layer in (0, int(rng.integers(trace.layers)))]:
        after = own_predict(system.fresh().predictor, _with_other_future(trace, row, layer, rng), 0)
        _require(len(before) == len(after), "the number of beliefs depends on the future")
        for old, new in zip(before, after, strict=True):
            known = trace.layers if old.distance == 0 else min(layer + old.distance, trace.layers)
            where = f"what was believed before row {row}, layer {layer} was routed changes with what is routed then"
            same = np.array_equal(old.experts[:row], new.experts[:row])
            _require(same and np.array_equal(old.experts[row, :known], new.experts[row, :known]), where)
            if old.map is not None and new.map is not None:
                _require(np.array_equal(old.map[:row], new.map[:row]), where)


def _with_other_future(trace: Trace, row: int, layer: int, rng: np.random.Generator) -> Trace:
    """The trace with other routing from (row, layer) on: experts renamed at random, weights and odds with them."""
    experts, probabilities = trace.experts.copy(), trace.probabilities
    probabilities = None if probabilities is None else probabilities.copy()
    for at in range(trace.layers):
        first = row if at >= layer else row + 1
        name = rng.permutation(trace.info.experts).astype(np.int16)
        later = experts[first:, at]
        experts[first:, at] = np.where(later >= 0, name[later], -1)
        if probabilities is not None:
            probabilities[first:, at] = probabilities[first:, at][:, np.argsort(name)]
    return replace(trace, experts=experts, probabilities=probabilities)


CONTRACTS: tuple[Callable[..., None], ...] = (
    conservation, fidelity, residency, evicts_only_idle, same_bytes_twice, progress_with_one_slot,
    all_resident_never_stalls, causality,
)  # fmt: skip


def check(system: System, ground: Ground | None = None) -> Iterator[Verdict]:
    """Every contract tried on `system`, one verdict each; a mistake in a policy's own code breaks the contract."""
    ground = ground or small_ground()
    told: dict[str, str] = {}
    for contract in CONTRACTS:
        name, what = contract.__name__.replace("_", "-"), (contract.__doc__ or "").strip()
        try:
            contract(system, ground)
            yield Verdict(name, what, True)
        except DoesNotApply as reason:
            yield Verdict(name, what, None, str(reason))
        except (Broken, MoesimError) as found:
            first = told.setdefault(str(found), name)
            yield Verdict(name, what, False, str(found) if first == name else f"as {first}")
