"""HOBBIT (arXiv 2411.01433, sections 5.2 to 5.5): decode speed-ups and prefill cuts on one RTX 4090, batch 1."""

from __future__ import annotations

from functools import cache, partial
from statistics import fmean

from moesim.efficiencies import efficiencies
from moesim.model import Model
from validate.papers.claim import Claim, Fact, cut, mean
from validate.papers.setup import GATES, LOCALITY, MIXTRAL, PHI, TRANSFORMERS, local, machine, metrics, model

# 64 cores and 256 GB; what its memory sustains is not stated: that of the catalogue's PCIe 4 server.
SERVER = {"host__platform": "server", "host__memory": "256GiB", "host__dram_gbps": 150}
BOX = machine("rtx-4090", host__cores=64, **SERVER)
# Programs that do not pin their weights copy 52 to 117 MB at a time: 0.50 of the pinned rate, as measured with 64 MiB
# (NVlabs/cuda-oxide PR 976; `pageable` of docs/costs.md is for copies of any size).
PAGEABLE = {"host__pinned": False, "efficiencies__pageable": 0.5}
# llama.cpp maps its file. Fiddler's released code loads weights with transformers, pins none, computes with 16 threads
# and runs experts one after the other; a token's expert takes it 3 ms on the paper's CPU (section 2), n tokens n times
# as long (its cost model).
THREADS, TOKEN_S, EXPERT_FLOPS = 16, 3e-3, 2 * 3 * 4096 * 14336
CORE = EXPERT_FLOPS / TOKEN_S / THREADS / 1e9 / efficiencies().core_server
# It also adds up, in a Python loop over numpy scalars, the costs of all 2^experts divisions of a layer: 0.3 us a term
# with CPython 3.11 on an EPYC core. Prompts only: with it in decoding too, a token of Phi would take 10 s.
TERM_S = 0.3e-6
BOXES = {
    "Mixtral-Offloading": (BOX, TRANSFORMERS),
    "MoE-Infinity": (BOX, TRANSFORMERS),
    "llama.cpp": (machine("rtx-4090", host__cores=64, **PAGEABLE, **SERVER), ()),
    "Fiddler": (
        machine("rtx-4090", host__cores=THREADS, efficiencies__core_gflops=CORE, **PAGEABLE, **SERVER),
        TRANSFORMERS,
    ),
}
MEMORY = {"MoE-Infinity": int(0.75 * BOX.gpu.memory_bytes)}  # device_memory_ratio of its README
LENGTHS = ((16, 32), (16, 128), (128, 32), (128, 128))  # prompt, output: section 5.1
MODELS = {"Mixtral-8x7B": MIXTRAL, "Phi-3.5-MoE": PHI}
ASSUMED = (
    f"{LOCALITY}; {GATES}; eviction weights and memory split of HOBBIT fitted as the paper fits its weights; averages "
    "are of latencies"
)
# Of 5, 10, 15, 20 and 30 % of the memory for low-precision copies the least takes the least time per token, as equal
# weights do in its eviction score: requests of another seed, both models.
PLAIN, COOPERATIVE = "hobbit(low_share=0.05)", "hobbit(variant='cooperative')"
LINK = (
    "copies take the link's rate here whoever asks for them; the paper's baselines are PyTorch programs that do not "
    "reach it (suspected: low-precision misses alone explain 1.34x, and simulated they do, target 2)"
)
PROMPTS = (
    "prompts of 16 tokens take the CPU less time (llama.cpp 0.8 s for Mixtral) than the GPU needs to load almost every "
    "expert (2.7 s), those of 128 more: the mean hangs on the rate of copies from a mapped file, 12.8 GB/s here"
)
FIDDLER = (
    "Fiddler's released code computes on the CPU after all of a layer's copies, here beside them, and the paper's port "
    "of it to Phi is not public"
)
LOST = (
    "HOBBIT forgets at each request which experts were used, as the paper has it, so a prompt drives out those that "
    "its later layers need; MoE-Infinity's counts outlive requests. " + LINK
)
WHY = {"Mixtral-Offloading": LINK, "MoE-Infinity": LINK, "llama.cpp": PROMPTS, "Fiddler": FIDDLER}


