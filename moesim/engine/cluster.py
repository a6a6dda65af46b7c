"""Several GPUs with all experts resident, in step: a barrier wherever tokens are exchanged (docs/design.md)."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.costs.layers import ACTIVATION_BYTES
from moesim.costs.shard import slices
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
    others: the same of GPUs unlike the first, which are the last of the `gpus`.
    """

    def __init__(
        self, env: Clock, trace: Trace, table: CostTable, system: System, gpus: int,
        popularity: NDArray[np.float64], records: Records, others: Sequence[CostTable] = (),
    ) -> None:  # fmt: skip
        self._env, self._trace, self._records = env, trace, records
        self._parallel, self._gpus = system.parallel, gpus
        self._tensor = self._parallel.attention == "tensor"
        self._whole = table.model
        self._full = [table] * (gpus - len(others)) + list(others)  # by GPU: of the whole model
        self._shares, parts = slices(
            self._whole, [one.costs for one in self._full], self._parallel.shares, self._tensor, self._parallel.sliced
        )
        known: dict[tuple[int, int], CostTable] = {}
        for whole, part in zip(self._full, parts, strict=True):
            key = (id(whole), part.expert_ffn)
            known.setdefault(key, CostTable(part, whole.machine, whole.costs, offloaded=False, kernel=system.kernel))
        self._tables = [known[id(w), part.expert_ffn] for w, part in zip(self._full, parts, strict=True)]
        self._distinct = list(known.values())
        self._table = self._tables[0]
        self.model: Model = self._table.model
        self._owners: list[int] = []  # GPU of each request, where GPUs have sequences of their own
        self._gathered = 0  # passes in which each GPU gathered the experts
        self._layout = self._first_layout(popularity)
        self._sums = np.array(self._table.partial_sums)
        self._loads = np.zeros(popularity.shape, dtype=np.int64)  # (token, expert) pairs since the last placement
        self._exchanged: dict[tuple[str, int], int] = {}
        self._grouped: dict[int, int] = {}
        layers, experts = popularity.shape
        every = [[self._whole.expert_bytes(layer, None, e) for e in range(experts)] for layer in range(layers)]
        self._layer_bytes = np.array(every).sum(axis=1)  # of all experts of a layer
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
            "shares": None if self._layout else list(self._shares),
            "passes_gathered": self._gathered,
            "experts_per_gpu": self._layout.slots.shape[1] // self._gpus if self._layout else self._trace.info.experts,
            "balancedness": even,
            "imbalance_ratio": 1 / even - 1,
            "rebalanced": self.rebalanced,
        }

    # One pass

    def _pass(self, batch: Batch, i: int) -> int:
        """Its length; every GPU waits for the slowest wherever tokens are exchanged."""
        whole = self._part(batch, i, (0, 1))
        step = max(self._step(gpu, *group) for gpu, group in enumerate(whole[1]))
        if self._parallel.gathers and self._moves_less_gathered(whole[1]):
            return self._spend(step, *self._gathering(batch, i, whole[1]))
        halves = [self._part(batch, i, (half,)) for half in (0, 1)] if self._parallel.overlap else []
        parts = halves if halves and all(len(rows) for rows, _ in halves) else [whole]
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

    def _moves_less_gathered(self, groups: Members) -> bool:
        """Whether a layer's experts are fewer bytes than all tokens there and their outputs back (HEXA-MoE: the choice
        between data- and model-centric)."""
        tokens = self._gpus * max(_tokens(*group) for group in groups)
        there_and_back = 2 * tokens * self._whole.hidden * ACTIVATION_BYTES
        return self._parallel.experts == "gather" or self._layer_bytes.mean() < there_and_back

    def _gathering(self, batch: Batch, i: int, groups: Members) -> tuple[I64, I64, I64, I64, I64]:
        """(mixer, exchange before, experts, exchange after, pairs) by layer, where each GPU gathers a layer's experts
        while attention runs, and computes its own tokens."""
        self._gathered += 1
        mixer = self._mixer(groups)
        gather = np.array([self._exchange("all_gather", nbytes) for nbytes in self._layer_bytes.tolist()])
        owners = np.repeat([self._owner(number) for number in batch.members], self._sizes(batch))
        rows = batch.rows_of(i)
        counts = [self._routed(rows[owners == gpu]) for gpu in range(self._gpus)]
        experts = np.max([self._alone_ns(table, each) for table, each in zip(self._full, counts, strict=True)], axis=0)
        pairs = np.array([each.sum(axis=1) for each in counts])
        self._total += int(pairs.sum())
        self._most += int(pairs.max(axis=0).sum())
        return mixer, np.maximum(gather - mixer, 0), experts, np.zeros_like(mixer), np.sum(counts, axis=0)

    @staticmethod
    def _alone_ns(table: CostTable, counts: I64) -> I64:
        """The grouped kernel of each layer on one GPU."""
        active, pairs = np.count_nonzero(counts, axis=1).tolist(), counts.sum(axis=1).tolist()
        return np.array([table.grouped_ns(*each) if each[1] else 0 for each in zip(active, pairs, strict=True)])

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

        With tensor parallelism all share all GPUs; otherwise requests are dealt out to them in their order.
        """
        contexts, rows = batch.contexts_of(i), batch.rows_of(i)
        groups: Members = [([], []) for _ in range(1 if self._tensor else self._gpus)]
        keep = [number // self._gpus % 2 in halves for number in batch.members]
        for j, number in enumerate(batch.members):
            prefill, decode = groups[0 if self._tensor else self._owner(number)]
            if not keep[j]:
                continue
            if j < len(contexts):
                decode.append(contexts[j])
            else:
                prefill.append(batch.prefill[j - len(contexts)])
        return (rows if all(keep) else rows[np.repeat(keep, self._sizes(batch))]), groups

    @staticmethod
    def _sizes(batch: Batch) -> list[int]:
        """Rows of each member in a pass."""
        return [1] * len(batch.contexts) + [new for new, _ in batch.prefill]

    def _owner(self, number: int) -> int:
        """The GPU of a request: dealt out one by one to whoever has fewest for its share.

        Shares of a hidden dimension alone (`tensor`) leave the sequences evenly spread (HEXA-MoE, equations 1 and 2).
        """
        shares = self._shares if self._parallel.gathers else (1.0,) * self._gpus
        while len(self._owners) <= number:
            given = np.bincount(self._owners, minlength=self._gpus) if self._owners else np.zeros(self._gpus)
            self._owners.append(int(np.argmin((given + 1) / np.array(shares))))
        return self._owners[number]

    def _routed(self, rows: I64) -> I64:
        """(token, expert) pairs of a pass: [layers, experts]."""
        from moesim.trace.choices import count_choices

        counts: I64 = count_choices(self._trace.experts, rows, self._trace.info.experts)
        return counts

    def _mixer(self, groups: Members) -> I64:
        """Attention and dense parts by layer, of the slowest GPU."""
        kinds = np.array([self._tables[gpu].kinds_ns(*group) for gpu, group in enumerate(groups) if any(group)])
        return kinds.max(axis=0)[self._table.layer_kinds]

    def _step(self, gpu: int, prefill: Sequence[tuple[int, int]], contexts: Sequence[int]) -> int:
        tokens, sequences = _tokens(prefill, contexts), len(prefill) + len(contexts)
        cost = self._tables[gpu].step_ns(tokens, sequences)
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
            cost = max(table.grouped_ns(active, pairs) for table in self._distinct) if pairs else 0
            self._grouped[key] = cost
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
            hosts = self._table.machine.hosts
            each = (table.costs.exchange_between_hosts(what, nbytes, self._gpus, hosts) for table in self._distinct)
            cost = self._exchanged[key] = ns(max(each))
        return cost

    # Placement

    def _first_layout(self, load: NDArray[np.float64]) -> Layout | None:
        if self._parallel.sliced:
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
