"""Seconds from bytes and operations: rooflines with measured efficiencies and fixed costs (docs/costs.md).

Every primitive is `fixed + soft roofline`, so it never falls when tokens, bytes or experts grow, and never rises
when a bandwidth or an operation rate does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moesim.costs.families import sparse_weight_bytes
from moesim.costs.sparse import compute_gain, memory_gain
from moesim.efficiencies import efficiencies
from moesim.errors import MachineError
from moesim.machine import Machine

if TYPE_CHECKING:
    from moesim.model import Model


SMALL_IN_LAYER = 5  # small kernels of a layer, which take `layer_us` together: LLMServingSim dense.csv


class Attended(NamedTuple):
    """Shape of one attention kernel: `sequences`, each with `tokens` new tokens after `past` cached ones, of which each
    sees at most `window` if that is not 0; tokens 0 is decoding: one new token that sees `past`, itself included."""

    sequences: int
    tokens: float
    past: float
    window: int = 0


class Roofline:
    """The primitives a cost table is made of, for one device of `machine`.

    scale: `low` and `high` take the pessimistic and optimistic end of every term: the band of a prediction that rests
    on specification sheets. graph: kernels are launched as CUDA graphs. repacked: weights of experts on the CPU lie as
    its kernels want them, not as the file has them. native: the engine is a compiled program, as llama.cpp is.
    """

    label = "specification-sheet"
    sparse_measured = False

    def __init__(
        self, machine: Machine, scale: str = "default", graph: bool = True, repacked: bool = True, native: bool = False
    ) -> None:
        self.machine = machine
        self.terms = e = efficiencies(scale, machine.efficiencies)
        gpu, host, pcie = machine.gpu, machine.host, machine.pcie
        self._hbm = gpu.hbm_gbps * 1e9
        self._flops = gpu.tflops * 1e12
        self._flops8 = (gpu.fp8_tflops or gpu.tflops) * 1e12
        self._plain = 1.0 if repacked else e.core_plain
        self._step_s = (e.step_native_us if native else e.step_us) * 1e-6
        self._eager = 0.0 if graph else e.eager_us * 1e-6
        share = {"desktop": e.dram_desktop, "workstation": e.dram_workstation, "server": e.dram_server}
        numa = (e.numa_duplicated if host.numa_duplicated else e.numa_split) ** math.log2(host.sockets)
        dram = gpu.hbm_gbps if machine.unified else host.dram_gbps
        self.dram_gbps = dram * max(numa, 1.0)  # what every reader of host memory shares
        self.host_gbps = dram * numa * share[host.platform]  # what expert kernels reach
        self._cores = host.cores * e.numa_cores ** math.log2(host.sockets)
        self._core_gflops = e.core_gflops * (e.core_server if host.platform == "server" else 1.0)
        self.copy_gbps = pcie.gbps * e.link * (1.0 if host.pinned else e.pageable)
        self.duplex_gbps = max(self.copy_gbps, pcie.duplex_gbps or pcie.gbps * e.duplex)
        self.read_gbps = machine.nvme.gbps * e.nvme if machine.nvme else 0.0
        self._copy_s = (e.copy_us if pcie.overhead_us is None else pcie.overhead_us) * 1e-6
        nvme_us = machine.nvme.overhead_us if machine.nvme else None
        self._read_s = (e.nvme_us if nvme_us is None else nvme_us) * 1e-6

    def serving(self, model: Model) -> Roofline:
        """The same costs for one model; a roofline needs no shapes beyond what it is asked."""
        return self

    # The GPU

    def gemm(
        self, rows: int, params: float, nbytes: float, bits: float = 16, kernels: int = 1, depth: float = 0
    ) -> float:
        """`rows` tokens times `params` weights of `nbytes` in all, in `kernels` kernels; 0 rows cost nothing.

        depth: inputs of each matrix, which only fitted costs need; 0: as many as the model is wide.
        """
        if not rows or not params:
            return 0.0
        e = self.terms
        memory = nbytes / (self._hbm * e.hbm)
        compute = 2 * rows * params / (self._rate(bits) * e.mfu)
        return kernels * e.kernel_us * 1e-6 + _soft(memory, compute)

    def sparse_gemm(self, rows: int, n: int, k: int) -> float:
        """`rows` tokens times an n x k matrix of 16-bit weights kept 2:4 sparse, the positions' 2 bits each included.

        Few rows: half the bytes at a rate that makes them as slow as published; many: the published gain in rate.
        """
        if not rows:
            return 0.0
        e = self.terms
        dense_bytes, kept = 2.0 * n * k, sparse_weight_bytes(n, k, "fp16", "2:4")
        rate = self._hbm * e.hbm * memory_gain() * kept / dense_bytes
        compute = 2 * rows * n * k / (self._flops * e.mfu * compute_gain(self.machine.gpu.sm))
        return e.kernel_us * 1e-6 + _soft(kept / rate, compute)

    def grouped(self, active: int, pairs: int, *, params: int, nbytes: float, pair_bytes: float, bits: float) -> float:
        """`pairs` (token, expert) pairs over `active` experts of `params` weights and `nbytes` each, in one kernel.

        pair_bytes: activations read and written per pair.
        """
        if not active or not pairs:
            return 0.0
        e = self.terms
        memory = (active * nbytes + pairs * pair_bytes) / (self._hbm * e.hbm_grouped)
        compute = 2 * pairs * params / (self._rate(bits) * e.mfu_grouped)
        return e.grouped_us * 1e-6 + _soft(memory, compute)

    many_at_once = True  # whether `attention` takes arrays

    def attention(self, nbytes: float, flops: float, shape: Attended | None = None) -> float:
        """One attention kernel that reads `nbytes` of keys and values and needs `flops`; fitted costs need `shape`."""
        e = self.terms
        memory = nbytes / (self._hbm * e.hbm_attention)
        return e.attention_us * 1e-6 + _soft(memory, flops / (self._flops * e.mfu_attention))

    def layer(self, nbytes: float) -> float:
        """A layer's small kernels, which move `nbytes` of activations, and its launch outside a CUDA graph."""
        return self._eager + self.terms.layer_us * 1e-6 + nbytes / (self._hbm * self.terms.hbm)

    def small(self, kernels: int, nbytes: float) -> float:
        """So many small kernels, which move `nbytes` of activations together, once launched."""
        return kernels / SMALL_IN_LAYER * self.terms.layer_us * 1e-6 + nbytes / (self._hbm * self.terms.hbm)

    def launches(self, kernels: int) -> float:
        """The host launches so many kernels one by one, outside a CUDA graph."""
        return kernels * self.terms.launch_us * 1e-6

    def routing(self) -> float:
        """The host reads a layer's routing before it can bring experts in."""
        return self.terms.route_us * 1e-6

    def step(self, sequences: int) -> float:
        """The host's work for one step, sampling for `sequences` sequences included."""
        sample = self.terms.sample_us * (0.9 + 0.1 * sequences) if sequences else 0.0
        return self._step_s + sample * 1e-6

    # The host and the links

    def host_expert(self, tokens: int, params: int, nbytes: float) -> float:
        """One expert on the CPU: reading it from DRAM or unpacking and multiplying it, whichever takes longer."""
        if not tokens:
            return 0.0
        share = self._plain if nbytes < 2 * params else 1.0  # 16 bits are as they are
        per_weight = (1 / self.terms.core_gweights + 2 * tokens / self._core_gflops) / share
        return 1e-9 * max(nbytes / self.host_gbps, params * per_weight / self._cores)

    def handoff(self) -> float:
        """A layer with experts on the CPU: activations down, results up, two synchronisations."""
        return self.terms.handoff_us * 1e-6

    def copy(self, nbytes: float, parts: int = 1) -> float:
        """Host to device, or back, on an idle link; the fixed time is paid for each of `parts` transfers."""
        return 0.0 if self.machine.unified else parts * self._copy_s + nbytes / (self.copy_gbps * 1e9)

    def read(self, nbytes: float) -> float:
        """NVMe to memory, nothing cached; MachineError where there is no drive."""
        if not self.read_gbps:
            raise MachineError(f"machine '{self.machine.name}' has no NVMe drive to read experts from; set nvme.gbps")
        return self._read_s + nbytes / (self.read_gbps * 1e9)

    # Between GPUs

    def exchange(self, what: str, nbytes: float, devices: int) -> float:
        """A collective of `devices` GPUs in a buffer of `nbytes` on each: what all_reduce adds up, all_to_all sends,
        all_gather has in the end and reduce_scatter in the beginning.

        Rings and direct exchanges move the same share of it over each GPU's link (nccl-tests, PERFORMANCE.md).
        """
        if devices < 2 or not nbytes:
            return 0.0
        e, gpu = self.terms, self.machine.gpu
        moved = (2 if what == "all_reduce" else 1) * (devices - 1) / devices * nbytes
        gbps = gpu.nvlink_gbps * e.exchange if gpu.nvlink_gbps else self.copy_gbps * e.exchange_host
        return e.exchange_us * 1e-6 + moved / (gbps * 1e9)

    def exchange_between_hosts(self, what: str, nbytes: float, devices: int, hosts: int) -> float:
        """The same where the GPUs are spread evenly over `hosts`, joined by a network.

        all_to_all sends to its own and to other hosts at the same time; the others reduce within each host before, or
        gather within each after, what crosses the network, of which every GPU takes its share (as NCCL's trees and
        DeepEP's kernels do).
        """
        own, outside = devices // hosts, (hosts - 1) / hosts * nbytes
        if hosts == 1 or not nbytes:
            return self.exchange(what, nbytes, devices)
        if what == "all_reduce":
            parts = ("reduce_scatter", "all_gather")
            return sum(self.exchange_between_hosts(part, nbytes, devices, hosts) for part in parts)
        within = self.exchange(what, nbytes, own)
        if what in ("all_gather", "reduce_scatter"):
            return within + self._network(outside / own)
        return max(within, self._network(outside))

    def _network(self, nbytes: float) -> float:
        """From a GPU of one host to those of others."""
        gbps = (self.machine.network_gbps or math.nan) * self.terms.network
        return self.terms.network_us * 1e-6 + nbytes / (gbps * 1e9)

    # The ceiling

    def ceiling(self, nbytes: float, flops: float, hosted: bool = False) -> float:
        """Bytes at nominal bandwidth and operations at the fastest 8 or 16 bit rate, overlapped, nothing else.

        hosted: the CPU takes whatever share of both makes the time shortest.
        """
        bandwidth, rate = self._hbm, max(self._flops, self._flops8)
        if hosted:
            bandwidth += max(self.dram_gbps, self.host_gbps) * 1e9
            rate += self._cores * self._core_gflops * 1e9
        return max(nbytes / bandwidth, flops / rate)

    def _rate(self, bits: float) -> float:
        """FP8 checkpoints (8 bits) run on FP8 tensor cores; every other format is unpacked to 16 bits first."""
        return self._flops8 if 8 <= bits < 8.1 else self._flops


def _soft(memory: Any, compute: Any) -> Any:
    """The corner of the roofline rounded: the 4-norm of both times, of numbers or of arrays of them.

    Of the norms 1 to 8 the best on the H200 and H100 GEMM tables, 2 % worse on A100. Square roots are rounded alike
    everywhere, so that an array gives what its members give one by one.
    """
    m, c = memory * memory, compute * compute
    return np.sqrt(np.sqrt(m * m + c * c))
