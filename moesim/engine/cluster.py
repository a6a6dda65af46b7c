"""Several GPUs with all experts resident, in step: a barrier wherever tokens are exchanged (docs/design.md)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.costs.layers import ACTIVATION_BYTES
from moesim.costs.shard import shard
from moesim.costs.table import CostTable
from moesim.engine.batch import Batch
from moesim.engine.clock import Clock
from moesim.engine.events import MIXER, RESIDENT, STEP
from moesim.engine.residency import Counts
from moesim.policies.balance import Layout, balanced, first_slots
from moesim.records import KERNELS, Records
from moesim.systems.system import System
from moesim.trace import Trace
from moesim.units import ns

if TYPE_CHECKING:
    from moesim.model import Model

EXCHANGE = KERNELS.index("exchange")
I64 = NDArray[np.int64]
Members = list[tuple[list[tuple[int, int]], list[int]]]  # per group of sequences: (prefill chunks, decode contexts)


class Cluster:
    """`gpus` GPUs that serve a model together as `system.parallel` says; `steps` runs a batch.

    table: costs of the whole model on one GPU. popularity: [layers, experts], what the first placement goes by.
    """

    def __init__(
        self, env: Clock, trace: Trace, table: CostTable, system: System, gpus: int,
        popularity: NDArray[np.float64], records: Records,
    ) -> None:  # fmt: skip
        self._env, self._trace, self._records = env, trace, records
        self._parallel, self._gpus = system.parallel, gpus
        self._tensor = self._parallel.attention == "tensor"
        self.model: Model = shard(table.model, self._gpus, self._tensor, self._parallel.experts == "tensor")
        self._whole = table.model
        self._table = CostTable(self.model, table.machine, table.costs, offloaded=False, kernel=system.kernel)
        self._layout = self._first_layout(popularity)
        self._sums = np.array(self._table.partial_sums)
        self._loads = np.zeros(popularity.shape, dtype=np.int64)  # (token, expert) pairs since the last placement
        self._exchanged: dict[tuple[str, int], int] = {}
        self._grouped: dict[int, int] = {}
        self._passes = 0
        self._total = self._most = 0  # pairs of all GPUs and of the busiest one, over layers and passes
        self.rebalanced = 0
        self.counts = Counts()
        self.counts.altered = np.zeros((3, trace.layers, len(trace.tasks)), dtype=np.int64)

    def idle(self, gap: int) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(gap)

    def steps(self, batch: Batch) -> Generator[simpy.Event, Any, list[int]]:
        ends: list[int] = []
        for i in range(batch.passes):
            if i and self._env.now >= batch.until:
                break
            yield self._env.timeout(self._pass(batch, i))
            ends.append(self._env.now)
        return ends

    def summary(self) -> dict[str, Any]:
        """Imbalance of the GPUs' (token, expert) pairs, by vLLM's name and by TensorRT-LLM's."""
        even = self._total / self._gpus / self._most if self._layout and self._most else 1.0
        return {
            "gpus": self._gpus,
            "attention": self._parallel.attention,
            "experts": self._parallel.experts,
            "placement": self._parallel.placement if self._layout else None,
            "experts_per_gpu": self._layout.slots.shape[1] // self._gpus if self._layout else self._trace.info.experts,
            "balancedness": even,
            "imbalance_ratio": 1 / even - 1,
            "rebalanced": self.rebalanced,
        }

    # One pass

    def _pass(self, batch: Batch, i: int) -> int:
        """Its length; every GPU waits for the slowest wherever tokens are exchanged."""
        whole = self._part(batch, i, (0, 1))
        halves = [self._part(batch, i, (half,)) for half in (0, 1)] if self._parallel.overlap else []
        parts = halves if halves and all(len(rows) for rows, _ in halves) else [whole]
        step = max(self._step(prefill, contexts) for prefill, contexts in whole[1])
        counts = [self._routed(rows) for rows, _ in parts]
        mixer = [self._mixer(groups) for _, groups in parts]
        loads = [self._loads_of(each) for each in counts]
        experts = [self._slowest(*each) for each in loads]
        waits = [self._exchanges(pairs, groups) for (_, pairs), (_, groups) in zip(loads, parts, strict=True)]
        there, back = (np.sum(side, axis=0) for side in zip(*waits, strict=True))
        kernels, experts_ns = np.sum(mixer, axis=0), np.sum(experts, axis=0)
        if len(parts) == 2:  # seen is what outlasts the other half's kernels, the first way there and the last way back
            seen = np.maximum(there + back - kernels - experts_ns, 0)
            seen[0] = max(seen[0], waits[0][0][0])
            seen[-1] = max(seen[-1], waits[1][1][-1])
            there, back = seen, np.zeros_like(seen)
        return self._spend(step, kernels, there, experts_ns, back, np.sum(counts, axis=0))

    def _spend(self, step: int, mixer: I64, there: I64, experts: I64, back: I64, counts: I64) -> int:
        """Note what a pass took; its length."""
        spent, active = self.counts.spent, np.count_nonzero(counts, axis=1)
        exchange = int((there + back).sum())
        spent["step"] += step
        spent["mixer"] += int(mixer.sum())
        spent["experts"] += int(experts.sum())
        spent["exchange"] += exchange
        self.counts.lookups += int(active.sum())
        self.counts.hits += int(active.sum())
        if self._records.detail:
            self._record(step, mixer, there, experts, back, active)
        self._passes += 1
        return step + int((mixer + experts).sum()) + exchange + self._rebalance(counts)

    def _part(self, batch: Batch, i: int, halves: Sequence[int]) -> tuple[I64, Members]:
        """Rows of the sequences in these halves of the batch, and the sequences by the GPUs they are on.

        With tensor parallelism all share all GPUs; otherwise requests are dealt out to them by their numbers.
        """
        contexts, rows = batch.contexts_of(i), batch.rows_of(i)
        groups: Members = [([], []) for _ in range(1 if self._tensor else self._gpus)]
        sizes = [1] * len(contexts) + [new for new, _ in batch.prefill]
        keep = [number // self._gpus % 2 in halves for number in batch.members]
        for j, number in enumerate(batch.members):
            prefill, decode = groups[number % len(groups)]
            if not keep[j]:
                continue
            if j < len(contexts):
                decode.append(contexts[j])
            else:
                prefill.append(batch.prefill[j - len(contexts)])
        return (rows if all(keep) else rows[np.repeat(keep, sizes)]), groups

    def _routed(self, rows: I64) -> I64:
        """(token, expert) pairs of a pass: [layers, experts]."""
        layers, experts = self._trace.layers, self._trace.info.experts
        chosen = self._trace.experts[rows].astype(np.int64)
        chosen += np.where(chosen < 0, layers * experts, experts * np.arange(layers)[:, None])
        return np.bincount(chosen.ravel(), minlength=layers * experts)[: layers * experts].reshape(layers, experts)

    def _mixer(self, groups: Members) -> I64:
        """Attention and dense parts by layer, of the slowest GPU."""
        kinds = np.array([self._table.kinds_ns(*group) for group in groups if any(group)])
        return kinds.max(axis=0)[self._table.layer_kinds]

    def _step(self, prefill: Sequence[tuple[int, int]], contexts: Sequence[int]) -> int:
        tokens, sequences = _tokens(prefill, contexts), len(prefill) + len(contexts)
        cost = self._table.step_ns(tokens, sequences)
        if self._tensor:
            cost += self._exchange("all_gather", sequences * self._whole.vocab * ACTIVATION_BYTES)
        return cost

    def _loads_of(self, counts: I64) -> tuple[I64, I64]:
        """(active experts, pairs) of each GPU by layer, or of all together where each has a slice of every expert."""
        total = counts.sum(axis=1)
        if self._layout is None:
            active, pairs = np.count_nonzero(counts, axis=1)[:, None], total[:, None]
        else:
            pairs, active = self._layout.loads(counts)
        self._total += int(total.sum())
        self._most += int(pairs.max(axis=1).sum())
        return active, pairs

    def _slowest(self, active: I64, pairs: I64) -> I64:
        """The longest grouped kernel of each layer; one with fewer experts and pairs than another is not asked."""
        beaten = (active[:, :, None] <= active[:, None, :]) & (pairs[:, :, None] <= pairs[:, None, :])
        same = (active[:, :, None] == active[:, None, :]) & (pairs[:, :, None] == pairs[:, None, :])
        later = np.tri(active.shape[1], k=-1, dtype=bool)  # of equals the first is asked
        asked = ~(beaten & (~same | later)).any(axis=2)
        keys, inverse = np.unique(np.where(asked, active << 40 | pairs, 0), return_inverse=True)
        costs = np.array([self._grouped_ns(key) for key in keys.tolist()])
        return costs[inverse.reshape(active.shape)].max(axis=1)

    def _grouped_ns(self, key: int) -> int:
        cost = self._grouped.get(key)
        if cost is None:
            active, pairs = key >> 40, key & ((1 << 40) - 1)
            cost = self._grouped[key] = self._table.grouped_ns(active, pairs) if pairs else 0
        return cost

    def _exchanges(self, pairs: I64, groups: Members) -> tuple[I64, I64]:
        """ns by layer before and after the experts: what attention and experts need of each other's tokens."""
        hidden, layers = self._whole.hidden, len(pairs)
        tokens = [_tokens(*group) for group in groups]
        if self._tensor:  # attention's partial sums, and the experts'
            reduce = self._exchange("all_reduce", tokens[0] * hidden * ACTIVATION_BYTES)
            return reduce * self._sums, np.full(layers, reduce)
        if self._layout is None:  # slices of every expert need all tokens
            size = self._gpus * max(tokens) * hidden * ACTIVATION_BYTES
            gather, scatter = self._exchange("all_gather", size), self._exchange("reduce_scatter", size)
            return np.full(layers, gather), np.full(layers, scatter)
        sent = np.maximum(pairs.max(axis=1), max(tokens) * self._trace.top_k) * hidden
        width = 1 if self._whole.expert_bits < 9 else ACTIVATION_BYTES  # as wide as the kernel's inputs
        there = [self._exchange("dispatch", size * width) for size in sent.tolist()]
        back = [self._exchange("combine", size * ACTIVATION_BYTES) for size in sent.tolist()]
        return np.array(there), np.array(back)

    def _exchange(self, what: str, nbytes: int) -> int:
        key = what, nbytes
        cost = self._exchanged.get(key)
        if cost is None:
            cost = self._exchanged[key] = ns(self._table.costs.exchange(what, nbytes, self._gpus))
        return cost

    # Placement

    def _first_layout(self, load: NDArray[np.float64]) -> Layout | None:
        if self._parallel.experts == "tensor":
            return None
        return Layout(first_slots(self._parallel, load, self._gpus), self._gpus, load.shape[1])

    def _rebalance(self, counts: I64) -> int:
        """ns that placing anew takes after this pass: experts travel between GPUs while nothing is served."""
        if not self._parallel.interval or self._layout is None:
            return 0
        self._loads += counts
        if self._passes % self._parallel.interval:
            return 0
        slots = self._layout.slots.shape[1]
        later = Layout(balanced(self._loads.astype(float), slots, self._gpus), self._gpus, counts.shape[1])
        nbytes = self._layout.moved(later) * self._table.expert_bytes()
        self._layout, self._loads[:] = later, 0
        self.rebalanced += 1
        took = self._exchange("all_to_all", nbytes)
        self.counts.spent["exchange"] += took
        return took

    def _record(self, step: int, mixer: I64, there: I64, experts: I64, back: I64, active: I64) -> None:
        kernels, now = self._records.kernels, self._env.now
        kernels.add((now, now + step, -1, STEP))
        now += step
        columns = [column.tolist() for column in (mixer, there, experts, back, active)]
        for layer, (a, b, c, d, hits) in enumerate(zip(*columns, strict=True)):
            began = now
            for what, took in ((MIXER, a), (EXCHANGE, b), (RESIDENT, c), (EXCHANGE, d)):
                if took:
                    kernels.add((now, now + took, layer, what))
                now += took
            self._records.layers.add((self._passes, layer, began, began + a + b, now, hits, 0, 0, 0, b + d))


def _tokens(prefill: Sequence[tuple[int, int]], contexts: Sequence[int]) -> int:
    return len(contexts) + sum(new for new, _ in prefill)
