"""What serving asks of a device: consecutive forward passes of the same sequences."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import simpy

NO_LIMIT = 1 << 62


class Standstill(Exception):
    """Nothing can go on after `now` ns."""

    def __init__(self, now: int) -> None:
        super().__init__(now)
        self.now = now


@dataclass(eq=False)
class Batch:
    """One forward pass, or several in which the same sequences decode one token each.

    rows: trace rows in service order, pass after pass; first: where each pass begins, and their number [passes + 1].
    tail: the rows after the last pass, for beliefs that reach across tokens.
    prefill: (new tokens, tokens already cached) of each chunk, in a single pass; contexts: tokens cached of each
    decoding sequence before the first pass. kv_bytes: of all caches, in each pass.
    until: no pass but the first starts at or after this time. members: the requests' numbers, decoding ones first.
    """

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    tail: NDArray[np.int64]
    prefill: list[tuple[int, int]]
    contexts: list[int]
    kv_bytes: NDArray[np.int64]
    until: int = NO_LIMIT
    members: Sequence[int] = ()

    @property
    def passes(self) -> int:
        return len(self.first) - 1

    @property
    def sequences(self) -> int:
        return len(self.prefill) + len(self.contexts)

    def rows_of(self, i: int) -> NDArray[np.int64]:
        return self.rows[self.first[i] : self.first[i + 1]]

    def next_rows_of(self, i: int) -> NDArray[np.int64]:
        return self.rows_of(i + 1) if i + 1 < self.passes else self.tail

    def contexts_of(self, i: int) -> list[int]:
        return [context + i for context in self.contexts]


def one_pass(
    rows: Sequence[int] | NDArray[np.int64],
    tail: Sequence[int] | NDArray[np.int64] = (),
    prefill: Sequence[tuple[int, int]] = (),
    contexts: Sequence[int] = (),
) -> Batch:
    """A single forward pass."""
    own, after = np.array(rows, dtype=np.int64), np.array(tail, dtype=np.int64)
    return Batch(own, np.array([0, len(own)]), after, list(prefill), list(contexts), np.zeros(1, dtype=np.int64))


class Stepper(Protocol):
    """What serving needs of a device; each returns when the simulated time has passed."""

    def steps(self, batch: Batch) -> Generator[simpy.Event, None, Sequence[int]]:
        """Run the passes; returns when each of those that were run ended."""
        ...

    def idle(self, gap: int) -> Generator[simpy.Event, None, None]:
        """Nothing to serve for `gap` ns."""
        ...
