"""Links and executors: one piece of work at a time, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from moesim.engine.fluid import Fluid

if TYPE_CHECKING:
    import simpy

    from moesim.engine.cache import Entry
    from moesim.engine.clock import Clock


class Copy:
    """One expert on its way to the device."""

    __slots__ = (
        "demand", "entry", "expert", "expires", "flying", "keep", "key", "layer", "link", "nbytes", "on_read", "parts",
        "plan",
        "promoted", "read_end", "size", "stage", "wanted",
    )  # fmt: skip

    def __init__(
        self, layer: int, expert: int, key: int, nbytes: int, parts: int, demand: bool, expires: int, keep: bool
    ) -> None:
        self.layer, self.expert, self.key, self.size, self.nbytes, self.parts = (
            layer,
            expert,
            key,
            nbytes,
            nbytes,
            parts,
        )
        self.demand, self.expires, self.keep = demand, expires, keep
        self.promoted = self.flying = False
        self.entry: Entry | None = None  # its slot, from the moment the copy into device memory starts
        self.link: Link | None = None
        self.stage = 0  # link of its path it is on
        self.on_read: Callable[[], None] | None = None  # where the CPU waits for it in host memory
        self.read_end = -1  # when the NVMe read behind it ended
        self.plan = 0.0
        self.wanted: tuple[int, int, int] | None = None  # (tick, next use, tokens) of the step that waits for it


class Executor:
    """First come, first served; reports when each piece is done."""

    def __init__(self, env: Clock, fluid: Fluid, uses: tuple[str, ...]) -> None:
        self._env, self._fluid, self._uses = env, fluid, uses
        self._queue: deque[tuple[int, int, Callable[[simpy.Event | None], None]]] = deque()
        self._busy = False
        self.started = 0  # when the present piece began
        self.busy_ns = 0
        self.nbytes = 0

    def submit(self, nbytes: int, alone_ns: int, done: Callable[[simpy.Event | None], None]) -> None:
        self._queue.append((nbytes, alone_ns, done))
        if not self._busy:
            self._start()

    def _start(self) -> None:
        nbytes, alone_ns, _ = self._queue[0]
        self._busy, self.started = True, self._env.now
        self._fluid.run(nbytes, alone_ns, self._uses, self._finished)

    def _finished(self, event: simpy.Event | None) -> None:
        nbytes, _, done = self._queue.popleft()
        self.busy_ns += self._env.now - self.started
        self.nbytes += nbytes
        self._busy = False
        done(event)
        if self._queue and not self._busy:
            self._start()


class Link:
    """One copy engine: demand before prefetch, first come first served within a class, never preempted.

    reserve(copy) takes a slot or says that none is free; then the head waits, and nothing of its class passes it.
    passed(copy) tells that the layer a prefetch was meant for is over. `landed(copy)` receives what arrived.
    """

    def __init__(
        self,
        env: Clock,
        fluid: Fluid,
        uses: tuple[str, ...],
        part_ns: Callable[[int], int],
        *,
        reserve: Callable[[Copy], bool],
        passed: Callable[[Copy], bool],
        drop: Callable[[Copy], None],
        landed: Callable[[Copy], None],
        record: Callable[[Copy, int, int, int], None] | None,
    ) -> None:
        self._env, self._fluid, self._uses, self._part_ns = env, fluid, uses, part_ns
        self._reserve, self._passed, self._drop, self._landed, self._record = reserve, passed, drop, landed, record
        self._demand: deque[Copy] = deque()
        self._prefetch: deque[Copy] = deque()
        self._busy = False
        self._copy: Copy
        self.started = self._part = 0  # when the present copy, or the present part of it, set out
        self.flight: simpy.Event | None = None  # ends with the present copy, where nothing shares its bandwidth
        self.busy_ns = 0
        self.nbytes = 0

    @property
    def busy(self) -> bool:
        return self._busy

    def submit(self, copy: Copy) -> None:
        copy.link = self
        (self._demand if copy.demand else self._prefetch).append(copy)
        if not self._busy:
            self.kick()

    def promote(self, copy: Copy) -> None:
        """The router wants a queued prefetch: it joins the demands; its old place is skipped."""
        copy.demand = copy.promoted = True
        if copy.flying:
            return
        self._demand.append(copy)
        if not self._busy:
            self.kick()

    def kick(self) -> None:
        """Start the next copy if the engine is idle and a slot can be had."""
        if self._busy:
            return
        demand, prefetch = self._demand, self._prefetch
        if demand:
            if demand[0].entry is not None or self._reserve(demand[0]):
                self._start(demand.popleft())
            else:
                self._go_on()
            return
        while prefetch:
            copy = prefetch[0]
            if copy.demand:
                prefetch.popleft()
            elif copy.entry is None and self._passed(copy):
                self._drop(prefetch.popleft())
            else:
                if copy.entry is not None or self._reserve(copy):
                    self._start(prefetch.popleft())
                return

    def _go_on(self) -> None:
        """The first demand waits for a slot: an expert of which some matrices have come goes on, and frees its slot."""
        begun = next((copy for copy in self._demand if copy.entry is not None), None)
        if begun is not None:
            self._demand.remove(begun)
            self._start(begun)
        elif self._prefetch and self._prefetch[0].entry is not None and not self._prefetch[0].demand:
            self._start(self._prefetch.popleft())

    def _start(self, copy: Copy) -> None:
        self._busy = copy.flying = True
        self._copy, self.started = copy, self._env.now
        self._part = part = -(-copy.nbytes // copy.parts) if copy.parts > 1 else copy.nbytes
        self.flight = self._fluid.run(part, self._part_ns(part), self._uses, self._finished)

    def _finished(self, _: simpy.Event | None) -> None:
        copy, part, now = self._copy, self._part, self._env.now
        self.busy_ns += now - self.started
        self.nbytes += part
        if self._record is not None:
            self._record(copy, self.started, now, part)
        self._busy = copy.flying = False
        self.flight = None
        copy.nbytes -= part
        copy.parts -= 1
        if copy.parts:
            (self._demand if copy.demand else self._prefetch).appendleft(copy)
        else:
            self._landed(copy)
        if not self._busy:
            self.kick()
