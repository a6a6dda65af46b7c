"""HEXA-MoE (arXiv 2411.01288, section 4.2): shares of two unequal GPUs, data- and model-centric.

The paper trains Swin-MoE. Its forward half is simulated: attention, dense parts, experts and exchanges of one pass.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any

from moesim.engine.simulate import simulate
from moesim.machine import Machine, load_machine
from moesim.machine_file import changed
from moesim.model import Model, load_model
from moesim.question import Question, Scene, compose
from moesim.trace.assumed import distinct_routing
from validate.papers.claim import Claim, Fact, cut

# Proxy latencies in seconds of (TITAN RTX, RTX 2080 Ti), table 2, by the powers they were held to.
CASES = {
    "case1": (("case1 100W", 4.58), ("case1 300W", 3.06)),
    "case2": (("case2 300W", 3.2), ("case2 300W", 3.18)),
    "case3": (("case3 300W", 3.28), ("case3 100W", 9.42)),
}
FULL_POWER = 3.2  # seconds: both cards' proxies at 300 W
TFLOPS = 130.5  # TITAN RTX, fp16 (NVIDIA's Turing whitepaper); the proxies say that both cards reach the same
MEMORY = (("TITAN RTX", "24GiB", 672.0), ("RTX 2080 Ti", "11GiB", 616.0))  # bytes and GB/s, the same source
IMAGES, TOKENS = 80, 144  # batch of section 4.2; 12 x 12 patches, one window of Swin, in the stage of most blocks
ASSUMED = (
    "forward pass of Swin-S's 24 blocks, all with the shape of the third stage, which has 18 of them; 10 MoE layers; "
    "80 images of one 12 x 12 window; tensor rates and L2 in proportion to the proxies, memory rates not, which power "
    "limits leave as they are; PCIe 3 (the catalogue's T4, of the same generation); kernels back to back, in 16 bits"
)
WHY = (
    "training: the backward pass, gradients' exchange and the optimiser are not modelled, of which the last two are "
    "not divided by the shares"
)


def shares(times: tuple[float, ...]) -> tuple[float, ...]:
    """Work in proportion to speed (equations 1 and 2)."""
    speed = [1 / t for t in times]
    return tuple(s / sum(speed) for s in speed)


def gain(case: str) -> float:
    """An even split over the best one, where the shares divide all of the time: what the slowest device takes."""
    times = tuple(t for _, t in CASES[case])
    best = max(share * t for share, t in zip(shares(times), times, strict=True))
    return max(times) / len(times) / best


def swin() -> Model:
    """Swin-MoE-Small as transformer blocks of one shape: width 384, 4 experts in every other block from the sixth."""
    return replace(
        load_model("switch-base-8"), name="swin-moe-small", layers=24, moe_layers=tuple(range(5, 24, 2)), hidden=384,
        expert_ffn=1536, dense_ffn=1536, heads=12, kv_heads=12, head_dim=32, vocab=1000, experts=4, top_k=2,
        attention_layers=None, extra_params=0, expert_bits=16.0, weight_bits=16.0, kv_bits=16.0, embedding_bits=16.0,
    )  # fmt: skip


def box(case: str) -> Machine:
    """The two cards at the powers of a case, in one host."""
    first, second = (
        changed("t4", {"gpu.name": name, "gpu.memory": memory, "gpu.hbm_gbps": gbps,
                             "gpu.tflops": TFLOPS * FULL_POWER / t})
        for (name, memory, gbps), (_, t) in zip(MEMORY, CASES[case], strict=True)
    )  # fmt: skip
    return replace(first, name=f"TITAN RTX and RTX 2080 Ti, {case}", gpus=2, others=(second,))


@cache
def seconds(machine: Machine, policy: str, images: int = IMAGES) -> float:
    """One pass: layers and exchanges, without what serving adds to it."""
    served = swin()
    asked = Question(
        model=served, machine=machine, max_concurrency=images, max_num_seqs=images, max_batch_tokens=images * TOKENS
    )
    scene, system = Scene(distinct_routing(served, images, TOKENS, 0), asked), compose(policy)
    spent = simulate(scene.setting(system, scene.ledger(system)), system).counts.spent
    return (spent["mixer"] + spent["experts"] + spent["exchange"]) / 1e9


def simulated(case: str, mode: str) -> float:
    """Even shares over shares by speed."""
    even, by_speed = (f"HEXA-MoE(mode='{mode}', shares={shares})" for shares in ("(1.0, 1.0)", "()"))
    return seconds(box(case), even) / seconds(box(case), by_speed)


CROSSING = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)  # images in a pass


def crossing() -> dict[str, list[float]]:
    """Milliseconds of a pass on four RTX 4090, the paper's equal GPUs, over `CROSSING` images: by mode."""
    four = load_machine("4xrtx-4090")
    return {
        mode: [1e3 * seconds(four, f"HEXA-MoE(mode='{mode}')", images) for images in CROSSING]
        for mode in ("data", "model", "either")
    }


def picture() -> Any:
    """Where gathering a layer's experts becomes quicker than gathering all tokens."""
    import plotly.graph_objects as go

    from moesim.plots import BLUE, GREY, ORANGE

    figure = go.Figure()
    dress = {"data": (BLUE, "solid"), "model": (ORANGE, "solid"), "either": (GREY, "dot")}
    names = {"data": "data-centric: experts are gathered", "model": "model-centric: tokens are gathered",
             "either": "either: what moves fewer bytes"}  # fmt: skip
    for mode, times in crossing().items():
        colour, dash = dress[mode]
        line = {"color": colour, "dash": dash, "width": 2 if mode != "either" else 4}
        figure.add_scatter(x=[n * TOKENS for n in CROSSING], y=times, name=names[mode], line=line)
    figure.update_layout(
        title="HEXA-MoE: one pass of Swin-MoE-Small on four RTX 4090", template="plotly_white", width=900, height=480,
        xaxis={"title": "tokens in the pass", "type": "log", "dtick": "D2"}, yaxis={"title": "ms", "type": "log"},
    )  # fmt: skip
    return figure


def _claim(case: str, mode: str, percent: float) -> Claim:
    setting = f"{mode} {case} 4 experts top2"
    devices = ("TITAN RTX", "RTX2080Ti")
    proxies = (
        Fact("HEXA-MoE", "proxy_latency", "", gpu, label, "", t)
        for gpu, (label, t) in zip(devices, CASES[case], strict=True)
    )
    fact = Fact(
        "HEXA-MoE", "hetero_latency_reduction", "Swin-MoE-Small", "TITAN RTX + RTX2080Ti", setting, "uniform split",
        percent,
    )  # fmt: skip
    return Claim(
        "HEXA-MoE",
        f"{mode}, unequal GPUs, {case}: shares by speed over even ones",
        cut(percent),
        (fact, *proxies),
        partial(simulated, case, mode.partition("-")[0]),
        main=(case, mode) == ("case3", "data-centric"),
        assumed=ASSUMED,
        why=WHY,
    )


CLAIMS = (
    _claim("case3", "data-centric", 25.3),
    _claim("case1", "data-centric", 13.2),
    _claim("case3", "model-centric", 11.9),
    _claim("case1", "model-centric", 6.3),
    Claim(
        "HEXA-MoE",
        "training of Swin-MoE over Tutel and MegaBlocks, four RTX 4090",
        4.3,
        (Fact("HEXA-MoE", "train_speedup_max", "Swin-MoE S/B", "4xRTX4090", "4 experts", "Tutel/MegaBlocks", 4.3),),
        None,
        why="training, on several devices with exchanges between them",
    ),
)
