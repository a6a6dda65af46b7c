"""Host memory too small for all experts: a page cache of them in front of the NVMe drive."""

from __future__ import annotations

from collections import OrderedDict


class HostTier:
    """LRU over experts in host memory. It starts with as many as fit, expert by expert across the layers."""

    def __init__(self, capacity: int, layers: int, experts: int, expert_bytes: list[int]) -> None:
        self._capacity, self._used = capacity, 0
        self._held: OrderedDict[tuple[int, int], int] = OrderedDict()
        for expert in range(experts):
            for layer in range(layers):
                if self._used + expert_bytes[layer] <= capacity:
                    self._held[layer, expert] = expert_bytes[layer]
                    self._used += expert_bytes[layer]

    def touch(self, layer: int, expert: int) -> bool:
        """Whether the expert is held; it counts as used."""
        key = (layer, expert)
        if key not in self._held:
            return False
        self._held.move_to_end(key)
        return True

    def insert(self, layer: int, expert: int, nbytes: int) -> None:
        """Its read has ended."""
        key = (layer, expert)
        if key in self._held:
            return
        while self._held and self._used + nbytes > self._capacity:
            self._used -= self._held.popitem(last=False)[1]
        if nbytes <= self._capacity:
            self._held[key] = nbytes
            self._used += nbytes
