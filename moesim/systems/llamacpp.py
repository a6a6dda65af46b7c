"""llama.cpp with experts on the CPU (`--n-cpu-moe`, `-ot exps=CPU`): whole layers are on one side or the other."""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.policies import HOT, Misses, Placement, WholeLayers
from moesim.systems.system import System

OFFLOADED = 32  # tokens of a batch from which its CUDA backend copies weights up: min_batch_size in ggml-cuda.cu


def llamacpp(n_cpu_moe: int = 0, op_offload: bool = True) -> System:
    """The experts of the first layers stay in host memory and run on the CPU, those of the others on the GPU.

    n_cpu_moe: at least so many layers' experts are on the CPU, and more where the GPU's memory asks for it.
    op_offload: steps of 32 tokens and more run on the GPU, to which those layers' experts are copied each time; false
        is `--no-op-offload`. Copies come from a mapped file unless `--no-mmap` is given: set host.pinned to false.
    Set `repacked=true` for weights rearranged for the CPU's kernels (ik_llama.cpp's `-rtr` and its `_R4` files).
    """
    if n_cpu_moe < 0:
        raise PolicyError(f"n_cpu_moe {n_cpu_moe} must be at least 0 layers")
    far = Misses("host", keep=False, prompts="fetch", prompts_from=OFFLOADED)
    return System(
        "llama.cpp",
        eviction=HOT,
        capacity=WholeLayers(n_cpu_moe),
        misses=far if op_offload else Misses("host", keep=False),
        placement=Placement("hot", pinned=True),
        repacked=False,
        native=True,
        source="github.com/ggml-org/llama.cpp, --n-cpu-moe and --override-tensor",
        notes=("copies of experts for steps of 32 tokens and more overlap with kernels; llama.cpp's do not",)
        if op_offload
        else (),
    )
