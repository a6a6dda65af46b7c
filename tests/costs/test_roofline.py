"""Primitives: hand-computed anchors, and that more work is never cheaper nor more bandwidth slower."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.costs.roofline import Roofline
from moesim.efficiencies import SCALES, Efficiencies, terms
from moesim.errors import MachineError
from moesim.machine import Machine, catalogue, load_machine

# every share 1, every fixed cost 0: the bare roofline
IDEAL = tuple(
    (name, {"us": 0.0, "Gweights/s": 1e9, "GFLOP/s": 1e9}.get(term.unit, 1.0)) for name, term in terms().items()
)
machines = st.sampled_from(list(catalogue().values()))
scales = st.sampled_from(SCALES)
counts = st.integers(1, 10_000)
sizes = st.integers(1, 10**9)
work = st.tuples(counts, sizes, counts)  # tokens, bytes, experts
more = st.tuples(st.integers(0, 1000), st.integers(0, 10**8), st.integers(0, 100))


def ideal(name: str = "a100") -> Machine:
    return replace(load_machine(name), efficiencies=IDEAL)


def test_anchor_gemm() -> None:
    """2039 MB on an A100 take 1 ms; 156 GFLOP take 0.5 ms; rounded corner: 4-norm of both."""
    costs = Roofline(ideal())
    assert costs.gemm(1, 1, 2039e6) == pytest.approx(1e-3)
    assert costs.gemm(78, 1e9, 0) == pytest.approx(0.5e-3)
    assert costs.gemm(78, 1e9, 2039e6) == pytest.approx((1e-3**4 + 0.5e-3**4) ** 0.25)


def test_anchor_fp8_weights_use_fp8_cores() -> None:
    costs = Roofline(ideal("h200"))
    sixteen, eight, q8 = (costs.gemm(10**4, 10**8, 0, bits) for bits in (16, 8, 8.5))
    assert sixteen == pytest.approx(2 * eight)
    assert q8 == sixteen


def test_anchor_grouped() -> None:
    """Two experts of 500 MB and 4 pairs that move 9.75 MB each: 1039 MB."""
    costs = Roofline(ideal())
    assert costs.grouped(2, 4, params=1, nbytes=500e6, pair_bytes=9.75e6, bits=16) == pytest.approx(1039 / 2039e3)


def test_anchor_copy() -> None:
    """Mixtral's 352 MB over PCIe Gen4: 13.8 ms; three copies pay the fixed time three times."""
    costs = Roofline(load_machine("rtx-4090"))
    overhead = terms()["copy_us"].default * 1e-6
    assert costs.copy(352_321_536) == pytest.approx(352_321_536 / 25.5e9 + overhead)
    assert costs.copy(352_321_536, 3) - costs.copy(352_321_536) == pytest.approx(2 * overhead)


def test_anchor_host_expert() -> None:
    """77 GB/s x 0.85; with the cores as the limit: 1e8 weights at 1/23.3 + 2/180 ns each over 16 cores."""
    costs = Roofline(load_machine("rtx-4090"))
    assert costs.host_expert(1, 10**8, 10**9) == pytest.approx(1 / (77 * 0.85))
    assert costs.host_expert(1, 10**8, 0) == pytest.approx(1e-9 * 1e8 * (1 / 23.3 + 2 / 180) / 16)


def test_pageable_memory_and_transfer_overhead() -> None:
    machine = load_machine("rtx-4090")
    pageable = replace(machine, host=replace(machine.host, pinned=False))
    assert Roofline(pageable).copy_gbps == pytest.approx(25.5 * terms()["pageable"].default)
    exact = replace(machine, pcie=replace(machine.pcie, overhead_us=7.0))
    assert [Roofline(exact, scale).copy(0) for scale in SCALES] == [7e-6] * 3


def test_two_sockets() -> None:
    """Duplicated experts: 1.4 times one socket; spread over both: half of one, and copies are no faster."""
    machine = load_machine("h200")
    one = Roofline(machine)
    both = Roofline(replace(machine, host=replace(machine.host, sockets=2, numa_duplicated=True)))
    split = Roofline(replace(machine, host=replace(machine.host, sockets=2)))
    assert both.host_gbps == pytest.approx(1.4 * one.host_gbps)
    assert split.host_gbps == pytest.approx(0.5 * one.host_gbps)
    assert split.dram_gbps == one.dram_gbps


