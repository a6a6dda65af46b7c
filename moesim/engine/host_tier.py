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

    def touch(self, layer: int, expert: int, nbytes: int) -> bool:
        """Whether the expert was held; it is from now on (its read is the caller's affair)."""
        key = (layer, expert)
        if key in self._held:
            self._held.move_to_end(key)
            return True
        while self._held and self._used + nbytes > self._capacity:
            self._used -= self._held.popitem(last=False)[1]
        if nbytes <= self._capacity:
            self._held[key] = nbytes
            self._used += nbytes
        return False
