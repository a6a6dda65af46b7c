"""Shared bandwidth: activities run at their own rate until a resource they share is oversubscribed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import simpy
from simpy.events import Timeout

from moesim.engine.clock import Clock


def fair_rates(own: Sequence[float], uses: Sequence[Sequence[str]], capacity: Mapping[str, float]) -> list[float]:
    """Max-min fair rates: all rise together until each meets its own rate or a full resource.

    own: rate of each activity alone; uses: resources each one draws on, one unit per unit of rate; same unit as
    `capacity`.
    """
    rates = [0.0] * len(own)
    left = dict(capacity)
    rising = [i for i, rate in enumerate(own) if rate > 0]
    while rising:
        users = {name: sum(name in uses[i] for i in rising) for name in left}
        rise = min(own[i] - rates[i] for i in rising)
        rise = min([rise, *(left[name] / count for name, count in users.items() if count)])
        for i in rising:
            rates[i] += rise
        for name, count in users.items():
            left[name] -= rise * count
        full = {name for name in left if left[name] <= 1e-12 * capacity[name]}
        rising = [i for i in rising if own[i] - rates[i] > 1e-12 * own[i] and not full.intersection(uses[i])]
    return rates


class Flow:
    """One activity under way: `left` bytes at `rate` bytes/ns since `since`."""

    __slots__ = ("done", "end", "left", "own", "rate", "since", "uses", "version")

    def __init__(
        self,
        left: float,
        own: float,
        uses: tuple[str, ...],
        now: int,
        end: int,
        done: Callable[[simpy.Event | None], None],
    ):
        self.left, self.own, self.rate, self.uses = left, own, own, uses
        self.since, self.end, self.done, self.version = now, end, done, 0


class Fluid:
    """The resources of one host. An activity that never met contention ends exactly after its time alone."""

    def __init__(self, env: Clock, capacity: Mapping[str, float]) -> None:
        self._env = env
        self._capacity = dict(capacity)  # bytes per ns
        self._flows: list[Flow] = []
        self._throttled = False

    def run(
        self, nbytes: int, alone_ns: int, uses: tuple[str, ...], done: Callable[[simpy.Event | None], None]
    ) -> simpy.Event | None:
        """Call `done` when `nbytes` have passed; they would take `alone_ns` on an idle machine.

        Returns the event of the end where it is certain already, None where others share the bandwidth.
        """
        if self._capacity:
            uses = tuple(name for name in uses if name in self._capacity)
        if not self._capacity or not uses or not nbytes or not alone_ns:
            end = Timeout(self._env, alone_ns)
            end.callbacks.append(done)
            return end
        now = self._env.now
        flow = Flow(float(nbytes), nbytes / alone_ns, uses, now, now + alone_ns, done)
        self._flows.append(flow)
        self._schedule(flow)
        self._share()
        return None

    def _share(self) -> None:
        """Give every flow its rate; only those whose rate changes get a new end."""
        load = dict.fromkeys(self._capacity, 0.0)
        for flow in self._flows:
            for name in flow.uses:
                load[name] += flow.own
        if not self._throttled and all(load[name] <= self._capacity[name] for name in load):
            return
        rates = fair_rates([f.own for f in self._flows], [f.uses for f in self._flows], self._capacity)
        now = self._env.now
        for flow, rate in zip(self._flows, rates, strict=True):
            if abs(rate - flow.rate) > 1e-9 * flow.own:
                flow.left -= flow.rate * (now - flow.since)
                flow.since, flow.rate = now, rate
                flow.end = now + max(0, math.ceil(flow.left / rate - 1e-6))
                self._schedule(flow)
        self._throttled = any(f.rate < f.own * (1 - 1e-9) for f in self._flows)

    def _schedule(self, flow: Flow) -> None:
        flow.version += 1
        version = flow.version

        def ended(_: simpy.events.Event) -> None:
            if flow.version == version:  # an end that was moved leaves its old event behind
                self._flows.remove(flow)
                self._share()
                flow.done(None)

        Timeout(self._env, flow.end - self._env.now).callbacks.append(ended)
