"""How the device memory for experts is divided among the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.errors import PolicyError


class Capacity(Protocol):
    """Answers one question: how many of `total` bytes each layer gets, given the bytes of one expert per layer."""

    def split(self, total: int, expert_bytes: Sequence[int], experts: int) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Even:
    """Every layer the same number of slots, earlier layers at most one more; never more than `most`, if given.

    equal: no layer one more: what is left over stays unused, unless there is less than a slot for every layer.
    """

    most: int | None = None
    equal: bool = False

    def __post_init__(self) -> None:
        if self.most is not None and self.most < 1:
            raise PolicyError(f"capacity.most {self.most} must be at least 1 expert; leave the cache out for none")

    def split(self, total: int, expert_bytes: Sequence[int], experts: int) -> tuple[int, ...]:
        each = total // sum(expert_bytes) if self.equal else 0
        sizes = split_by_layer(each * sum(expert_bytes) if each else total, expert_bytes)
        if self.most is None:
            return sizes
        return tuple(min(size, self.most * one) for size, one in zip(sizes, expert_bytes, strict=True))


@dataclass(frozen=True)
class WholeLayers:
    """All experts of as many layers as fit, from the last one back; none of the others, nor of the first `without`."""

    without: int = 0

    def split(self, total: int, expert_bytes: Sequence[int], experts: int) -> tuple[int, ...]:
        sizes = [0] * len(expert_bytes)
        for layer in range(len(expert_bytes) - 1, self.without - 1, -1):
            whole = experts * expert_bytes[layer]
            if whole > total:
                break
            sizes[layer], total = whole, total - whole
        return tuple(sizes)


@dataclass(frozen=True)
class ExpectedLoads:
    """The division that minimises the expected on-demand loads of a token, found by dynamic programming (AdapMoE).

    accuracy: by layer, the chance that a prefetch is right; single: by layer, the share of tokens that the gating
    leaves one expert. Tables of another depth are read at the same relative depth. top_k: experts of the others.
    """

    accuracy: tuple[float, ...]
    single: tuple[float, ...] = (0.0,)
    top_k: int = 2

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise PolicyError(f"capacity.top_k {self.top_k} must be at least 1 expert per token")
        for name in ("accuracy", "single"):
            table = getattr(self, name)
            if not table or not all(0 <= share <= 1 for share in table):
                raise PolicyError(f"capacity.{name} must name shares between 0 and 1, by layer; it is {table}")

    def split(self, total: int, expert_bytes: Sequence[int], experts: int) -> tuple[int, ...]:
        """Even where there is not one slot for every layer; the tables know nothing of bytes, so slots are equal."""
        layers, largest = len(expert_bytes), max(expert_bytes)
        slots = min(total // largest, layers * experts)
        if slots < layers:
            return split_by_layer(total, expert_bytes)
        return tuple(count * largest for count in self._counts(slots, layers, experts))

    def _counts(self, slots: int, layers: int, experts: int) -> tuple[int, ...]:
        return _best_counts(self, slots, layers, experts)

    def loads(self, layers: int, experts: int) -> NDArray[np.float64]:
        """f_l(c) of AdapMoE's released code for c = 1..experts slots: [layers, experts].

        A right prefetch hides one of a token's misses: f = E[misses] - a P(any miss), with experts chosen uniformly;
        for k = 2 and 8 experts this is the code's sum of cases term by term, for other k it is its extension.
        """
        a, r = (at_depth(table, layers)[:, None] for table in (self.accuracy, self.single))
        c = np.arange(1, experts + 1)
        k = min(self.top_k, experts)
        absent = 1 - c / experts
        any_miss = 1 - np.array([comb(int(n), k) for n in c]) / comb(experts, k)
        return r * (1 - a) * absent + (1 - r) * (k * absent - a * any_miss)


@lru_cache(maxsize=256)
def _best_counts(rule: ExpectedLoads, slots: int, layers: int, experts: int) -> tuple[int, ...]:
    """Slots of each layer, at least one, `slots` in all; of equals, more for earlier layers."""
    loads = rule.loads(layers, experts)
    best = np.full(slots + 1, np.inf)
    best[0] = 0.0
    choice = np.zeros((layers, slots + 1), dtype=np.int64)
    for layer in reversed(range(layers)):
        options = np.full((experts, slots + 1), np.inf)
        for count in range(1, min(experts, slots) + 1):
            options[count - 1, count:] = best[:-count] + loads[layer, count - 1]
        flipped = np.argmin(options[::-1], axis=0)  # the most slots among equals
        choice[layer] = experts - flipped
        best = options[::-1][flipped, np.arange(slots + 1)]
    counts, left = [], slots
    for layer in range(layers):
        counts.append(int(choice[layer, left]))
        left -= counts[-1]
    return tuple(counts)


def at_depth(table: Sequence[float], layers: int) -> NDArray[np.float64]:
    """A table by layer, read at the same relative depth of a model of `layers` layers: [layers]."""
    return np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(table)), table)


def split_by_layer(total: int, expert_bytes: Sequence[int]) -> tuple[int, ...]:
    """Device memory of each layer: whole slots dealt out one by one, so that earlier layers hold at most one more."""
    layers = len(expert_bytes)
    rounds = max(total, 0) // sum(expert_bytes)
    left = max(total, 0) - rounds * sum(expert_bytes)
    sizes = [rounds * size for size in expert_bytes]
    for layer in range(layers):
        if left >= expert_bytes[layer]:
            sizes[layer] += expert_bytes[layer]
            left -= expert_bytes[layer]
    return tuple(sizes)
