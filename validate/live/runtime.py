"""A small expert-offloading runtime: it runs steps for real and notes what it decided and how long it took.

What needs no clock (which experts the tokens chose, at which precision, what predictors believe) is made into lists
before a step begins: an engine written for the purpose spends nothing on it, and Python would.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.engine.cache import Entry
from moesim.engine.residency import Slots
from moesim.policies import LOW, SKIP, cheaper, precision_levels, reroute
from moesim.prediction import Beliefs
from moesim.systems import System
from moesim.trace import Trace
from validate.live.loader import Copied, Job, Loader
from validate.live.residency import Residency
from validate.live.weights import HIGH_BITS, Stage

Costs = Callable[[int], tuple[int, int]]  # tokens -> (fetch and compute, compute on the host), ns


@dataclass(eq=False)
class Log:
    """layers: (step, layer, hits, lates, misses, host experts, ns, of which kernels, waiting, deciding; calls of
    kernels); steps: ns; copies: (layer, expert) as started; evicted: likewise; reserving: ns spent looking for slots;
    transfers: as they happened; slept: arrivals for which the compute thread had to be woken.

    compute_wall, compute_cpu: ns of the compute thread's work by the wall and by its own clock.
    """

    layers: list[tuple[int, ...]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    evicted: list[tuple[int, int]] = field(default_factory=list)
    transfers: list[Copied] = field(default_factory=list)
    compute_wall: int = 0
    compute_cpu: int = 0
    computes: int = 0
    reserving: int = 0
    waited: int = 0
    arrivals: int = 0
    slept: int = 0


@dataclass(frozen=True)
class Chosen:
    """What a layer's router says. tokens: the token rows of each expert, in order of first appearance; strongest: the
    highest precision any of them asks for, where precisions differ."""

    tokens: dict[int, list[int]]
    strongest: dict[int, int] | None


@dataclass(frozen=True)
class Foreseen:
    """Experts believed of a target layer, and the position they are for; odds: a probability for each expert of it."""

    target: int
    experts: list[int]
    expires: int
    odds: list[float] | None


@dataclass(frozen=True)
class Cores:
    """Which core each thread has; None where it may wander."""

    compute: int | None
    loader: int | None
    host: int | None


def cores() -> Cores:
    """A core each where there are three, else loader and host executor share the second.

    The highest are taken, one thread of each: the lowest serve interrupts, and threads of one core slow each other.
    """
    mine = sorted(os.sched_getaffinity(0), reverse=True)
    apart = list({_siblings(core): core for core in mine}.values())
    mine = apart if len(apart) > 2 else mine
    return Cores(mine[0], mine[1], mine[min(2, len(mine) - 1)]) if len(mine) > 1 else Cores(None, None, None)


def _siblings(core: int) -> str:
    """The hardware threads of a core."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    return path.read_text().strip() if path.exists() else str(core)


class HostExecutor:
    """Experts on the CPU, one after the other, in a thread of its own."""

    def __init__(self, stage: Stage, lock: threading.Condition, core: int | None) -> None:
        self._stage, self._lock, self._core = stage, lock, core
        self._queue: queue.SimpleQueue[tuple[int, int, list[int]] | None] = queue.SimpleQueue()
        self.pending = 0
        self.results: list[tuple[list[int], Tensor]] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="host experts", daemon=True)
        self._thread.start()

    def submit(self, layer: int, expert: int, rows: list[int]) -> None:
        self.pending += 1
        self._queue.put((layer, expert, rows))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})
        torch.set_num_threads(1)
        while (work := self._queue.get()) is not None:
            try:
                values = self._stage.on_host(*work)
            except Exception as error:
                self.error = error
            with self._lock:
                self.pending -= 1
                if self.error is None:
                    self.results.append((work[2], values))
                self._lock.notify_all()


