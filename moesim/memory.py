"""The memory ledger: what a plan needs on the GPU, in host memory and on the drive, counting what people forget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesim.errors import MemoryBudgetError
from moesim.machine import Machine
from moesim.units import format_size

if TYPE_CHECKING:
    from moesim.model import Model

CUDA_CONTEXT = 551_000_000  # bytes a process takes before any weight: aiconfigurator systems/*.yaml, `other_mem`
FRAGMENTATION = 0.03  # of GPU memory, kept free for the allocator (assumed)
HEADROOM = 0.05  # of host memory: less than this free invites swapping; kept for the page cache beside an NVMe tier
KV_BLOCK = 16  # tokens: paged KV caches are allocated in blocks of this size (vLLM's default)
_BYTES = 2  # per activation


@dataclass(frozen=True)
class Ledger:
    """Bytes per tier by purpose, in order; `free` is the last entry of a tier and may be negative in an OOM plan.

    expert_bytes: GPU memory for the expert cache, or for all experts; shared_bytes: that and the KV reserve as one
    pool; host_expert_bytes: host memory for experts where not all fit, else 0.
    """

    model: str
    machine: str
    gpu: dict[str, int]
    host: dict[str, int]
    nvme: dict[str, int]
    expert_bytes: int
    slots_per_layer: int
    kv_bytes: int
    shared_bytes: int
    host_expert_bytes: int
    verdict: str  # FITS, OOM, SWAP_RISK, CACHE_DISABLED, THRASH
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "gpu_bytes": self.gpu,
            "host_bytes": self.host,
            "nvme_bytes": self.nvme,
            "expert_bytes": self.expert_bytes,
            "slots_per_layer": self.slots_per_layer,
            "kv_bytes": self.kv_bytes,
        }

    def render(self) -> str:
        """The ledger as aligned text, one line per entry."""
        lines = [f"{self.verdict}: {self.reason}"]
        for tier, entries in (("GPU", self.gpu), ("host", self.host), ("NVMe", self.nvme)):
            lines += [f"{tier:<5}{name:<24}{format_size(size):>10}" for name, size in entries.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Host:
    entries: dict[str, int]
    nvme: dict[str, int]
    expert_bytes: int
    problem: tuple[str, str] | None


def plan_memory(
    model: Model,
    machine: Machine,
    *,
    expert_memory: int | None = None,
    slots_per_layer: int | None = None,
    max_sequences: int = 1,
    max_context: int = 4096,
    max_batch_tokens: int = 2048,
    expert_bits: float | None = None,
    all_resident: bool = False,
    cache: bool = True,
    scratch_experts: int = 0,
    experts_held: int | None = None,
    native: bool = False,
) -> Ledger:
    """Where every byte goes when one device of `machine` serves `model`.

    experts_held: with all experts resident on several GPUs, how many of each layer this one holds; None: all.
    native: the engine is a compiled program that allocates once, so nothing is held back for fragmentation.

    The expert cache gets `expert_memory` bytes, or `slots_per_layer` slots, or all that is left after `max_sequences`
    KV caches of `max_context` tokens. A plan that cannot fit has verdict OOM. Raises MemoryBudgetError where the
    memory asked for makes no sense: less than one expert, or more than is left.
    """
    if expert_bits is not None:
        model = model.with_precision(expert_bits=expert_bits)
    _check(
        model, expert_memory, slots_per_layer,
        max_sequences=max_sequences, max_context=max_context, max_batch_tokens=max_batch_tokens,
    )  # fmt: skip
    kv = max_sequences * model.kv_bytes(-(-max_context // KV_BLOCK) * KV_BLOCK)
    gpu = _gpu_entries(model, machine, max_sequences, max_batch_tokens, scratch_experts)
    if native:
        gpu["fragmentation reserve"] = 0
    left = machine.gpu.memory_bytes - sum(gpu.values()) - kv
    gpu["KV cache"] = kv
    if all_resident:
        per_layer = model.experts if experts_held is None else experts_held
        experts = -(-model.total_expert_bytes * per_layer // model.experts)
    elif cache:
        experts, per_layer = _expert_cache(model, machine, left, expert_memory, slots_per_layer)
    else:
        experts = per_layer = 0
    gpu[("all experts" if experts_held is None else "its experts") if all_resident else "expert cache"] = experts
    gpu["free"] = left - experts
    host = _host(model, machine, experts, all_resident)
    verdict, reason = _verdict(model, gpu, host, per_layer if cache and not all_resident else None)
    return Ledger(
        model=model.name,
        machine=machine.name,
        gpu=gpu,
        host=host.entries,
        nvme=host.nvme,
        expert_bytes=experts,
        slots_per_layer=per_layer,
        kv_bytes=kv,
        shared_bytes=max(left, 0) + kv,
        host_expert_bytes=host.expert_bytes,
        verdict=verdict,
        reason=reason,
    )


def activation_bytes(model: Model, tokens: int, sequences: int) -> int:
    """The largest set of activations alive at once while `tokens` tokens pass, logits of `sequences` rows included.

    Residual and normed hidden state, then the widest of: attention's projections; the dense or shared FFN; the routed
    experts' inputs, gated intermediates and outputs. Logits are kept at 16 and 32 bits while sampling.
    """
    attention = (model.heads + 2 * model.kv_heads + model.heads) * model.head_dim
    ffn = model.ffn_matrices * max(model.dense_ffn, model.shared_ffn)
    routed = model.top_k * (2 * model.hidden + model.ffn_matrices * model.expert_ffn)
    layer = tokens * (2 * model.hidden + max(attention, ffn, routed)) * _BYTES
    return layer + min(sequences, tokens) * model.vocab * (_BYTES + 4)


def largest_expert(model: Model) -> int:
    return max(model.expert_bytes(i) for i in range(len(model.moe_layers)))


def _check(model: Model, memory: int | None, slots: int | None, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise MemoryBudgetError(f"{name} {value}: must be at least 1")
    if memory is not None and slots is not None:
        raise MemoryBudgetError("expert memory and slots per layer are two ways to say one thing; give only one")
    if slots is not None and not 1 <= slots <= model.experts:
        raise MemoryBudgetError(
            f"slots per layer {slots}: {model.name} has {model.experts} experts per layer; give 1 to {model.experts}"
        )
    one = largest_expert(model)
    if memory is not None and memory < one:
        raise MemoryBudgetError(
            f"expert memory {format_size(memory)} cannot hold one {model.name} expert ({format_size(one)}); "
            f"give at least {format_size(one * len(model.moe_layers))}, one expert per layer"
        )


def _gpu_entries(
    model: Model, machine: Machine, sequences: int, batch_tokens: int, scratch_experts: int
) -> dict[str, int]:
    """What the GPU holds beside KV caches and experts; a unified machine's memory also holds the operating system."""
    entries = {
        "weights but experts": model.other_bytes,
        "CUDA context": 0 if machine.cpu_only else CUDA_CONTEXT,
        "activations": activation_bytes(model, batch_tokens, sequences),
        "staging": scratch_experts * largest_expert(model),
        "fragmentation reserve": int(FRAGMENTATION * machine.gpu.memory_bytes),
    }
    return entries | {"OS reserve": machine.host.reserve_bytes} if machine.unified else entries


