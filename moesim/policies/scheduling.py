"""Which waiting request joins the batch next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from moesim.errors import PolicyError


@dataclass(frozen=True)
class Candidate:
    """What a scheduler may know of a request. Times in ns; `remaining` = tokens still expected."""

    arrival: int
    prompt_tokens: int
    remaining: int
    slo_ns: int  # time to first token it was promised; 0 where it was promised none


class Scheduling(Protocol):
    """Answers one question: which waiting request to admit now, or None.

    One that has an attribute `steady` which is true refuses whom it refused until a request leaves or arrives, however
    much time passes, and is not asked in between.
    """

    def admit(self, waiting: Sequence[Candidate], running: Sequence[Candidate], now: int) -> int | None: ...


@dataclass(frozen=True)
class FCFS:
    """First come, first served."""

    @property
    def steady(self) -> bool:
        return True

    def admit(self, waiting: Sequence[Candidate], running: Sequence[Candidate], now: int) -> int | None:
        return 0 if waiting else None


@dataclass(frozen=True)
class GreedySLO:
    """eMoE, Algorithm 1 and Eq. 3: tightest promise first, unless it would break one already given.

    t_i = load + (W + n_i G_i) c + r_i, where W is the newcomer's prompt, G_i the tokens request i still has to
    generate, n_i how many running requests outlast it, c the time per token and r_i the time i has been waiting.
    """

    needs: ClassVar[tuple[str, ...]] = ("a promised time (--slo; else first come, first served)",)

    token_ns: int = 0  # c; filled in from the cost table by the replay
    load_ns: int = 0  # loading an admission causes; 0 while plans are shared by `period` requests
    max_tokens: int = 1 << 30

    def __post_init__(self) -> None:
        for name, least in (("token_ns", 0), ("load_ns", 0), ("max_tokens", 1)):
            if getattr(self, name) < least:
                raise PolicyError(f"scheduling.{name} {getattr(self, name)} must be at least {least}")

    def admit(self, waiting: Sequence[Candidate], running: Sequence[Candidate], now: int) -> int | None:
        scheduled = sum(r.prompt_tokens for r in running)
        by_slack = sorted(range(len(waiting)), key=lambda i: (self._promise(waiting[i]), waiting[i].arrival, i))
        for i in by_slack:
            new = waiting[i]
            if running and scheduled + new.prompt_tokens >= self.max_tokens:
                continue
            if all(self._holds(r, new, running, now) for r in running):
                return i
        return None

    @staticmethod
    def _promise(request: Candidate) -> int:
        return request.arrival + request.slo_ns if request.slo_ns else 1 << 62

    def _holds(self, request: Candidate, new: Candidate, running: Sequence[Candidate], now: int) -> bool:
        if not request.slo_ns:
            return True
        outlasting = sum(other.remaining > request.remaining for other in running)
        work = (new.prompt_tokens + outlasting * request.remaining) * self.token_ns
        return self.load_ns + work + (now - request.arrival) <= request.slo_ns