class Runtime:
    """One run of one system over one stage. The calling thread computes; `close` ends the others."""

    def __init__(
        self, trace: Trace, stage: Stage, system: System, slots: Slots, popularity: NDArray[np.float64],
        beliefs: tuple[Beliefs, ...], costs: Costs, where: Cores, pace_gbps: float = 0.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self._trace, self._stage, self._system, self._beliefs, self._costs = trace, stage, system, beliefs, costs
        self._popularity = popularity
        self._layers, self._step = trace.layers, 0
        self.lock = threading.Condition()
        self.memory = memory = Residency(stage.shape, system, slots, popularity, stage.slots, seed)
        self.log = Log(evicted=memory.evicted)
        self.loader = Loader(
            self.lock, self._reserve, memory.passed, self._copy, memory.landed, memory.dropped, where.loader, pace_gbps
        )
        self.log.transfers = self.loader.log
        memory.submit, memory.promote = self.loader.submit, self.loader.promote
        self.host = HostExecutor(stage, self.lock, where.host) if system.misses.may_host else None

    def close(self) -> None:
        self.loader.close()
        if self.host is not None:
            self.host.close()

    def place(self, placement: Iterator[tuple[int, int]]) -> None:
        """Fill slots before time begins."""
        for layer, expert in placement:
            with self.lock:
                fits = self.memory.place(layer, expert, self._system.placement.pinned)
            if fits:
                self._stage.copy(self.memory.slot[self.memory.key(layer, expert)], HIGH_BITS, layer, expert)

    def _reserve(self, job: Job) -> bool:
        began = time.perf_counter_ns()
        found = self.memory.reserve(job)
        self.log.reserving += time.perf_counter_ns() - began
        if found:
            self.log.copies.append((job.layer, job.expert))
        return found

    def _copy(self, job: Job) -> None:
        bits, expert = self.memory.bits(job.expert), job.expert % self.memory.experts
        self._stage.copy(self.memory.slot[job.key], bits, job.layer, expert, job.copied, job.parts)

    # One step

    def step(self, rows: NDArray[np.int64], following: NDArray[np.int64]) -> None:
        """One forward pass over trace rows; following: the rows these sequences are at in the next."""
        chosen = [self._chosen(layer, rows) for layer in range(self._layers)]
        foreseen = {layer: self._foreseen(layer, rows, following) for layer in range(-1, self._layers)}
        self._stage.know(len(rows), [tokens for layer in chosen for tokens in layer.tokens.values()])
        began = time.perf_counter_ns()
        self._foresee(foreseen[-1])
        for layer in range(self._layers):
            self._layer(layer, rows, chosen[layer], foreseen[layer])
        self.log.steps.append(time.perf_counter_ns() - began)
        self._step += 1
        with self.lock:
            self.memory.now.sequence_steps += 1

    def _layer(self, layer: int, rows: NDArray[np.int64], chosen: Chosen, foreseen: list[Foreseen]) -> None:
        log, memory = self.log, self.memory
        before = log.compute_wall, log.waited, log.computes
        began = time.perf_counter_ns()
        self._timed(self._stage.mixer, len(rows))
        with self.lock:
            routed = time.perf_counter_ns()
            memory.now.position = self._step * self._layers + layer
            wanted = chosen.tokens
            if chosen.strongest is not None:
                wanted = self._at_levels(layer, chosen.tokens, chosen.strongest)
            resident, late, misses = self._classify(layer, wanted)
            counts = (len(resident), len(late), len(misses))
            if (
                self._system.misses.substitutes
                and (late or misses)
                and any(e.landed for e in memory.here[layer].values())
            ):
                wanted, late, misses = self._substitute(layer, rows, wanted), [], []
                resident = [memory.here[layer][expert] for expert in wanted]
            hosted = self._bring_in(layer, late, misses, wanted)
            deciding = time.perf_counter_ns() - routed
        self._foresee(foreseen)
        if resident:
            self._compute(resident, wanted)
        self._wait_and_compute(wanted)
        with self.lock:
            memory.end_layer(layer)
            self.lock.notify_all()
        took = time.perf_counter_ns() - began
        kernels, waiting, computes = log.compute_wall - before[0], log.waited - before[1], log.computes - before[2]
        log.layers.append((self._step, layer, *counts, hosted, took, kernels, waiting, deciding, computes))

    def _wait_and_compute(self, wanted: dict[int, list[int]]) -> None:
        memory = self.memory
        while True:
            with self.lock:
                began, slept = time.perf_counter_ns(), False
                while not memory.arrived and (memory.outstanding or (self.host and self.host.pending)):
                    slept = moved = self.lock.wait(timeout=60)
                    self._check()
                    if not moved:
                        raise TimeoutError("the copy thread has not moved for a minute")
                self.log.waited += time.perf_counter_ns() - began
                entry = memory.arrived.popleft() if memory.arrived else None
            if entry is None:
                break
            self.log.arrivals += 1
            self.log.slept += slept
            self._compute([entry], wanted)
        if self.host:
            began = time.perf_counter_ns()
            for rows, values in self.host.results:
                self._stage.add(rows, values)
            self.host.results.clear()
            self.log.waited += time.perf_counter_ns() - began

    def _check(self) -> None:
        error = self.loader.error or (self.host and self.host.error)
        if error:
            raise error

    def _compute(self, entries: list[Entry], wanted: dict[int, list[int]]) -> None:
        parts = [(self.memory.slot[e.key], wanted[e.expert]) for e in entries]
        self._timed(self._stage.compute, parts)
        self.log.computes += 1
        with self.lock:
            for entry in entries:
                self.memory.release(entry)
            self.lock.notify_all()

    def _timed(self, work: Callable[[Any], None], argument: Any) -> None:
        wall, own = time.perf_counter_ns(), time.thread_time_ns()
        work(argument)
        self.log.compute_cpu += time.thread_time_ns() - own
        self.log.compute_wall += time.perf_counter_ns() - wall

    # What is known before the clock runs

    def _chosen(self, layer: int, rows: NDArray[np.int64]) -> Chosen:
        levels = self._levels(layer, rows) if self._system.misses.rule == "precision" else None
        found: dict[int, list[int]] = {}
        strongest: dict[int, int] = {}
        for token, chosen in enumerate(self._trace.experts[rows, layer].tolist()):
            for rank, expert in enumerate(chosen):
                if expert >= 0:
                    found.setdefault(expert, []).append(token)
                    if levels is not None:
                        strongest[expert] = max(strongest.get(expert, SKIP), levels[token][rank])
        return Chosen(found, None if levels is None else strongest)

    def _levels(self, layer: int, rows: NDArray[np.int64]) -> list[list[int]]:
        weights = self._trace.routed_weight(layer, rows).tolist()
        return [precision_levels(w, self._system.misses.thresholds) for w in weights]

    def _foreseen(self, layer: int, rows: NDArray[np.int64], following: NDArray[np.int64]) -> list[Foreseen]:
        """What becomes known when `layer` has been routed; -1: when the step starts."""
        return [found for b in self._beliefs for found in self._due(b, layer, rows, following)]

    def _due(self, b: Beliefs, layer: int, rows: NDArray[np.int64], following: NDArray[np.int64]) -> Iterator[Foreseen]:
        """Of one set of beliefs at this moment."""
        base = self._step * self._layers
        if (b.distance == 0) != (layer < 0):
            return
        targets = range(self._layers) if layer < 0 else (layer + b.distance,)
        for target in targets:
            wrapped = target >= self._layers
            about = following if wrapped else rows
            if (wrapped and not (b.wraps and len(following))) or target >= 2 * self._layers:
                continue
            own = target - wrapped * self._layers
            odds = None
            if b.map is not None and not wrapped:
                odds = b.map[about, own].astype(float).mean(axis=0).tolist()
            yield Foreseen(own, b.experts[about, own].ravel().tolist(), base + target, odds)

    # Decisions, under the lock

    def _at_levels(self, layer: int, found: dict[int, list[int]], level: dict[int, int]) -> dict[int, list[int]]:
        """Full precision where asked for or resident, low where asked for or resident, else nothing."""
        here, width = self.memory.here[layer], self.memory.experts
        out = {}
        for expert, tokens in found.items():
            entry, low = here.get(expert), here.get(expert + width)
            if (entry is not None and entry.landed) or level[expert] > LOW:
                out[expert] = tokens
            elif level[expert] == LOW or (low is not None and low.landed):
                out[expert + width] = tokens
        return out

    def _classify(self, layer: int, wanted: dict[int, list[int]]) -> tuple[list[Entry], list[Job], list[Job]]:
        memory, resident, late, misses = self.memory, [], [], []
        substituting = self._system.misses.substitutes and any(e.landed for e in memory.here[layer].values())
        for expert, tokens in wanted.items():
            memory.tick += 1
            memory.totals[layer][expert % memory.experts] += 1
            entry, job = memory.here[layer].get(expert), memory.coming.get(memory.key(layer, expert))
            if entry is not None and entry.landed:
                entry.prefetched = False
                memory.touch(entry, memory.tick, len(tokens))
                resident.append(entry)
            elif job is None:
                misses.append(memory.demand(layer, expert, len(tokens)))
            else:
                late.append(job)
                if not substituting:
                    job.wanted = (memory.tick, len(tokens))
                    if entry is not None:
                        memory.touch(entry, memory.tick, len(tokens))
        return resident, late, misses

    def _bring_in(self, layer: int, late: list[Job], misses: list[Job], wanted: dict[int, list[int]]) -> int:
        """Ask for copies in rank order, hand host experts over; how many run on the host."""
        rule, demands = self._system.misses.rule, list(late)
        hosted: list[Job] = []
        for job in misses:
            choice = self._where(len(wanted[job.expert])) if rule == "cheaper" else rule
            (hosted if choice == "host" else demands).append(job)
        demands.sort(key=lambda job: job.wanted or (0, 0))
        self.memory.outstanding = len(demands)
        for job in demands:
            if job.key not in self.memory.coming:
                self.memory.ask(job)
            elif not job.demand:
                self.memory.promote(job)
        for job in hosted:
            assert self.host is not None
            self.host.submit(layer, job.expert, wanted[job.expert])
        return len(hosted)

    def _where(self, tokens: int) -> str:
        """`host` or `fetch`, by the rule `cheaper`."""
        if below := self._system.misses.host_below:
            return "host" if tokens < below else "fetch"
        return cheaper(*self._costs(tokens))

    def _substitute(self, layer: int, rows: NDArray[np.int64], wanted: dict[int, list[int]]) -> dict[int, list[int]]:
        """Absent experts are rerouted or skipped, token by token."""
        here = {expert for expert, entry in self.memory.here[layer].items() if entry.landed}
        out: dict[int, list[int]] = {}
        for token, picks in enumerate(self._trace.experts[rows, layer].tolist()):
            new = [e if e in here else -1 for e in picks]
            if self._system.misses.rule == "reroute":
                new = reroute(picks, here, self._preference(layer, int(rows[token])))
            for expert in new:
                if expert >= 0:
                    out.setdefault(expert, []).append(token)
        for expert, tokens in out.items():
            entry = self.memory.here[layer][expert]
            if entry.busy:
                entry.tokens = len(tokens)
            else:
                self.memory.tick += 1
                self.memory.touch(entry, self.memory.tick, len(tokens))
        return out

    def _preference(self, layer: int, row: int) -> list[int]:
        known = self._trace.probabilities
        scores = self._popularity[layer] if known is None else known[row, layer]
        return list(np.argsort(-scores, kind="stable").tolist())

    # Prefetches

    def _foresee(self, calls: list[Foreseen]) -> None:
        """What has become known turns into prefetches."""
        if not calls:
            return
        with self.lock:
            for call in calls:
                if call.odds is not None:
                    self.memory.now.beliefs[call.target] = call.odds
            if self._system.prefetch.order != "layer":
                calls = self._ranked(calls)
            for call in calls:
                if call.expires > self.memory.now.position:
                    queued = self.memory.prefetch(call.target, call.experts, call.expires)
                    if queued and self._system.prefetch.first_missing:
                        break

    def _ranked(self, calls: list[Foreseen]) -> list[Foreseen]:
        """Expert by expert, most probable and nearest first."""
        now, ranked = self.memory.now, []
        for call in calls:
            away, odds = call.expires - now.position, now.beliefs.get(call.target)
            inverse = self._system.prefetch.order == "inverse"
            weight = 1 / max(away, 1) if inverse else 1 - away / (self._layers + 1)
            for expert in dict.fromkeys(call.experts):
                if expert >= 0:
                    trust = odds[expert % self.memory.experts] if odds else 0.0
                    ranked.append((-weight * trust, replace(call, experts=[expert])))
        return [call for _, call in sorted(ranked, key=lambda item: item[0])]
