"""llama.cpp with experts on the CPU (`--n-cpu-moe`, `-ot exps=CPU`): whole layers are on one side or the other."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import HOT, Misses, Placement, WholeLayers
from moesim.systems.system import System


def llamacpp(n_cpu_moe: int = 0) -> System:
    """The experts of the first layers stay in host memory and run on the CPU, those of the others on the GPU.

    n_cpu_moe: at least so many layers' experts are on the CPU, and more where the GPU's memory asks for it.
    Set `repacked=true` for weights rearranged for the CPU's kernels (ik_llama.cpp's `-rtr` and its `_R4` files).
    """
    if n_cpu_moe < 0:
        raise PolicyError(f"n_cpu_moe {n_cpu_moe} must be at least 0 layers")
    return System(
        "llama.cpp",
        eviction=HOT,
        capacity=WholeLayers(n_cpu_moe),
        misses=Misses("host", keep=False),
        placement=Placement("hot", pinned=True),
        repacked=False,
        source="github.com/ggml-org/llama.cpp, --n-cpu-moe and --override-tensor",
        notes=("prompts run on the CPU too where their experts are: llama.cpp may copy experts up for long ones",),
    )
