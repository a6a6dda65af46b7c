"""A scripted timer, and a GPU that computes nothing: tensors of torch's `meta` device have shapes only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.calibrate.device import Device
from moesim.calibrate.timing import Sample, Work
from moesim.units import GIB, MIB


class FakeTimer:
    """Runs the work each time, and says that it took what `script(i)` says of the i-th sample."""

    def __init__(self, script: Callable[[int], Sample] = lambda i: Sample(1e-3), robust: bool = False) -> None:
        self.script, self.robust = script, robust
        self.taken = 0
        self.works: list[Work] = []

    def check(self, work: Work) -> bool:
        self.works.append(work)
        work.run(*work.fresh())
        return True

    def warm_up(self, work: Work) -> float:
        return 1e-4

    def samples(self, work: Work, count: int) -> list[Sample]:
        taken = [self.script(self.taken + i) for i in range(count)]
        self.taken += count
        return taken


class FakeCuda(Device):
    """An H200 as far as shapes go."""

    def synchronize(self) -> None:
        pass

    def apart(self, run: Callable[[], Any]) -> Callable[[], None]:
        run()
        return lambda: None

    def host(self, nbytes: int, pinned: bool) -> Any:
        import torch

        return torch.empty(nbytes, dtype=torch.int8, device="meta")


def fake_cuda(capability: tuple[int, int] = (9, 0), count: int = 1) -> FakeCuda:
    return FakeCuda("cuda", "NVIDIA H200", "meta", 50 * MIB, 130 * GIB, flops=5e13, gbps=300, cores=4,
                    capability=capability, count=count)  # fmt: skip
