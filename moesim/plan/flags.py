"""Lines to start an engine with that serves as a candidate of a plan does. Nobody has tested them.

Names of options: llama.cpp's and ik_llama.cpp's `llama-server --help`, kvcache-ai/ktransformers doc/en/kt-kernel,
docs.vllm.ai.
"""

from __future__ import annotations

from moesim.errors import PolicyError
from moesim.machine import Machine
from moesim.policies import Even, WholeLayers
from moesim.question import Scene
from moesim.systems import System

UNTESTED = "   # untested"
PAYS = 32  # tokens of one expert from which copying its weights up pays (ik_llama.cpp pull request 520)
_METHODS = ((16.0, "BF16"), (4.5, "LLAMAFILE"), (4.2, "MXFP4"))  # kt-kernel's, by bits per weight at least


def as_it_fits(spec: str, system: System, scene: Scene) -> str:
    """`spec` with the number of layers or experts on the CPU that `scene` has to choose, so that a flag can say it."""
    if system.name == "EPLB" and scene.machine.gpus == 1:
        return "all-resident"
    if system.name in ("llama.cpp", "KTransformers") and scene.machine.cpu_only:  # nowhere to divide experts between
        return "all-resident"
    if system.name == "llama.cpp":
        on_cpu = sum(not kept for kept in _kept(system, scene))
        return f"llama.cpp(n_cpu_moe={on_cpu})" if on_cpu else spec
    if system.name == "KTransformers" and system.cache:
        kept, defer = min(_kept(system, scene)), system.misses.defer
        given = {"gpu_experts": kept, "defer": defer, "gpu_prefill": system.misses.prompts is not None}
        text = ", ".join(f"{name}={value}" for name, value in given.items() if value)
        return f"KTransformers({text})" if text else "KTransformers"
    return spec


def on_cpu(system: System, scene: Scene) -> list[int]:
    """Blocks whose experts llama.cpp keeps on the CPU. Raises PolicyError for systems that do not divide by layers."""
    if not isinstance(system.capacity, WholeLayers):
        raise PolicyError(f"{system.name} does not keep whole layers' experts on one side; take --policy llama.cpp")
    return [block for block, kept in zip(scene.model.moe_layers, _kept(system, scene), strict=True) if not kept]


def _kept(system: System, scene: Scene) -> list[int]:
    """Experts of each MoE layer that the device holds for good."""
    model = scene.model
    sizes = [model.expert_bytes(i) for i in range(len(model.moe_layers))]
    split = system.capacity.split(scene.ledger(system).expert_bytes, sizes, model.experts)
    return [held // size for held, size in zip(split, sizes, strict=True)]


def flags(system: System, scene: Scene, bits: float, published: bool) -> dict[str, str]:
    """Lines by engine; none where no released engine serves so. published: no weight is stored in fewer bits."""
    context = max(r.prompt_tokens + len(r.decode) + 1 for r in scene.workload.requests)
    together, machine = scene.at_once(system), scene.machine
    if machine.cpu_only:
        cores = machine.host.cores * machine.host.sockets
        line = f"llama-server -m MODEL.gguf -t {cores} -np {together} -c {context * together}{UNTESTED}"
        return dict.fromkeys(("llama.cpp", "ik_llama.cpp"), line) if system.all_resident else {}
    if isinstance(system.capacity, WholeLayers) or (system.all_resident and not published and machine.gpus == 1):
        return _llamacpp(system, scene, f"-np {together} -c {context * together}")
    if system.name == "KTransformers":
        limits = f"--max-running-requests {together} --context-length {context}"
        if system.misses.prompts:
            limits += f" --kt-gpu-prefill-token-threshold {PAYS * -(-scene.model.experts // scene.model.top_k)}"
        return {"KTransformers": _ktransformers(system, machine, scene.model.name, bits) + limits + UNTESTED}
    if system.all_resident and published and system.kernel != "esmm":
        several = _vllm_parallel(system, scene) if machine.gpus > 1 else ""
        limits = f" --max-num-seqs {together} --max-model-len {context}"
        return {"vLLM": f"vllm serve {scene.model.name}{several}{limits}{UNTESTED}"}
    return {}


def _vllm_parallel(system: System, scene: Scene) -> str:
    parallel, gpus, experts = system.parallel, scene.machine.gpus, scene.model.experts
    line = f" --{parallel.attention}-parallel-size {gpus}"
    if parallel.experts == "expert":
        line += " --enable-expert-parallel"
    if parallel.placement == "balanced":
        redundant = parallel.slots(experts, gpus) - experts
        line += f" --enable-eplb --eplb-config.num_redundant_experts {redundant}"
    return line


def _llamacpp(system: System, scene: Scene, limits: str) -> dict[str, str]:
    """--n-cpu-moe counts blocks, dense ones included."""
    layers = system.capacity.without if isinstance(system.capacity, WholeLayers) else 0
    blocks = scene.model.moe_layers[layers - 1] + 1 if layers else 0
    line = f"llama-server -m MODEL.gguf -ngl 999 --n-cpu-moe {blocks} {limits}{UNTESTED}"
    return {"llama.cpp": line, "ik_llama.cpp": line}


def _ktransformers(system: System, machine: Machine, model: str, bits: float) -> str:
    kept = system.capacity.most if system.cache and isinstance(system.capacity, Even) else 0
    method = next((name for least, name in _METHODS if bits >= least), "LLAMAFILE")
    placed = "--kt-expert-placement-strategy frequency --init-expert-location STATISTICS.pt " if kept else ""
    deferred = f"--kt-max-deferred-experts-per-token {system.misses.defer} " if system.misses.defer else ""
    return (
        f"python -m sglang.launch_server --model {model} --kt-weight-path WEIGHTS --kt-method {method} "
        f"--kt-cpuinfer {machine.host.cores * machine.host.sockets} --kt-threadpool-count {machine.host.sockets} "
        f"--kt-num-gpu-experts {kept} {placed}{deferred}"
    )
