"""Published runs: first the bytes at nominal rates, then whether the defaults give the right order.

Sources are named in docs/costs.md. The rows informed the defaults, so the second test shows that one set of terms
describes all of them, not that it predicts others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from moesim.costs.roofline import Roofline
from moesim.costs.table import CostTable
from moesim.machine import Machine, load_machine
from moesim.model import Model, load_model
from tests.costs.test_roofline import IDEAL


def model(name: str, expert_bits: float | None = None, weight_bits: float | None = None) -> Model:
    """A quantised model; embeddings and head too, as in GGUF files."""
    return replace(load_model(name).with_precision(expert_bits, weight_bits), embedding_bits=None)


def machine(name: str, hbm: float | None = None, pcie: float | None = None, **host: object) -> Machine:
    base = load_machine(name)
    gpu = base.gpu if hbm is None else replace(base.gpu, hbm_gbps=hbm)
    link = base.pcie if pcie is None else replace(base.pcie, gbps=pcie)
    return replace(base, gpu=gpu, pcie=link, host=replace(base.host, **host))  # type: ignore[arg-type]


XEON = {"platform": "server", "dram_gbps": 307.0 * 0.73, "cores": 32}  # 6454S: 8 channels DDR5-4800
DEEPSEEK = model("deepseek-v3", 4.82, 4.82)  # Q4_K_M
QWEN_BIG = model("qwen3-235b-a22b", 3.83, 6)  # mix-IQ3_K
QWEN_CACHE = model("qwen3-30b-a3b", 4.83, 4.83)  # 0.95 MB per matrix
QWEN = model("qwen3-30b-a3b", 4.25, 5.5)  # IQ4_XS


def bare(served: Model, box: Machine) -> CostTable:
    """No overheads, every efficiency 100 %."""
    box = replace(box, efficiencies=IDEAL)
    return CostTable(served, box, Roofline(box), offloaded=False)


def gpu_ms(costs: CostTable, context: int = 0) -> float:
    return (costs.step_ns(1, 1) + sum(costs.layers_ns([], [context]))) / 1e6


def test_bytes_deepseek_on_one_xeon_and_4090() -> None:
    """KTransformers, Q4_K_M: 58 layers x 8 experts x 44.0 M x 4.82 bits over 307 GB/s = 40.1 ms; the rest 9.6 ms."""
    costs = bare(DEEPSEEK, machine("rtx-4090", dram_gbps=307.0, cores=32))
    assert 58 * 8 * costs.host_expert_ns(1) / 1e6 == pytest.approx(40.1, rel=0.005)
    assert gpu_ms(costs) == pytest.approx(9.6, rel=0.015)


def test_bytes_qwen_on_a_desktop() -> None:
    """ik_llama.cpp, IQ3: 82 layers x 8 experts x 18.9 M x 3.83 bits over 88 GB/s = 67.4 ms."""
    costs = bare(QWEN_BIG, machine("rtx-3090", dram_gbps=88.0))
    assert 82 * 8 * costs.host_expert_ns(1) / 1e6 == pytest.approx(67.4, rel=0.005)


def test_bytes_mixtral_over_pcie() -> None:
    """MoE-Infinity, BF16, 30 % hits: 64 experts x 0.7 x 352 MB over 25 GB/s = 631 ms; the GPU reads 3.2 GB beside."""
    costs = bare(load_model("mixtral-8x7b"), machine("rtx-a6000", pcie=25.0))
    assert 64 * 0.7 * costs.copy_ns(costs.expert_bytes()) / 1e6 == pytest.approx(631, rel=0.002)
    hits = 32 * costs.grouped_ns(2, 2) * 0.3 / 1e6
    assert gpu_ms(costs) + hits == pytest.approx(13, abs=0.5)


def test_bytes_qwen_cached_on_a_5090() -> None:
    """kekzl/imp: at 36.6 % hits 730 matrices of 0.95 MB per token, 27 ms; at 89.4 % 122, 4.5 ms."""
    costs = bare(QWEN_CACHE, machine("rtx-5090", pcie=25.7))
    assert costs.expert_bytes() / 3 == pytest.approx(0.95e6, rel=0.002)
    every = 48 * 8 * costs.copy_ns(costs.expert_bytes()) / 1e6
    assert [every * 0.634, every * 0.106] == pytest.approx([27, 4.5], rel=0.01)


def test_bytes_qwen_resident_on_an_a100() -> None:
    """vLLM, BF16, batch 1: 3.04 B weights read per token, 3.0 ms."""
    costs = bare(load_model("qwen3-30b-a3b"), load_machine("a100"))
    assert costs.ceiling_step_ns([], [0], [8] * 48) / 1e6 == pytest.approx(3.0, rel=0.01)


@dataclass(frozen=True)
class Row:
    """One decode token at batch 1: measured ms, layers with their experts on the CPU, misses per layer."""

    name: str
    ms: float
    served: Model
    box: Machine
    on_cpu: int = 0
    missed: float = 0.0
    parts: int = 1
    graph: bool = True

    def predict(self, scale: str) -> float:
        costs = CostTable(self.served, self.box, Roofline(self.box, scale, self.graph), offloaded=self.missed > 0)
        k, layers = self.served.top_k, len(self.served.moe_layers)
        total = float(costs.step_ns(1, 1) + sum(costs.layers_ns([], [500])))
        total += self.on_cpu * (costs.handoff_ns + k * costs.host_expert_ns(1))
        hits = max(1, round(k - self.missed))
        here = costs.grouped_ns(hits, hits)
        if self.missed:
            here += self.missed * costs.copy_ns(costs.expert_bytes(), self.parts) + costs.expert_ns(1)
        return (total + (layers - self.on_cpu) * here) / 1e6


PRO = load_machine("rtx-a6000")  # with its workstation host: Threadripper PRO 7965WX
ROWS = [
    Row("deepseek, one Xeon", 114.5, DEEPSEEK, machine("rtx-4090", **XEON), 58),
    Row("deepseek, two Xeons", 81.9, DEEPSEEK, machine("rtx-4090", **XEON, sockets=2, numa_duplicated=True), 58),
    Row("R1 2.5 bits, 7965WX", 66.2, model("deepseek-v3", 2.51, 6), PRO, 58),
    Row("R1 2.5 bits, no graph", 111.1, model("deepseek-v3", 2.51, 6), PRO, 58, graph=False),
    Row("qwen 235B Q8, 7965WX", 91.5, model("qwen3-235b-a22b", 8.5, 8.5), PRO, 80),
    Row("qwen 235B IQ3, 9950X", 93.2, QWEN_BIG, machine("rtx-3090", dram_gbps=88.0), 82),
    Row("qwen 30B, 7950X", 14.6, QWEN, machine("rtx-4080", dram_gbps=70.0), 14),
    Row("qwen 30B, cache 36.6 %", 95.0, QWEN_CACHE, load_machine("rtx-5090"), missed=0.634 * 8, parts=3),
    Row("qwen 30B, cache 89.4 %", 33.0, QWEN_CACHE, load_machine("rtx-5090"), missed=0.106 * 8, parts=3),
    Row("qwen 30B, resident", 3.2, QWEN_CACHE, load_machine("rtx-5090")),
    Row("mixtral, A5000", 735.0, load_model("mixtral-8x7b"), PRO, missed=1.4),
    Row("qwen 30B, A100", 9.6, load_model("qwen3-30b-a3b"), load_machine("a100")),
    Row("gpt-oss, 14900K", 39.0, load_model("gpt-oss-120b"), machine("rtx-4090", dram_gbps=80.0, cores=24), 36),
    Row("qwen 30B, RTX 2080", 27.2, QWEN, machine("rtx-3060", hbm=448.0, dram_gbps=102.0, cores=10), 36),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_defaults_give_the_right_order_and_bands_hold_the_measurement(row: Row) -> None:
    assert 0.6 < row.predict("default") / row.ms < 1.6
    assert row.predict("high") <= row.ms <= row.predict("low")


def test_no_bias_over_all_rows() -> None:
    """Half of the rows above, half below: the geometric mean of predicted over measured is near one."""
    product = 1.0
    for row in ROWS:
        product *= row.predict("default") / row.ms
    assert 0.85 < product ** (1 / len(ROWS)) < 1.15
