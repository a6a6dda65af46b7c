"""HOBBIT (arXiv 2411.01433, sections 5.2 to 5.5): decode speed-ups and prefill cuts on one RTX 4090, batch 1."""

from __future__ import annotations

from functools import cache, partial

from moesim.efficiencies import efficiencies
from validate.papers.claim import Claim, Fact, cut, mean
from validate.papers.setup import GATES, LOCALITY, MIXTRAL, PHI, TRANSFORMERS, local, machine, metrics, model

# 64 cores and 256 GB; what its memory sustains is not stated: that of the catalogue's PCIe 4 server.
SERVER = {"host__platform": "server", "host__memory": "256GiB", "host__dram_gbps": 150}
BOX = machine("rtx-4090", host__cores=64, **SERVER)
# llama.cpp maps its file. Fiddler's released code loads weights with transformers, pins none, computes with 16 threads
# and runs experts one after the other; a token's expert takes it 3 ms on the paper's CPU (section 2), n tokens n times
# as long (its cost model).
THREADS, TOKEN_S, EXPERT_FLOPS = 16, 3e-3, 2 * 3 * 4096 * 14336
CORE = EXPERT_FLOPS / TOKEN_S / THREADS / 1e9 / efficiencies().core_server
BOXES = {
    "Mixtral-Offloading": (BOX, TRANSFORMERS),
    "MoE-Infinity": (BOX, TRANSFORMERS),
    "llama.cpp": (machine("rtx-4090", host__cores=64, host__pinned=False, **SERVER), ()),
    "Fiddler": (
        machine("rtx-4090", host__cores=THREADS, host__pinned=False, efficiencies__core_gflops=CORE, **SERVER),
        TRANSFORMERS,
    ),
}
LENGTHS = ((16, 32), (16, 128), (128, 32), (128, 128))  # prompt, output: section 5.1
MODELS = {"Mixtral-8x7B": MIXTRAL, "Phi-3.5-MoE": PHI}
ASSUMED = f"{LOCALITY}; {GATES}; eviction weights and memory split of HOBBIT as its system file has them"
PLAIN, COOPERATIVE = "hobbit", "hobbit(variant='cooperative')"
LINK = (
    "copies take the link's rate here whoever asks for them; the paper's baselines are PyTorch programs that do not "
    "reach it (suspected: low-precision misses alone explain 1.34x, and simulated they do, target 2)"
)
PROMPTS = (
    "averaged over prompts of 16 and of 128 tokens: 16 take the CPU less time (llama.cpp 0.8 s for Mixtral, Fiddler "
    "1.8 s) than the GPU needs to load almost every expert (2.7 s). With 128 tokens the direction is right over "
    "llama.cpp (1.6x and 1.5x) and, for Mixtral, over Fiddler (1.36x). Fiddler's released code also tries all 2^16 "
    "divisions of a layer of Phi in a Python loop, which is not modelled"
)
RESERVED = (
    "a fifth of HOBBIT's memory holds low-precision copies here (its own split is not published), of which prompts of "
    "many tokens ask for next to none; weights of its eviction score change nothing of this. " + LINK
)
WHY = {"Mixtral-Offloading": LINK, "MoE-Infinity": LINK, "llama.cpp": PROMPTS, "Fiddler": PROMPTS}


@cache
def _seconds(policy: str, name: str, metric: str) -> float:
    """Mean over the paper's four pairs of lengths."""
    served, (box, settings) = model(name), BOXES.get(policy, (BOX, ()))
    return mean([metrics(policy, local(served, 4, *lengths), served, box, settings)[metric] for lengths in LENGTHS])


def _ratio(ours: str, theirs: str, name: str, metric: str) -> float:
    return _seconds(theirs, name, metric) / _seconds(ours, name, metric)


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
                            why=RESERVED if what == "prefill" and theirs == "MoE-Infinity" else WHY[theirs],
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
