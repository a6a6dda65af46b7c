"""The memory ledger, by hand and by what must always hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import MemoryBudgetError
from moesim.machine import Machine, catalogue, load_machine
from moesim.memory import CUDA_CONTEXT, Ledger, activation_bytes, plan_memory
from moesim.model import Model, load_model
from moesim.units import GIB

MIXTRAL = load_model("mixtral-8x7b")
EXPERT = 352_321_536


def plan(model: Model = MIXTRAL, machine: str | Machine = "rtx-4090", **options: object) -> Ledger:
    box = load_machine(machine) if isinstance(machine, str) else machine
    return plan_memory(model, box, **options)  # type: ignore[arg-type]


def with_host(name: str, memory: int, **fields: object) -> Machine:
    machine = load_machine(name)
    return replace(machine, host=replace(machine.host, memory_bytes=memory, **fields))  # type: ignore[arg-type]


def test_mixtral_on_a_24_gib_card_by_hand() -> None:
    ledger = plan(max_sequences=2, max_context=2048, max_batch_tokens=512)
    kv = 2 * 2048 * 32 * 2 * 8 * 128 * 2  # sequences, tokens, layers, key and value, heads, size, bytes
    other = MIXTRAL.other_bytes
    hidden, routed, logits = 512 * 2 * 4096 * 2, 512 * 2 * (2 * 4096 + 3 * 14336) * 2, 2 * 32000 * 6
    reserve = int(0.03 * 24 * GIB)
    left = 24 * GIB - other - CUDA_CONTEXT - hidden - routed - logits - reserve - kv
    assert ledger.gpu == {
        "weights but experts": other,
        "CUDA context": CUDA_CONTEXT,
        "activations": hidden + routed + logits,
        "staging": 0,
        "fragmentation reserve": reserve,
        "KV cache": kv,
        "expert cache": left,
        "free": 0,
    }
    assert ledger.host["experts, pinned"] == 32 * 8 * EXPERT
    assert (ledger.kv_bytes, ledger.shared_bytes, ledger.host_expert_bytes) == (kv, left + kv, 0)
    assert ledger.slots_per_layer == left // (32 * EXPERT) == 1
    assert ledger.verdict == "THRASH" and "one token uses 2" in ledger.reason


def test_half_the_bits_hold_twice_the_experts() -> None:
    eight = plan(expert_bits=8, max_context=2048)
    four = plan(expert_bits=4, max_context=2048)
    assert (eight.verdict, four.verdict) == ("FITS", "FITS")
    assert four.expert_bytes == pytest.approx(eight.expert_bytes)
    assert four.slots_per_layer == 2 * eight.slots_per_layer + 1


@pytest.mark.parametrize("gpu_experts", [1, 3])
def test_slots_and_bytes_are_two_ways_to_say_the_same(gpu_experts: int) -> None:
    model = MIXTRAL.with_precision(expert_bits=4)
    slots = plan(model, slots_per_layer=gpu_experts)
    size = plan(model, expert_memory=gpu_experts * 32 * model.expert_bytes())
    assert slots == size
    assert slots.slots_per_layer == gpu_experts and slots.gpu["free"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"expert_memory": 200 * 2**20},
            r"200 MiB cannot hold one .*xtral.* expert \(336 MiB\); give at least 10.5 GiB",
        ),
        ({"expert_memory": 23 * GIB}, r"expert memory 23 GiB .* exceeds the 19.* GiB left on rtx-4090 .*; lower it"),
        ({"slots_per_layer": 4}, r"4 slots per layer .* exceeds"),
        ({"slots_per_layer": 9}, r"slots per layer 9: .* has 8 experts per layer; give 1 to 8"),
        ({"slots_per_layer": 0}, "slots per layer 0"),
        ({"slots_per_layer": 1, "expert_memory": GIB}, "give only one"),
        ({"max_sequences": 0}, "max_sequences 0: must be at least 1"),
        ({"max_context": 0}, "max_context 0"),
    ],
)
def test_senseless_requests(options: dict[str, int], message: str) -> None:
    with pytest.raises(MemoryBudgetError, match=message) as error:
        plan(**({"max_context": 2048} | options))
    assert "\n" not in str(error.value)


def test_long_contexts_are_out_of_memory_not_an_error() -> None:
    ledger = plan(max_sequences=8, max_context=32768, slots_per_layer=1)
    assert ledger.verdict == "OOM" and "most of it for KV cache (32 GiB)" in ledger.reason
    assert ledger.gpu["free"] < 0 and sum(ledger.gpu.values()) == 24 * GIB


def test_kv_and_experts_fight_over_one_memory() -> None:
    """Ten times the context takes the same bytes from the cache that it adds to the KV reserve."""
    short, long = plan(max_context=2048), plan(max_context=20480)
    assert short.expert_bytes - long.expert_bytes == long.kv_bytes - short.kv_bytes == 9 * short.kv_bytes


def test_all_resident() -> None:
    assert plan(all_resident=True).verdict == "OOM"
    fits = plan(machine="h200", all_resident=True)
    assert fits.verdict == "FITS" and fits.slots_per_layer == 8
    assert fits.host["experts, pinned"] == 0 and fits.expert_bytes == MIXTRAL.total_expert_bytes


def test_a_cache_too_small_for_one_expert_per_layer() -> None:
    ledger = plan(max_context=32768, max_sequences=4)
    assert ledger.verdict == "CACHE_DISABLED" and ledger.slots_per_layer == 0


def test_without_a_cache_only_scratch_is_taken() -> None:
    ledger = plan(cache=False, scratch_experts=2)
    assert (ledger.expert_bytes, ledger.gpu["staging"]) == (0, 2 * EXPERT)
    assert ledger.verdict == "FITS"


def test_experts_beyond_host_memory_stay_on_the_drive() -> None:
    machine = with_host("rtx-4090", 64 * GIB)
    ledger = plan(MIXTRAL.with_precision(expert_bits=16), machine, max_context=256)
    held = 64 * GIB - 4 * GIB - int(0.05 * 64 * GIB)
    assert ledger.host_expert_bytes == held == ledger.host["experts, pinned"]
    assert ledger.nvme == {"cold experts": 32 * 8 * EXPERT - held}
    assert sum(ledger.host.values()) == 64 * GIB


def test_no_drive_and_too_little_host_memory() -> None:
    ledger = plan(machine=replace(with_host("rtx-4090", 64 * GIB), nvme=None))
    assert ledger.verdict == "OOM" and "no NVMe drive" in ledger.reason


def test_nearly_full_host_memory_may_swap() -> None:
    machine = with_host("h200", 16 * GIB + 32 * 8 * EXPERT + GIB)
    ledger = plan(machine=machine)
    assert ledger.verdict == "SWAP_RISK" and "the system may swap" in ledger.reason


def test_two_sockets_hold_the_experts_twice() -> None:
    machine = with_host("h200", 1024 * GIB, sockets=2, numa_duplicated=True)
    assert plan(machine=machine).host["experts, pinned"] == 2 * 32 * 8 * EXPERT
    assert plan(machine=replace(machine, host=replace(machine.host, pinned=False))).host["experts, pageable"]


def test_unified_memory_has_one_tier() -> None:
    ledger = plan(machine="strix-halo", max_context=1024)
    assert not ledger.host and ledger.gpu["OS reserve"] == 8 * GIB
    small = replace(load_machine("strix-halo"), gpu=replace(load_machine("strix-halo").gpu, memory_bytes=64 * GIB))
    ledger = plan(machine=small, max_context=1024)
    assert ledger.nvme["cold experts"] == MIXTRAL.total_expert_bytes - ledger.expert_bytes
    assert (ledger.verdict, ledger.host_expert_bytes) == ("FITS", 0)
    assert plan(machine=replace(small, nvme=None), max_context=1024).verdict == "OOM"


def test_logits_dominate_small_models_with_many_sequences() -> None:
    model = load_model("qwen3-30b-a3b")
    more = activation_bytes(model, 256, 256) - activation_bytes(model, 256, 1)
    assert more == 255 * model.vocab * 6


def test_rendering_and_dictionary() -> None:
    ledger = plan(max_context=2048)
    lines = ledger.render().splitlines()
    assert lines[0].startswith("THRASH: ") and any("expert cache" in line and "GiB" in line for line in lines)
    body = ledger.to_dict()
    assert body["gpu_bytes"] == ledger.gpu and body["verdict"] == "THRASH"


@given(
    name=st.sampled_from(sorted(catalogue())),
    model=st.sampled_from(["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b"]),
    context=st.integers(1, 100_000),
    options=st.fixed_dictionaries(
        {
            "max_sequences": st.integers(1, 64),
            "expert_bits": st.sampled_from([None, 2.5, 4, 8]),
            "cache": st.booleans(),
        }
    ),
)
@settings(deadline=None)
def test_every_byte_is_counted_once(name, model, context, options) -> None:
    """Tiers add up, nothing but `free` is negative, and more context never leaves more for experts."""
    machine = load_machine(name)
    ledger = plan(load_model(model), machine, max_context=context, **options)
    assert sum(ledger.gpu.values()) == machine.gpu.memory_bytes
    assert not ledger.host or sum(ledger.host.values()) == machine.host.memory_bytes
    tiers = (ledger.gpu, ledger.host, ledger.nvme)
    assert all(size >= 0 for tier in tiers for entry, size in tier.items() if entry != "free")
    assert ledger.verdict == "OOM" or ledger.gpu["free"] >= 0
    longer = plan(load_model(model), machine, max_context=context + 64, **options)
    assert longer.expert_bytes <= ledger.expert_bytes