@cache
def _milliseconds(policy: str, name: str, metric: str) -> float:
    """Mean over the paper's four pairs of lengths."""
    served, (box, settings) = model(name), BOXES.get(policy, (BOX, ()))
    asked = {"expert_memory": MEMORY[policy]} if policy in MEMORY else {}
    found = [metrics(policy, local(served, 4, *lengths), served, box, settings, **asked)[metric] for lengths in LENGTHS]
    divided = policy == "Fiddler" and metric == "mean_ttft_ms"
    return fmean(found) + (_dividing_ms(served) if divided else 0.0)


def _dividing_ms(served: Model) -> float:
    """What Fiddler's search for the cheapest division of every layer adds to a pass."""
    return 1e3 * len(served.moe_layers) * 2**served.experts * served.experts * TERM_S


def _ratio(ours: str, theirs: str, name: str, metric: str) -> float:
    return _milliseconds(theirs, name, metric) / _milliseconds(ours, name, metric)


def _fact(name: str, metric: str, gpu: str, setting: str, baseline: str, value: float) -> Fact:
    return Fact("HOBBIT", metric, name, gpu, f"{setting} batch1", baseline, value)


# GPU, setting and system; then baseline: (decode speed-up, prefill cut in %) of Mixtral and of Phi.
TABLES = (
    (
        ("RTX4090", "fp16+int4", PLAIN),
        {"Mixtral-Offloading": ((3.21, 51), (3.29, 54)), "MoE-Infinity": ((2.3, 14), (3.92, 29))},
    ),
    (
        ("RTX4090+CPU", "fp16+int4 coop", COOPERATIVE),
        {"llama.cpp": ((1.31, 25), (1.42, 40)), "Fiddler": ((0.99, 42), (1.46, 85))},
    ),
)


def _claims() -> list[Claim]:
    found = []
    for (gpu, setting, ours), baselines in TABLES:
        for theirs, values in baselines.items():
            for (label, name), (speedup, percent) in zip(MODELS.items(), values, strict=True):
                for metric, fact, reported in (
                    ("mean_tpot_ms", _fact(label, "decode_speedup_mean", gpu, setting, theirs, speedup), speedup),
                    (
                        "mean_ttft_ms",
                        _fact(label, "prefill_latency_reduction_mean", gpu, setting, theirs, percent),
                        cut(percent),
                    ),
                ):
                    what = "decoding" if metric == "mean_tpot_ms" else "prefill"
                    cooperative = " with CPU experts" if ours == COOPERATIVE else ""
                    found.append(
                        Claim(
                            "HOBBIT",
                            f"{what}{cooperative}, {label}, over {theirs}",
                            reported,
                            (fact,),
                            partial(_ratio, ours, theirs, name, metric),
                            assumed=ASSUMED,
                            why=LOST if what == "prefill" and theirs == "MoE-Infinity" else WHY[theirs],
                        )
                    )
    return found


def _main() -> Claim:
    plain = [c for c in _claims() if c.what.startswith("decoding,")]
    predict = [c.predict for c in plain if c.predict]
    return Claim(
        "HOBBIT",
        "decoding on an RTX 4090 over Mixtral-Offloading and MoE-Infinity, mean of four",
        mean([c.reported for c in plain]),
        tuple(fact for c in plain for fact in c.facts),
        lambda: mean([one() for one in predict]),
        main=True,
        assumed=ASSUMED,
        why=WHY["MoE-Infinity"],
    )


CLAIMS = (
    _main(),
    *_claims(),
    Claim(
        "HOBBIT",
        "decoding, Phi-3.5-MoE, over MoE-Infinity on a Jetson AGX Orin",
        9.93,
        (
            Fact(
                "HOBBIT", "decode_speedup_mean", "Phi-3.5-MoE", "Jetson Orin", "int8+int2 batch1", "MoE-Infinity", 9.93
            ),
        ),
        None,
        why="the Orin is not in the catalogue: no source at hand states its tensor rate",
    ),
)