def _expert_cache(
    model: Model,
    machine: Machine,
    left: int,
    memory: int | None,
    slots: int | None,
) -> tuple[int, int]:
    """Bytes of the expert cache and its whole slots per layer, of the `left` ones."""
    one_each = sum(model.expert_bytes(i) for i in range(len(model.moe_layers)))  # a slot holds a layer's largest
    total = one_each * model.experts
    asked = memory if memory is not None else slots * one_each if slots is not None else None
    if asked is None:
        asked = min(max(left, 0), total)
    elif left >= 0 and asked > left:
        what = f"expert memory {format_size(asked)}" if slots is None else f"{slots} slots per layer"
        raise MemoryBudgetError(
            f"{what} of {model.name} ({format_size(asked)}) exceeds the {format_size(left)} left on {machine.name} "
            "after weights, KV cache, activations and reserves; lower it, or the context or the number of sequences"
        )
    return asked, min(asked // one_each, model.experts)


def _host(model: Model, machine: Machine, on_gpu: int, all_resident: bool) -> _Host:
    """Host memory keeps a copy of every expert, also of those cached on the GPU; the rest is read from the drive."""
    total = model.total_expert_bytes
    if machine.unified:
        cold = 0 if all_resident else max(total - on_gpu, 0)
        problem = None
        if cold and machine.nvme is None:
            problem = "OOM", f"{format_size(cold)} of experts fit nowhere: there is no NVMe drive"
        return _Host({}, {"cold experts": cold} if cold else {}, 0, problem)
    host = machine.host
    needed = 0 if all_resident else total
    copies = host.sockets if host.numa_duplicated else 1
    room = host.memory_bytes - host.reserve_bytes
    kind = "experts, pinned" if host.pinned else "experts, pageable"
    if needed * copies <= room:
        entries = {"OS reserve": host.reserve_bytes, kind: needed * copies, "free (page cache)": room - needed * copies}
        tight = bool(needed) and room - needed * copies < HEADROOM * host.memory_bytes
        why = f"expert copies leave {format_size(room - needed * copies)} of host memory: the system may swap"
        return _Host(entries, {}, 0, ("SWAP_RISK", why) if tight else None)
    page_cache = int(HEADROOM * host.memory_bytes)
    held = max(room - page_cache, 0) // copies
    entries = {"OS reserve": host.reserve_bytes, kind: held * copies, "free (page cache)": room - held * copies}
    problem = None
    if machine.nvme is None or held < largest_expert(model):
        problem = (
            "OOM",
            f"experts need {format_size(needed * copies)} of host memory, {format_size(held * copies)} is there, "
            + ("and there is no NVMe drive" if machine.nvme is None else "less than one expert"),
        )
    return _Host(entries, {"cold experts": needed - held}, held, problem)


def _verdict(model: Model, gpu: dict[str, int], host: _Host, per_layer: int | None) -> tuple[str, str]:
    """The worst that is true of the plan, and why; per_layer: slots of the expert cache, None without one."""
    if gpu["free"] < 0:
        memory = sum(gpu.values())
        biggest = max((name for name in gpu if name != "free"), key=lambda name: gpu[name])
        return "OOM", (
            f"needs {format_size(memory - gpu['free'])} of {format_size(memory)} GPU memory, "
            f"most of it for {biggest} ({format_size(gpu[biggest])}); "
            "use fewer bits, a shorter context, fewer sequences or an expert cache"
        )
    if host.problem and host.problem[0] == "OOM":
        return host.problem
    if per_layer is not None and per_layer < 1:
        return "CACHE_DISABLED", (
            f"{format_size(gpu['expert cache'])} left for experts holds less than one of each layer "
            f"({format_size(model.total_expert_bytes / model.experts)})"
        )
    if per_layer is not None and per_layer < model.top_k:
        return "THRASH", f"{per_layer} slots per layer, but one token uses {model.top_k} experts"
    if host.problem:
        return host.problem
    cold = host.nvme.get("cold experts", 0)
    tail = f"; {format_size(cold)} of experts stay on NVMe" if cold else ""
    if per_layer is None:
        return "FITS", f"{format_size(gpu['free'])} of GPU memory to spare{tail}"
    return "FITS", f"{per_layer} of {model.experts} experts per layer fit the expert cache{tail}"
