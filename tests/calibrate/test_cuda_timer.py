"""The CUDA timer against a recording of what it asks of torch.cuda; and what NVML answers mean."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from moesim.calibrate.clocks import Clocks  # noqa: E402
from moesim.calibrate.timers import CudaTimer  # noqa: E402
from moesim.calibrate.timing import Work, measure  # noqa: E402
from tests.calibrate.fakes import fake_cuda  # noqa: E402


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


@pytest.fixture
def log(monkeypatch):
    """torch.cuda replaced by functions that write down their names; an event pair is 2 ms apart."""
    calls: list[str] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, other):
            return 2.0

    class Graph:
        def replay(self):
            calls.append("replay")

    for name, fake in {
        "Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream,
        "_sleep": lambda cycles: calls.append("hold"), "stream": lambda s: nullcontext(),
        "graph": lambda g: nullcontext(),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda self: calls.append("flush"))
    return calls


def timer(log, throttled=False):
    device = fake_cuda()
    device.synchronize = lambda: log.append("wait")
    return CudaTimer(device, SimpleNamespace(throttled=lambda: throttled))


def test_the_stream_is_held_while_runs_are_queued(log):
    work = Work(lambda: log.append("run"))
    made = timer(log)
    made.warm_up(work)
    log.clear()
    samples = made.samples(work, 2)
    assert log == ["hold", *["flush", "record", "run", "record"] * 2, "wait"]
    assert [sample.seconds for sample in samples] == [2e-3, 2e-3]


def test_many_small_kernels_are_replayed_as_a_graph(log):
    work = Work(lambda: log.append("run"), graph=True)
    made = timer(log)
    made.warm_up(work)
    log.clear()
    made.samples(work, 1)
    assert log == ["hold", "flush", "record", "replay", "record", "wait"]


def test_wall_time_starts_on_an_idle_device(log):
    work = Work(lambda: log.append("run"), wall=True)
    made = timer(log)
    made.warm_up(work)
    log.clear()
    made.samples(work, 1)
    assert log == ["flush", "wait", "run"]


def test_samples_of_a_throttled_gpu_are_disturbed(log):
    work = Work(lambda: None)
    made = timer(log, throttled=True)
    made.warm_up(work)
    assert all(sample.disturbed for sample in made.samples(work, 3))


def test_the_method_runs_on_it(log):
    timing = measure(Work(lambda: None), timer(log))
    assert timing.seconds == 2e-3 and timing.n == 6


def nvml(reasons: int):
    names = {
        "nvmlClocksThrottleReasonHwSlowdown": 8, "nvmlClocksThrottleReasonSwThermalSlowdown": 32,
        "nvmlClocksThrottleReasonHwThermalSlowdown": 64, "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": 128,
        "NVML_CLOCK_SM": 1, "NVML_CLOCK_MEM": 2, "NVML_TEMPERATURE_GPU": 0,
    }  # fmt: skip

    def refuse(*_):
        raise RuntimeError("not supported")

    return SimpleNamespace(
        **names,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda h: reasons,
        nvmlDeviceGetPowerUsage=lambda h: 650_500,
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 700_000,
        nvmlDeviceGetClockInfo=lambda h, kind: {1: 1980, 2: 3201}[kind],
        nvmlDeviceGetTemperature=refuse,
        nvmlDeviceGetCurrPcieLinkGeneration=lambda h: 5,
        nvmlDeviceGetCurrPcieLinkWidth=lambda h: 16,
        nvmlSystemGetDriverVersion=lambda: b"580.1",
    )


@pytest.mark.parametrize(("reasons", "throttled"), [(0, False), (4, False), (1, False), (8, True), (64 | 4, True)])
def test_a_power_cap_is_no_throttling(reasons, throttled):
    clocks = Clocks(0)
    clocks._nvml, clocks._handle = nvml(reasons), object()
    assert clocks.throttled() is throttled


def test_conditions_name_what_could_not_be_read():
    clocks = Clocks(0)
    clocks._nvml, clocks._handle = nvml(0), object()
    assert clocks.conditions() == {
        "sm_mhz": 1980, "memory_mhz": 3201, "power_w": 650.5, "power_limit_w": 700.0, "temperature_c": None,
        "pcie_gen": 5, "pcie_width": 16,
    }  # fmt: skip
    assert clocks.driver() == "580.1"


def test_without_the_library_nothing_is_claimed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    clocks = Clocks(0)
    assert clocks.conditions() == {} and clocks.driver() is None and not clocks.throttled()
