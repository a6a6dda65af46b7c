"""Prompts that begin as an earlier one did: blocks of KV that are kept by the hash of all tokens up to their end."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

from moesim.workload_files import PREFIX_BLOCK


class Prefixes:
    """Blocks in use by sequences, and idle ones, which leave least recently used first, deeper ones before those they
    build on. A block that two sequences have computed at the same time is kept once, as SGLang's radix tree does.

    bytes_at(tokens): KV bytes of one sequence of so many tokens.
    """

    def __init__(self, bytes_at: Callable[[int], int]) -> None:
        self._bytes_at = bytes_at
        self._users: dict[int, int] = {}
        self._idle: dict[int, int] = {}  # bytes, in the order in which they are to leave
        self.used_bytes = self.idle_bytes = 0

    def _bytes(self, depth: int) -> int:
        return self._bytes_at((depth + 1) * PREFIX_BLOCK) - self._bytes_at(depth * PREFIX_BLOCK)

    def known(self, blocks: SequenceOf[int], tokens: int) -> int:
        """How many of the first blocks are here; at most so many that one of `tokens` is left to compute."""
        most, count = min(len(blocks), (tokens - 1) // PREFIX_BLOCK), 0
        while count < most and (blocks[count] in self._users or blocks[count] in self._idle):
            count += 1
        return count

    def woken_bytes(self, blocks: SequenceOf[int]) -> int:
        """Of those blocks, what is idle now."""
        return sum(self._idle.get(block, 0) for block in blocks)

    def use(self, block: int, depth: int) -> None:
        """A sequence found this block here, or has computed it; depth: how many blocks come before it."""
        if block in self._idle:
            self.idle_bytes -= self._idle.pop(block)
        users = self._users.get(block, 0)
        self._users[block] = users + 1
        if not users:
            self.used_bytes += self._bytes(depth)

    def leave(self, blocks: SequenceOf[int]) -> None:
        """A sequence is done with the first blocks of its prompt."""
        for depth in range(len(blocks) - 1, -1, -1):
            block = blocks[depth]
            self._users[block] -= 1
            if not self._users[block]:
                del self._users[block]
                size = self._bytes(depth)
                self._idle[block] = size
                self.used_bytes -= size
                self.idle_bytes += size

    def shrink(self, room: int) -> None:
        """Idle blocks leave until they take at most `room` bytes."""
        while self.idle_bytes > max(room, 0):
            self.idle_bytes -= self._idle.pop(next(iter(self._idle)))
