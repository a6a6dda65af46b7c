"""llama.cpp with experts on the CPU (`--n-cpu-moe`, `-ot exps=CPU`): whole layers are on one side or the other."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import HOT, Misses, Placement, WholeLayers
from moesim.systems.system import System


def llamacpp(n_cpu_moe: int = 0) -> System:
    """The experts of the first layers stay in host memory and run on the CPU, those of the others on the GPU.

    For prompts weights are streamed to the GPU where that pays (llama.cpp pull request 6083; how many tokens that takes
    with experts: ik_llama.cpp pull request 520).
    n_cpu_moe: at least so many layers' experts are on the CPU, and more where the GPU's memory asks for it.
    """
    if n_cpu_moe < 0:
        raise PolicyError(f"n_cpu_moe {n_cpu_moe} must be at least 0 layers")
    return System(
        "llama.cpp",
        eviction=HOT,
        capacity=WholeLayers(n_cpu_moe),
        misses=Misses("host", keep=False, prompts="cheaper"),
        placement=Placement("hot", pinned=True),
        source="github.com/ggml-org/llama.cpp, --n-cpu-moe and --override-tensor",
        notes=("of prompts, experts are copied up where that is quicker: llama.cpp does so for 32 tokens and more",),
    )
