"""Serving: requests arrive, are admitted, batched step by step, and leave. Knows nothing of what a step does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import simpy

from moesim.engine.clock import Clock
from moesim.engine.events import Batch
from moesim.errors import MemoryBudgetError
from moesim.policies import Candidate, Scheduling
from moesim.records import Records
from moesim.workload import Request, Workload

if TYPE_CHECKING:
    from moesim.model import Model


LOOK = 64  # waiting requests a scheduler is shown


class Stepper(Protocol):
    """What serving needs of a device."""

    def step(self, batch: Batch) -> Generator[simpy.Event, Any, None]: ...


@dataclass(frozen=True)
class Limits:
    """clients: requests under way at once, the others are held back before they are sent (vLLM's max-concurrency);
    sequences: requests in service at once (vLLM's max-num-seqs); batch_tokens: new tokens per step; chunk: prompt
    tokens per request and step (0 = the whole prompt at once); kv_bytes: what KV caches may take together."""

    clients: int
    sequences: int
    batch_tokens: int
    chunk: int
    kv_bytes: int


class Sequence:
    """A request in service."""

    __slots__ = ("admitted", "decoded", "first", "last", "prefilled", "request", "sent")

    def __init__(self, request: Request, sent: int, now: int) -> None:
        self.request, self.sent, self.admitted = request, sent, now
        self.prefilled = self.decoded = 0
        self.first = self.last = -1

    @property
    def context(self) -> int:
        """Tokens in its KV cache."""
        done = self.prefilled if len(self.request.prefill) else self.request.prompt_tokens
        return done + self.decoded

    @property
    def remaining(self) -> int:
        return len(self.request.decode) - self.decoded

    def next_row(self) -> int:
        """The trace row after its present step, or -1."""
        prefill, decode = self.request.prefill, self.request.decode
        if self.prefilled < len(prefill):
            return int(prefill[self.prefilled])
        return int(decode[self.decoded]) if self.decoded < len(decode) else -1


class Server:
    """Continuous batching over one device.

    on_admit(request, running) is told of every admission; on_kv(bytes) of the KV cache's size before every step.
    """

    def __init__(
        self,
        env: Clock,
        device: Stepper,
        model: Model,
        workload: Workload,
        scheduling: Scheduling,
        limits: Limits,
        records: Records,
        on_admit: Callable[[Request, list[Request]], None] = lambda request, running: None,
        on_kv: Callable[[int], None] = lambda nbytes: None,
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._env, self._device, self._model, self._limits, self._records = env, device, model, limits, records
        self._scheduling, self._on_admit, self._on_kv, self._on_tokens = scheduling, on_admit, on_kv, on_tokens
        self._arriving = deque(enumerate(workload.requests))
        self._index = {id(request): i for i, request in self._arriving}
        self._waiting: list[tuple[Request, int]] = []  # and when each was sent
        self._running: list[Sequence] = []
        self._kv_promised = 0
        self._client_free = 0  # when the last request left
        self.idle_ns = 0
        self._check_each_fits(workload)

    def _kv(self, request: Request) -> int:
        """KV bytes of a request at its longest."""
        return self._model.kv_bytes(request.prompt_tokens + len(request.decode))

    def _check_each_fits(self, workload: Workload) -> None:
        worst = max(workload.requests, key=self._kv)
        if self._kv(worst) > self._limits.kv_bytes:
            raise MemoryBudgetError(
                f"request {worst.request_id}: its KV cache of {self._kv(worst) / 2**30:.2f} GiB exceeds the "
                f"{self._limits.kv_bytes / 2**30:.2f} GiB left for KV; lower --expert-memory or shorten the request"
            )

    def run(self) -> Generator[simpy.Event, Any, None]:
        """Serve until every request has left."""
        env = self._env
        while self._arriving or self._waiting or self._running:
            self._arrive()
            self._admit()
            if not self._running:
                gap = self._arriving[0][1].arrival_ns - env.now
                self.idle_ns += gap
                yield env.timeout(gap)
                continue
            yield from self._step()

    def _arrive(self) -> None:
        """Requests are sent at their time, or when a client is free: at the end of a step, later than their time."""
        now = self._env.now
        while self._arriving and self._arriving[0][1].arrival_ns <= now:
            if len(self._waiting) + len(self._running) >= self._limits.clients:
                return
            request = self._arriving.popleft()[1]
            self._waiting.append((request, max(request.arrival_ns, self._client_free)))

    def _admit(self) -> None:
        now = self._env.now
        while self._waiting and len(self._running) < self._limits.sequences:
            running = [_candidate(s.request, s.sent, s.remaining) for s in self._running]
            waiting = [_candidate(r, sent, len(r.decode)) for r, sent in self._waiting[:LOOK]]
            choice = self._scheduling.admit(waiting, running, now)
            if choice is None:
                return
            request, sent = self._waiting[choice]
            if self._kv_promised + self._kv(request) > self._limits.kv_bytes:
                return
            del self._waiting[choice]
            self._kv_promised += self._kv(request)
            self._running.append(Sequence(request, sent, now))
            self._on_admit(request, [s.request for s in self._running])

    def _step(self) -> Generator[simpy.Event, Any, None]:
        """Form a batch of every decode token and as many prompt tokens as fit, run it, hand tokens out."""
        start = self._env.now
        decoding = [s for s in self._running if s.prefilled == len(s.request.prefill)]
        contexts = [s.context for s in decoding]
        chunks = self._chunks(self._limits.batch_tokens - len(decoding))
        rows = [s.request.decode[s.decoded : s.decoded + 1] for s in decoding]
        rows += [s.request.prefill[s.prefilled : s.prefilled + n] for s, n in chunks]
        prefill = [(n, s.prefilled) for s, n in chunks]
        for s in decoding:
            s.decoded += 1
        for s, n in chunks:
            s.prefilled += n
        following = [r for s in (*decoding, *(s for s, _ in chunks)) if (r := s.next_row()) >= 0]
        flat = np.concatenate(rows) if len(rows) > 1 else rows[0]
        batch = Batch(flat, np.array(following, dtype=np.int64), prefill, contexts)
        kv = sum(self._model.kv_bytes(s.context) for s in self._running)
        self._on_kv(kv)
        yield from self._device.step(batch)
        prompt_tokens = sum(n for _, n in chunks)
        sequences = len(decoding) + len(chunks)
        self._records.steps.add((start, self._env.now, prompt_tokens, len(decoding), sequences, kv))
        self._on_tokens(len(batch.rows))
        finished_prompts = [s for s, _ in chunks if s.prefilled == len(s.request.prefill)]
        self._hand_out(decoding + finished_prompts)

    def _chunks(self, budget: int) -> list[tuple[Sequence, int]]:
        """Prompt tokens of this step, first come first served; without chunking the first prompt goes in whole."""
        chunks: list[tuple[Sequence, int]] = []
        for s in self._running:
            left = len(s.request.prefill) - s.prefilled
            if not left:
                continue
            take = min(left, self._limits.chunk, budget) if self._limits.chunk else left
            if take <= 0 or (take > budget and chunks):
                break
            chunks.append((s, take))
            budget -= take
        return chunks

    def _hand_out(self, sequences: list[Sequence]) -> None:
        """Every sequence that ran its last prompt token or a decode token has a new token."""
        now = self._env.now
        for s in sequences:
            if s.first < 0:
                s.first = now
            else:
                self._records.gaps.append(now - s.last)
            s.last = now
            if not s.remaining:
                self._leave(s)

    def _leave(self, s: Sequence) -> None:
        self._running.remove(s)
        r = s.request
        self._kv_promised -= self._kv(r)
        if len(self._waiting) + len(self._running) == self._limits.clients - 1:
            self._client_free = s.last
        row = (self._index[id(r)], r.arrival_ns, s.sent, s.admitted, s.first, s.last, r.prompt_tokens, r.output_tokens)
        self._records.requests.add(row)


def _candidate(request: Request, sent: int, remaining: int) -> Candidate:
    return Candidate(sent, request.prompt_tokens, remaining, request.slo_ns)