def test_graph_switch_costs_every_layer() -> None:
    machine = load_machine("rtx-a6000")
    extra = Roofline(machine, graph=False).layer(0) - Roofline(machine).layer(0)
    assert extra == pytest.approx(740e-6)


def test_unified_memory_has_no_copies() -> None:
    costs = Roofline(load_machine("strix-halo"))
    assert costs.copy(10**9) == 0
    assert costs.dram_gbps == 256


def test_no_drive_is_an_error_when_read() -> None:
    with pytest.raises(MachineError, match="has no NVMe drive"):
        Roofline(replace(load_machine("t4"), nvme=None)).read(1)


def test_nothing_costs_nothing() -> None:
    costs = Roofline(load_machine("t4"))
    assert costs.gemm(0, 10, 10) == costs.gemm(10, 0, 0) == costs.host_expert(0, 10, 10) == 0
    assert costs.grouped(0, 0, params=10, nbytes=10, pair_bytes=1, bits=16) == 0


def every(costs: Roofline, tokens: int, nbytes: int, active: int) -> list[float]:
    """Every primitive, in one order."""
    return [
        costs.gemm(tokens, nbytes, nbytes),
        costs.grouped(active, active + tokens, params=nbytes, nbytes=nbytes, pair_bytes=8, bits=8),
        costs.attention(nbytes, tokens * 1e6),
        costs.layer(nbytes),
        costs.step(tokens),
        costs.host_expert(tokens, nbytes, nbytes),
        costs.copy(nbytes, active),
        costs.read(nbytes),
        costs.ceiling(nbytes, tokens * 1e6),
        costs.handoff(),
        costs.routing(),
    ]


@given(machines, scales, work, more)
def test_more_work_is_never_cheaper(machine, scale, base, extra) -> None:
    costs = Roofline(machine, scale)
    less = every(costs, *base)
    grown = every(costs, *(a + b for a, b in zip(base, extra, strict=True)))
    assert all(a <= b * (1 + 1e-12) for a, b in zip(less, grown, strict=True))


@given(machines, st.floats(1, 4), counts, sizes, counts)
def test_more_bandwidth_is_never_slower(machine, factor, tokens, nbytes, active) -> None:
    gpu, host, pcie, nvme = machine.gpu, machine.host, machine.pcie, machine.nvme
    assert nvme is not None
    faster = replace(
        machine,
        gpu=replace(gpu, hbm_gbps=gpu.hbm_gbps * factor, tflops=gpu.tflops * factor),
        host=replace(host, dram_gbps=host.dram_gbps * factor),
        pcie=replace(pcie, gbps=pcie.gbps * factor),
        nvme=replace(nvme, gbps=nvme.gbps * factor),
    )
    old, new = every(Roofline(machine), tokens, nbytes, active), every(Roofline(faster), tokens, nbytes, active)
    assert all(b <= a * (1 + 1e-12) for a, b in zip(old, new, strict=True))


@given(machines, counts, sizes, counts)
def test_the_band_encloses_the_default(machine, tokens, nbytes, active) -> None:
    low, default, high = (every(Roofline(machine, scale), tokens, nbytes, active) for scale in SCALES)
    assert all(c <= b * (1 + 1e-12) and b <= a * (1 + 1e-12) for a, b, c in zip(low, default, high, strict=True))


@given(machines, counts, sizes, counts)
def test_nothing_beats_the_ceiling(machine, tokens, nbytes, active) -> None:
    costs = Roofline(machine, "high")
    bare = costs.ceiling(nbytes, 2 * tokens * nbytes)
    assert costs.gemm(tokens, nbytes, nbytes) >= bare * 0.999
    assert costs.grouped(1, tokens, params=nbytes, nbytes=nbytes, pair_bytes=0, bits=8) >= bare * 0.999


def test_weights_that_are_not_repacked_are_multiplied_more_slowly() -> None:
    """ik_llama.cpp discussion 258: 7.7 instead of 18.5 Gweights/s a core; 16 bits lie as they are."""
    machine = load_machine("rtx-4090")
    machine = replace(machine, host=replace(machine.host, dram_gbps=1e6))
    plain, repacked = (Roofline(machine, repacked=one) for one in (False, True))
    rates = [10**8 / costs.host_expert(1, 10**8, 10**8 / 3) / machine.host.cores / 1e9 for costs in (plain, repacked)]
    assert rates == [pytest.approx(7.7, rel=0.02), pytest.approx(18.5, rel=0.01)]
    assert plain.host_expert(1, 10**8, 2e8) == repacked.host_expert(1, 10**8, 2e8)


