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
from moesim.engine.prefixes import Prefixes
from moesim.errors import MemoryBudgetError
from moesim.policies import FCFS, Candidate, Scheduling
from moesim.records import Records
from moesim.workload import Request, Workload
from moesim.workload_files import PREFIX_BLOCK

if TYPE_CHECKING:
    from moesim.model import Model


LOOK = 64  # waiting requests a scheduler is shown
MOST_PASSES = 2048  # in one batch


@dataclass(frozen=True)
class Limits:
    """clients: requests under way at once, the others are held back before they are sent (vLLM's max-concurrency);
    sequences: requests in service at once (vLLM's max-num-seqs); batch_tokens: new tokens per step; chunk: prompt
    tokens per request and step (0 = the whole prompt at once); kv_bytes: what KV caches may take together.

    preempts: requests are admitted by the KV cache they need now instead of at their longest, and the one admitted last
    is preempted where it does not suffice; prefixes: prompts begin with what is kept of earlier ones."""

    clients: int
    sequences: int
    batch_tokens: int
    chunk: int
    kv_bytes: int
    preempts: bool = False
    prefixes: bool = False


class Sequence:
    """A request in service.

    rows: what it has to prefill: its prompt, and once it was preempted the tokens it had made, too; redone: how many
    those are; lost: how many of the rows it had done before. blocks: of its prompt that are kept for others.
    """

    __slots__ = (
        "admitted",
        "blocks",
        "cached",
        "decoded",
        "first",
        "last",
        "lost",
        "number",
        "out",
        "out_since",
        "preemptions",
        "prefilled",
        "recomputed",
        "redone",
        "request",
        "rows",
        "sent",
    )  # fmt: skip

    def __init__(self, request: Request, number: int, sent: int, now: int) -> None:
        self.request, self.number, self.sent, self.admitted = request, number, sent, now
        self.rows, self.blocks = request.prefill, 0
        self.prefilled = self.decoded = self.redone = self.lost = 0
        self.cached = self.recomputed = self.preemptions = self.out = self.out_since = 0
        self.first = self.last = -1

    @property
    def decoding(self) -> bool:
        return self.prefilled == len(self.rows)

    @property
    def context(self) -> int:
        """Tokens in its KV cache."""
        if not self.decoding:
            return self.prefilled
        return (len(self.request.prefill) or self.request.prompt_tokens) + self.decoded

    @property
    def remaining(self) -> int:
        return len(self.request.decode) - self.decoded

    @property
    def shared(self) -> int:
        """Tokens of its KV cache that lie in shared blocks."""
        return self.blocks * PREFIX_BLOCK

    def rows_after(self, chunk: int) -> NDArray[np.int64]:
        """The trace row that follows `chunk` more prompt tokens, if any."""
        at, then = self.prefilled + chunk, max(self.decoded, self.redone)
        return self.rows[at : at + 1] if at < len(self.rows) else self.request.decode[then : then + 1]

    def prefill(self, tokens: int) -> None:
        self.recomputed += max(min(self.prefilled + tokens, self.lost) - self.prefilled, 0)
        self.prefilled += tokens
        if self.decoding:
            self.decoded = max(self.decoded, self.redone)

    def preempt(self, now: int) -> None:
        """Its KV cache is given up: prompt, and tokens made so far, are prefilled again, and yield the next one."""
        if self.decoding:
            self.redone = self.decoded + 1
            self.rows = np.concatenate([self.request.prefill, self.request.decode[: self.redone]])
            self.prefilled = len(self.rows)
        self.lost = max(self.lost, self.prefilled)
        self.prefilled = self.blocks = 0
        self.preemptions += 1
        self.out_since = now


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
        self._preempted: list[Sequence] = []  # in the order they were admitted; they go before all that wait
        self._kv_promised = 0
        self._prefixes = Prefixes(self._kv_bytes_at)
        self._client_free = 0  # when the last request left
        self._kv_of = np.zeros(0, dtype=np.int64)  # by context
        self.idle_ns = 0
        self._check_each_fits(workload)

    def _kv(self, request: Request) -> int:
        """KV bytes of a request at its longest."""
        return self._model.kv_bytes(request.prompt_tokens + len(request.decode))

    def _kv_bytes_at(self, context: int) -> int:
        return int(self._kv_at(context)[context])

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
        while self._arriving or self._under_way:
            self._arrive()
            if not self._preempt():
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
            if self._under_way >= self._limits.clients:
                return
            request = self._arriving.popleft()[1]
            self._waiting.append((request, max(request.arrival_ns, self._client_free)))

    @property
    def _under_way(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._preempted)

    def _preempt(self) -> bool:
        """Whether somebody had to go so that the others have room for one more pass: the last to come goes first."""
        if not self._limits.preempts:
            return False
        before = len(self._running)
        while self._needed() > self._limits.kv_bytes:
            s = self._running.pop()
            self._prefixes.leave(s.request.blocks[: s.blocks])
            s.preempt(self._env.now)
            self._preempted.insert(0, s)
        return len(self._running) < before

    def _needed(self) -> int:
        """KV bytes of all that run after one more pass."""
        decoding = [s for s in self._running if s.decoding]
        chunk_of = {id(s): n for s, n in self._chunks(self._limits.batch_tokens - len(decoding))}
        return int(self._kv_bytes(decoding, chunk_of, 1)[0]) if self._running else 0

    def _admit(self) -> None:
        if self._preempted and not self._resume():
            return
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
            s = Sequence(request, self._index[id(request)], sent, now)
            if not self._enter(s):
                return
            del self._waiting[choice]
            s.cached = s.prefilled
            self._on_admit(request, [s.request for s in self._running])

    def _resume(self) -> bool:
        """Let those that were preempted in again, in their old order; whether all of them are."""
        while self._preempted and len(self._running) < self._limits.sequences:
            s = self._preempted[0]
            if not self._enter(s):
                break
            del self._preempted[0]
            s.out += self._env.now - s.out_since
        return not self._preempted

    def _enter(self, s: Sequence) -> bool:
        """Whether there is room for it, and if so it runs, with what is kept of its prompt."""
        known = self._prefixes.known(s.request.blocks, len(s.rows)) if self._limits.prefixes else 0
        blocks, kept = s.request.blocks[:known], self._prefixes
        own = self._kv(s.request) - (self._kv_bytes_at(known * PREFIX_BLOCK) if known else 0)
        taken = self._kv_promised + kept.used_bytes
        if self._limits.preempts:
            start = s.prefilled = known * PREFIX_BLOCK
            own = self._kv_bytes_at(s.context + self._first_chunk(s)) - (self._kv_bytes_at(start) if known else 0)
            taken = self._needed()
        if taken + own + kept.woken_bytes(blocks) > self._limits.kv_bytes:
            s.prefilled = 0
            return False
        for depth, block in enumerate(blocks):
            kept.use(block, depth)
        s.prefilled, s.blocks = known * PREFIX_BLOCK, known
        self._running.append(s)
        self._kv_promised += own
        return True

    def _first_chunk(self, s: Sequence) -> int:
        left = len(s.rows) - s.prefilled
        return (min(left, self._limits.chunk) if self._limits.chunk else left) or 1

    def _share(self) -> None:
        """Blocks that have been computed are there for others; idle ones leave where the room is needed."""
        for s in self._running:
            while s.blocks < len(s.request.blocks) and s.shared + PREFIX_BLOCK <= s.prefilled:
                before = self._kv_bytes_at(s.shared)
                self._prefixes.use(s.request.blocks[s.blocks], s.blocks)
                s.blocks += 1
                self._kv_promised -= self._kv_bytes_at(s.shared) - before
        own = sum(self._kv_bytes_at(s.context) - self._kv_bytes_at(s.shared) for s in self._running)
        self._prefixes.shrink(self._limits.kv_bytes - own - self._prefixes.used_bytes)

    def _step(self) -> Generator[simpy.Event, Any, None]:
        """Form a batch of every decode token and as many prompt tokens as fit, run it, hand tokens out."""
        start = self._env.now
        decoding = [s for s in self._running if s.decoding]
        chunks = self._chunks(self._limits.batch_tokens - len(decoding))
        batch = self._batch(decoding, chunks)
        ends = yield from self._device.steps(batch)
        for s in decoding:
            s.decoded += len(ends)
        for s, n in chunks:
            s.prefill(n)
        if self._limits.prefixes:
            self._share()
        prompt_tokens = sum(n for _, n in chunks)
        self._record_steps(start, ends, prompt_tokens, len(decoding), batch)
        self._on_tokens(int(batch.first[len(ends)]))
        self._hand_out(decoding + [s for s, _ in chunks if s.decoding], ends)

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
        kv_bytes = self._kv_bytes(decoding, {id(s): n for s, n in chunks}, passes)
        if self._limits.preempts and passes > 1:  # until there is no room for another one
            passes = int(np.searchsorted(kv_bytes, self._limits.kv_bytes, side="right"))
        rows = [s.request.decode[s.decoded : s.decoded + passes] for s in decoding]
        following = [s.request.decode[s.decoded + passes : s.decoded + passes + 1] for s in decoding]
        if chunks:
            rows += [s.rows[s.prefilled : s.prefilled + n] for s, n in chunks]
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
            kv_bytes=kv_bytes[:passes],
            until=self._next_arrival() if passes > 1 else NO_LIMIT,
            members=[s.number for s in decoding] + [s.number for s, _ in chunks],
        )

    def _steady_passes(self, decoding: list[Sequence]) -> int:
        """Passes before anyone can leave; one where the scheduler may admit somebody as time goes by."""
        if len(decoding) < len(self._running) or (self._waiting and not getattr(self._scheduling, "steady", False)):
            return 1
        return min(MOST_PASSES, *(s.remaining for s in decoding))

    def _next_arrival(self) -> int:
        if not self._arriving or self._under_way >= self._limits.clients:
            return NO_LIMIT
        return self._arriving[0][1].arrival_ns

    def _kv_bytes(self, decoding: list[Sequence], chunk_of: dict[int, int], passes: int) -> NDArray[np.int64]:
        """Of all caches in each pass, its own tokens included; what several share counts once, what is idle not."""
        total = self._kv_bytes_apart(decoding, chunk_of, passes)
        if self._limits.prefixes:
            total += self._prefixes.used_bytes - sum(self._kv_bytes_at(s.shared) for s in self._running)
        return total

    def _kv_bytes_apart(self, decoding: list[Sequence], chunk_of: dict[int, int], passes: int) -> NDArray[np.int64]:
        """As if nothing were shared."""
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
            if not s.decoding:
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
            left = len(s.rows) - s.prefilled
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
        self._kv_promised -= self._kv(r) - self._kv_bytes_at(s.shared)
        self._prefixes.leave(r.blocks[: s.blocks])
        if self._under_way == self._limits.clients - 1:
            self._client_free = s.last
        row = (s.number, r.arrival_ns, s.sent, s.admitted, s.first, s.last, r.prompt_tokens, r.output_tokens)
        self._records.requests.add((*row, s.cached, s.recomputed, s.preemptions, s.out))


def _candidate(request: Request, sent: int, remaining: int) -> Candidate:
    return Candidate(sent, request.prompt_tokens, remaining, request.slo_ns)
