"""Which GPU holds which experts, so that their loads are alike. Slots are numbered GPU after GPU."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError
from moesim.policies.parallel import Parallel

Loads = NDArray[np.float64]  # [layers, experts]
Slots = NDArray[np.int64]  # [layers, slots]: the expert in each; GPU g has slots g * n to (g + 1) * n

MAX_EXACT = 10_000  # (expert, GPU) pairs of a layer that an integer program decides


def contiguous(layers: int, experts: int) -> Slots:
    """Expert e in slot e."""
    return np.tile(np.arange(experts), (layers, 1))


def balanced(load: Loads, slots: int, gpus: int, nodes: int = 1, groups: int = 1) -> Slots:
    """DeepSeek's load balancer (github.com/deepseek-ai/EPLB): pack groups of experts on nodes, replicate the most
    loaded experts of each node, pack the replicas on its GPUs.

    groups: of experts that are routed together (DeepSeek-V3 has 8); they stay together where nodes divide them.
    """
    layers, experts = load.shape
    if groups % nodes:
        groups = nodes = 1
    if slots % gpus or gpus % nodes or experts % groups or slots < experts:
        raise PolicyError(
            f"{slots} slots for {experts} experts in {groups} groups do not divide over {gpus} GPUs of {nodes} nodes"
        )
    size = experts // groups
    out = np.empty((layers, slots), dtype=np.int64)
    for layer in range(layers):
        of_groups = load[layer].reshape(groups, size).sum(axis=1)
        packed = _pack(of_groups, nodes)
        for node in range(nodes):
            own = np.concatenate([np.arange(g * size, (g + 1) * size) for g in packed[node]])
            held = _replicated(load[layer, own], slots // nodes)
            share = load[layer, own][held] / np.bincount(held)[held]
            order = np.concatenate(_pack(share, gpus // nodes))
            begin = node * (slots // nodes)
            out[layer, begin : begin + slots // nodes] = own[held[order]]
    return out


def _pack(weights: Loads, packs: int) -> list[list[int]]:
    """As many items in each pack: the heaviest first, each into the lightest pack that has room."""
    room = len(weights) // packs
    members: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in np.argsort(-weights, kind="stable").tolist():
        pack = min((p for p in range(packs) if len(members[p]) < room), key=lambda p: total[p])
        members[pack].append(item)
        total[pack] += float(weights[item])
    return members


def _replicated(load: Loads, slots: int) -> NDArray[np.int64]:
    """The expert in each slot: every one once, then again and again the one with most load per replica."""
    held, count = list(range(len(load))), np.ones(len(load))
    for _ in range(slots - len(load)):
        busiest = int(np.argmax(load / count))
        held.append(busiest)
        count[busiest] += 1
    return np.array(held)


def first_slots(parallel: Parallel, load: Loads, gpus: int) -> Slots:
    """Where `parallel` places whole experts before the first pass, by `load`."""
    layers, experts = load.shape
    slots = parallel.slots(experts, gpus)
    match parallel.placement:
        case "balanced":
            return balanced(load, slots, gpus)
        case "exact":
            return exact(load, gpus)[0]
        case "given":
            return np.array(parallel.layout, dtype=np.int64)
    return contiguous(layers, experts)


def exact(load: Loads, gpus: int) -> tuple[Slots, NDArray[np.float64]]:
    """The placement without replicas whose busiest GPU has the least load, layer by layer, as many experts on each.

    Also the lower bound of that load per layer that the program proved. Raises PolicyError above MAX_EXACT pairs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    layers, experts = load.shape
    if experts * gpus > MAX_EXACT:
        raise PolicyError(
            f"parallel.placement=exact: {experts} experts on {gpus} GPUs are more than the {MAX_EXACT} pairs an "
            "integer program decides in time; set parallel.placement=balanced"
        )
    pairs = experts * gpus  # variable e * gpus + g: expert e is on GPU g; the last one is the busiest GPU's load
    e, g = np.divmod(np.arange(pairs), gpus)
    once = coo_array((np.ones(pairs), (e, np.arange(pairs))), shape=(experts, pairs + 1)).tocsr()
    alike = coo_array((np.ones(pairs), (g, np.arange(pairs))), shape=(gpus, pairs + 1)).tocsr()
    out, bounds = np.empty((layers, experts), dtype=np.int64), np.empty(layers)
    for layer in range(layers):
        scale = load[layer].sum() or 1.0
        rows = np.r_[g, np.arange(gpus)]
        columns = np.r_[np.arange(pairs), np.full(gpus, pairs)]
        loads = coo_array((np.r_[load[layer, e] / scale, np.full(gpus, -1.0)], (rows, columns)))
        found = milp(
            np.r_[np.zeros(pairs), 1.0],
            integrality=np.r_[np.ones(pairs), 0],
            bounds=Bounds(0, np.r_[np.ones(pairs), np.inf]),
            constraints=[
                LinearConstraint(once, 1, 1),
                LinearConstraint(alike, experts // gpus, experts // gpus),
                LinearConstraint(loads.tocsr(), -np.inf, 0),
            ],
            options={"mip_rel_gap": 1e-3, "time_limit": 0.5},
        )
        if found.x is None:
            raise PolicyError(f"parallel.placement=exact: {experts} experts do not spread evenly over {gpus} GPUs")
        on = found.x[:-1].reshape(experts, gpus).argmax(axis=1)
        out[layer] = np.argsort(on, kind="stable")
        bounds[layer] = found.mip_dual_bound * scale
    return out, bounds


class Layout:
    """Experts on GPUs, ready to be asked who computes what."""

    def __init__(self, slots: Slots, gpus: int, experts: int) -> None:
        self.slots, self.gpus = slots, gpus
        self._replicas, self._which = _replicas(slots, experts)

    def loads(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of `counts` [layers, experts] (token, expert) pairs: each GPU's, and its active experts [layers, gpus].

        Tokens of a replicated expert are spread evenly, the first replicas taking one more.
        """
        own = np.take_along_axis(counts, self.slots, axis=1)
        pairs = own // self._replicas + (self._which < own % self._replicas)
        by_gpu = pairs.reshape(len(counts), self.gpus, -1)
        return by_gpu.sum(axis=2), np.count_nonzero(by_gpu, axis=2)

    def moved(self, later: Layout) -> int:
        """Experts that the GPU which gets most must receive to become `later`."""
        layers, experts = len(self.slots), int(self.slots.max()) + 1
        here, there = self._held(experts), later._held(experts)
        return int((there & ~here).reshape(layers, self.gpus, experts).sum(axis=(0, 2)).max())

    def _held(self, experts: int) -> NDArray[np.bool_]:
        layers, total = self.slots.shape
        held = np.zeros((layers, self.gpus, experts), dtype=bool)
        gpu = np.arange(total) // (total // self.gpus)
        held[np.arange(layers)[:, None], gpu, self.slots] = True
        return held


def _replicas(slots: Slots, experts: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Per slot: of how many replicas of its expert it is one, and which."""
    layers, total = slots.shape
    flat = slots + experts * np.arange(layers)[:, None]
    count = np.bincount(flat.ravel(), minlength=layers * experts)
    order = np.argsort(flat, axis=1, kind="stable")
    ordered = np.take_along_axis(flat, order, axis=1)
    first = np.r_[0, np.cumsum(count)[:-1]].reshape(layers, experts)
    begin = first.ravel()[ordered] - total * np.arange(layers)[:, None]
    which = np.empty_like(slots)
    np.put_along_axis(which, order, np.arange(total) - begin, axis=1)
    return count[flat], which
