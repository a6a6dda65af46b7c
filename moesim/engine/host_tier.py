"""Host memory too small for all experts: a page cache of them in front of the NVMe drive."""

from __future__ import annotations

from collections import OrderedDict


class HostTier:
    """LRU over experts in host memory. It starts with as many as fit, expert by expert across the layers."""

    def __init__(self, capacity: int, layers: int, experts: int, expert_bytes: list[int]) -> None:
        self.capacity, self.used = capacity, 0
        self.held: OrderedDict[tuple[int, int], int] = OrderedDict()
        for expert in range(experts):
            for layer in range(layers):
                if self.used + expert_bytes[layer] <= capacity:
                    self.held[layer, expert] = expert_bytes[layer]
                    self.used += expert_bytes[layer]

    def touch(self, layer: int, expert: int) -> bool:
        """Whether the expert is held; it counts as used."""
        key = (layer, expert)
        if key not in self.held:
            return False
        self.held.move_to_end(key)
        return True

    def insert(self, layer: int, expert: int, nbytes: int) -> None:
        """Its read has ended."""
        key = (layer, expert)
        if key in self.held:
            return
        while self.held and self.used + nbytes > self.capacity:
            self.used -= self.held.popitem(last=False)[1]
        if nbytes <= self.capacity:
            self.held[key] = nbytes
            self.used += nbytes