@pytest.mark.parametrize("name", Efficiencies.__dataclass_fields__)
def test_every_term_changes_something(name: str) -> None:
    """No term is decoration: halving or doubling it changes a primitive on some machine."""
    machine = load_machine("h200")
    host = replace(machine.host, sockets=2, numa_duplicated=name != "numa_split", pinned=name != "pageable")
    platform = name.removeprefix("dram_") if name.startswith("dram_") else "desktop"
    platform = "server" if name == "core_server" else platform
    machine = replace(machine, host=replace(host, platform=platform), network_gbps=50.0)

    def answers(**given: float) -> list[object]:
        one = replace(machine, efficiencies=tuple(given.items()))
        costs = Roofline(one, graph=False, repacked=name != "core_plain", native=name == "step_native_us")
        rates = [costs.copy_gbps, costs.duplex_gbps, costs.host_gbps, costs.read_gbps]
        small, large = every(costs, 1, 1000, 1), every(costs, 5000, 10**8, 4)
        apart = Roofline(replace(costs.machine, gpu=replace(machine.gpu, nvlink_gbps=None)))
        exchanges = [one.exchange("all_reduce", 10**8, 8) for one in (costs, apart)]
        exchanges.append(costs.exchange_between_hosts("dispatch", 10**8, 16, 2))
        alone = costs.attention(0, 1e12), costs.host_expert(1, 10**8, 1), costs.launches(1)
        return [*rates, *small, *large, *exchanges, *alone]

    value = terms()[name].default
    assert answers(**{name: value}) == answers()
    assert (
        answers(**{name: value * (1.5 if name == "duplex" else 0.5) / (1.0 if name != "duplex" else 1.2)}) != answers()
    )


def two_hosts(gpus=16, hosts=2):
    return replace(load_machine("h100-sxm"), profile="", gpus=gpus, hosts=hosts, network_gbps=50.0)


@pytest.mark.parametrize(
    ("gpus", "width", "measured_us", "within"),
    [
        (16, 1, 118, 0.03), (32, 1, 155, 0.03), (16, 2, 195, 0.03), (32, 2, 273, 0.03),  # what the terms come from
        (128, 1, 192, 0.06), (128, 2, 369, 0.13),  # left out
    ],
)  # fmt: skip
def test_exchanges_between_hosts_are_those_of_deepep(gpus, width, measured_us, within):
    """Low-latency kernels on H800 with 400 Gb/s each: 128 tokens of 7168 for 8 experts (deepseek-ai/DeepEP)."""
    costs = Roofline(two_hosts(gpus, gpus // 8))
    seconds = costs.exchange_between_hosts("dispatch", 128 * 8 * 7168 * width, gpus, gpus // 8)
    assert seconds * 1e6 == pytest.approx(measured_us, rel=within)


def test_what_crosses_the_network_by_hand():
    """Sixteen GPUs in two hosts, 16 MB: half of it is outside; of a gather each of eight takes an eighth."""
    costs = Roofline(two_hosts())
    e, mb = costs.terms, 1_000_000
    within = {what: costs.exchange(what, 16 * mb, 8) for what in ("all_to_all", "all_gather", "reduce_scatter")}

    def network(nbytes):
        return e.network_us * 1e-6 + nbytes / (50e9 * e.network)

    def between(what):
        return costs.exchange_between_hosts(what, 16 * mb, 16, 2)

    assert between("all_to_all") == pytest.approx(max(within["all_to_all"], network(8 * mb)))
    assert between("all_gather") == pytest.approx(within["all_gather"] + network(mb))
    assert between("all_reduce") == pytest.approx(between("all_gather") + between("reduce_scatter"))
    assert costs.exchange_between_hosts("all_reduce", 16 * mb, 8, 1) == costs.exchange("all_reduce", 16 * mb, 8)
    assert between("dispatch") > costs.exchange("dispatch", 16 * mb, 16), "a network is slower than NVLink"
