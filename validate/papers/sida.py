"""SiDA-MoE (arXiv 2310.18859, figures 8 and 9): sentences through the encoder of Switch, batch 1, one A100."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from moesim.model import Model
from validate.papers.claim import Claim, Fact
from validate.papers.setup import LOCALITY, local, machine, metrics, model

GPU = "A100-80GB"
BOX = machine("a100-80gb-sxm", host__cores=64)
TOKENS = {"SST2": 25, "MRPC": 65, "MultiRC": 350}  # per sentence: short; 50 to 80; 200 to 500
TOP_K = {"SST2": 1, "MRPC": 3, "MultiRC": 3}
SENTENCES = 16
# Share of the MoE weights that SiDA keeps on the GPU: what figure 8 says is saved, at the least.
KEPT = {("128", "SST2"): 0.4, ("256", "SST2"): 0.2, ("128", "MRPC"): 0.4, ("256", "MRPC"): 0.2}
KEPT |= {("128", "MultiRC"): 0.8, ("256", "MultiRC"): 0.6}
THROUGHPUT = {
    ("128", "SST2"): 2.6, ("256", "SST2"): 3.93, ("128", "MRPC"): 2.52, ("256", "MRPC"): 3.83,
    ("128", "MultiRC"): 1.26, ("256", "MultiRC"): 1.57,
}  # fmt: skip
WHY = ""


@cache
def encoder(experts: int) -> Model:
    """The encoder of Switch-base: classification runs nothing else."""
    whole = model(f"switch-base-{experts}")
    half = whole.moe_layers[: len(whole.moe_layers) // 2]
    name = f"{whole.name}-encoder"
    return replace(whole, name=name, layers=12, moe_layers=half, attention_layers=None, extra_params=0)


def _seconds(size: str, data: str, policy: str, kernel: str, memory: int | None = None) -> float:
    served = encoder(int(size))
    trace = local(served, SENTENCES, TOKENS[data], 0)
    found = metrics(policy, trace, served, BOX, (f"kernel={kernel}",), expert_memory=memory)
    return float(found["duration_s"])


def faster(size: str, data: str) -> float:
    """Standard transformers, every expert launched, over SiDA, which launches what it needs."""
    memory = int(KEPT[size, data] * encoder(int(size)).total_expert_bytes)
    ours = _seconds(size, data, f"SiDA(top_k={TOP_K[data]})", "loop", memory)
    return _seconds(size, data, "all-resident", "loop-all") / ours


def _claim(size: str, data: str, value: float) -> Claim:
    fact = Fact(
        "SiDA-MoE", "throughput_ratio", f"Switch-base-{size}", GPU, f"{data} batch1",
        "mean of Standard/DeepSpeed/Tutel", value,
    )  # fmt: skip
    return Claim(
        "SiDA",
        f"throughput, Switch-base-{size}, {data}",
        value,
        (fact,),
        lambda: faster(size, data),
        main=(size, data) == ("256", "SST2"),
        assumed=(
            f"over Standard alone, not the mean with DeepSpeed and Tutel; {TOKENS[data]} tokens per sentence; "
            f"{KEPT[size, data]:.0%} of the experts' bytes on the GPU, from figure 8; {LOCALITY}"
        ),
        why=WHY,
    )


CLAIMS = tuple(_claim(size, data, value) for (size, data), value in THROUGHPUT.items())
