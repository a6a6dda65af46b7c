"""Serving: requests arrive, are admitted, batched step by step, and leave. Knows nothing of what a step does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.batch import NO_LIMIT, Batch, Stepper
from moesim.engine.clock import Clock
from moesim.errors import MemoryBudgetError
from moesim.policies import FCFS, Candidate, Scheduling
from moesim.records import Records
from moesim.workload import Request, Workload

if TYPE_CHECKING:
    from moesim.model import Model


LOOK = 64  # waiting requests a scheduler is shown
MOST_PASSES = 2048  # in one batch


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

    __slots__ = ("admitted", "decoded", "first", "last", "number", "prefilled", "request", "sent")

    def __init__(self, request: Request, number: int, sent: int, now: int) -> None:
        self.request, self.number, self.sent, self.admitted = request, number, sent, now
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

    def rows_after(self, chunk: int) -> NDArray[np.int64]:
        """The trace row that follows `chunk` more prompt tokens, if any."""
        prefill, at = self.request.prefill, self.prefilled + chunk
        return prefill[at : at + 1] if at < len(prefill) else self.request.decode[self.decoded : self.decoded + 1]


class Server:
    """Continuous batching over one device.

    on_admit(request, running) is told of every admission; on_tokens of every token that was served.
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
        on_tokens: Callable[[int], None] = lambda count: None,
    ) -> None:
        self._env, self._device, self._model, self._limits, self._records = env, device, model, limits, records
        self._scheduling, self._on_admit, self._on_tokens = scheduling, on_admit, on_tokens
        self._arriving = deque(enumerate(workload.requests))
        self._index = {id(request): i for i, request in self._arriving}
        self._waiting: list[tuple[Request, int]] = []  # and when each was sent
        self._running: list[Sequence] = []
        self._kv_promised = 0
        self._client_free = 0  # when the last request left
        self._kv_of = np.zeros(0, dtype=np.int64)  # by context
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
                yield from self._device.idle(gap)
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
            choice: int | None = 0  # first come, first served needs to see nobody
            if not isinstance(self._scheduling, FCFS):
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
            self._running.append(Sequence(request, self._index[id(request)], sent, now))
            self._on_admit(request, [s.request for s in self._running])

    def _step(self) -> Generator[simpy.Event, Any, None]:
        """Form a batch of every decode token and as many prompt tokens as fit, run it, hand tokens out."""
        start = self._env.now
        decoding = [s for s in self._running if s.prefilled == len(s.request.prefill)]
        chunks = self._chunks(self._limits.batch_tokens - len(decoding))
        batch = self._batch(decoding, chunks)
        ends = yield from self._device.steps(batch)
        for s in decoding:
            s.decoded += len(ends)
        for s, n in chunks:
            s.prefilled += n
        prompt_tokens = sum(n for _, n in chunks)
        self._record_steps(start, ends, prompt_tokens, len(decoding), batch)
        self._on_tokens(int(batch.first[len(ends)]))
        self._hand_out(decoding + [s for s, _ in chunks if s.prefilled == len(s.request.prefill)], ends)

    def _record_steps(self, start: int, ends: SequenceOf[int], prompt: int, decoding: int, batch: Batch) -> None:
        steps = self._records.steps
        if len(ends) == 1:
            steps.add((start, ends[0], prompt, decoding, batch.sequences, int(batch.kv_bytes[0])))
            return
        rows = np.empty((len(ends), len(steps.columns)), dtype=np.int64)
        rows[:, 1] = ends
        rows[0, 0], rows[1:, 0] = start, rows[:-1, 1]
        rows[:, 2:5] = prompt, decoding, batch.sequences
        rows[:, 5] = batch.kv_bytes[: len(ends)]
        steps.extend(rows)

    def _batch(self, decoding: list[Sequence], chunks: list[tuple[Sequence, int]]) -> Batch:
        """One pass with its prompt chunks, or passes until a sequence ends or another request may join."""
        passes = 1 if chunks else self._steady_passes(decoding)
        rows = [s.request.decode[s.decoded : s.decoded + passes] for s in decoding]
        following = [s.request.decode[s.decoded + passes : s.decoded + passes + 1] for s in decoding]
        if chunks:
            rows += [s.request.prefill[s.prefilled : s.prefilled + n] for s, n in chunks]
            following += [s.rows_after(n) for s, n in chunks]
            first = np.array([0, sum(map(len, rows))], dtype=np.int64)
        else:
            first = np.arange(passes + 1, dtype=np.int64) * len(rows)
        return Batch(
            rows=rows[0] if len(rows) == 1 else np.concatenate(rows) if chunks else np.stack(rows, axis=1).ravel(),
            first=first,
            tail=following[0] if len(following) == 1 else np.concatenate(following),
            prefill=[(n, s.prefilled) for s, n in chunks],
            contexts=[s.context for s in decoding],
            kv_bytes=self._kv_bytes(decoding, {id(s): n for s, n in chunks}, passes),
            until=self._next_arrival() if passes > 1 else NO_LIMIT,
            members=[s.number for s in decoding] + [s.number for s, _ in chunks],
        )

    def _steady_passes(self, decoding: list[Sequence]) -> int:
        """Passes before anyone can leave; one where the scheduler may admit somebody as time goes by."""
        if len(decoding) < len(self._running) or (self._waiting and not getattr(self._scheduling, "steady", False)):
            return 1
        return min(MOST_PASSES, *(s.remaining for s in decoding))

    def _next_arrival(self) -> int:
        if not self._arriving or len(self._waiting) + len(self._running) >= self._limits.clients:
            return NO_LIMIT
        return self._arriving[0][1].arrival_ns

    def _kv_bytes(self, decoding: list[Sequence], chunk_of: dict[int, int], passes: int) -> NDArray[np.int64]:
        """Of all caches in each pass, its own tokens included."""
        if chunk_of:
            decodes = {id(s) for s in decoding}
            contexts = [s.context + chunk_of.get(id(s), int(id(s) in decodes)) for s in self._running]
            return np.array([sum(self._kv_at(max(contexts))[contexts])])
        contexts = [s.context + 1 for s in decoding]
        own = self._kv_at(max(contexts) + passes)
        total = np.zeros(passes, dtype=np.int64)
        for context in contexts:
            total += own[context : context + passes]
        for s in self._running if len(decoding) < len(self._running) else ():
            if s.prefilled < len(s.request.prefill):
                total += own[s.context] if s.context < len(own) else self._model.kv_bytes(s.context)
        return total

    def _kv_at(self, most: int) -> NDArray[np.int64]:
        """Bytes of one cache by context, up to `most` at least."""
        if most >= len(self._kv_of):
            size = max(2 * most, 1024)
            self._kv_of = np.array([self._model.kv_bytes(context) for context in range(size)], dtype=np.int64)
        return self._kv_of

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

    def _hand_out(self, sequences: list[Sequence], ends: SequenceOf[int]) -> None:
        """Every sequence that ran its last prompt token or a decode token has a new token at the end of each pass."""
        now, gaps = ends[0], self._records.gaps
        for s in sequences:
            if s.first < 0:
                s.first = now
            else:
                gaps.append(now - s.last)
            s.last = ends[-1]
        if len(ends) > 1:
            gaps.frombytes(np.repeat(np.diff(ends), len(sequences)).tobytes())
        for s in sequences:
            if not s.remaining:
                self._leave(s)

    def _leave(self, s: Sequence) -> None:
        self._running.remove(s)
        r = s.request
        self._kv_promised -= self._kv(r)
        if len(self._waiting) + len(self._running) == self._limits.clients - 1:
            self._client_free = s.last
        row = (s.number, r.arrival_ns, s.sent, s.admitted, s.first, s.last, r.prompt_tokens, r.output_tokens)
        self._records.requests.add(row)


def _candidate(request: Request, sent: int, remaining: int) -> Candidate:
    return Candidate(sent, request.prompt_tokens, remaining, request.slo_ns)
