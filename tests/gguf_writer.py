"""A tiny GGUF writer for tests: headers as the specification lays them out, without tensor data."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

F32, F16, Q8_0, Q4_K, Q6_K, MXFP4 = 0, 1, 8, 12, 14, 39
BLOCK = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), Q4_K: (256, 144), Q6_K: (256, 210), MXFP4: (32, 17)}
Tensors = dict[str, tuple[tuple[int, ...], int]]  # name: (shape, fastest dimension first; type)


def size(shape: tuple[int, ...], kind: int) -> int:
    """Bytes of a tensor."""
    per_block, width = BLOCK[kind]
    return math.prod(shape) // per_block * width


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value(item: Any) -> bytes:
    """A typed metadata value: bool, int (u32), float (f32), str, or a list of one of them."""
    if isinstance(item, list):
        kind = {bool: 7, int: 4, float: 6, str: 8}[type(item[0])]
        return struct.pack("<IIQ", 9, kind, len(item)) + b"".join(value(i)[4:] for i in item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    return struct.pack("<I", 8) + text(item)


def header(values: dict[str, Any], tensors: Tensors, version: int = 3) -> bytes:
    """Everything up to the tensor data."""
    body = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    body += b"".join(text(k) + value(v) for k, v in values.items())
    offset = 0
    for name, (shape, kind) in tensors.items():
        body += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        offset += -(-size(shape, kind) // 32) * 32 if kind in BLOCK else 0
    return body


def write(path: Path, values: dict[str, Any], tensors: Tensors, version: int = 3) -> Path:
    path.write_bytes(header(values, tensors, version))
    return path


def mixtral(layers: int = 2, experts: int = 4, kind: int = Q4_K) -> tuple[dict[str, Any], Tensors]:
    """A small Mixtral: hidden 256, 4 heads of 64, 2 KV heads, experts 512 wide, 96 words."""
    values: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "small",
        "llama.block_count": layers,
        "llama.embedding_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.expert_count": experts,
        "llama.expert_used_count": 2,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": [0.0, 1.0],
    }
    tensors: Tensors = {"token_embd.weight": ((256, 96), Q8_0), "output.weight": ((256, 96), Q6_K)}
    tensors["output_norm.weight"] = ((256,), F32)
    for i in range(layers):
        tensors |= attention(i)
        tensors |= stacked(i, experts, kind)
    return values, tensors


def qwen3_30b_q4_k_m() -> tuple[dict[str, Any], Tensors]:
    """Qwen3-30B-A3B as llama.cpp's Q4_K_M stores it: 6 bits for the head and, in the first and last eighth of the
    layers and every third between, for values and down matrices; 4 bits elsewhere (llama-quant.cpp, use_more_bits)."""
    layers, experts, hidden = 48, 128, 2048
    values: dict[str, Any] = {
        "general.architecture": "qwen3moe",
        "qwen3moe.block_count": layers,
        "qwen3moe.embedding_length": hidden,
        "qwen3moe.attention.head_count": 32,
        "qwen3moe.attention.head_count_kv": 4,
        "qwen3moe.attention.key_length": 128,
        "qwen3moe.attention.value_length": 128,
        "qwen3moe.expert_count": experts,
        "qwen3moe.expert_used_count": 8,
    }
    tensors: Tensors = {"token_embd.weight": ((hidden, 151936), Q4_K), "output.weight": ((hidden, 151936), Q6_K)}
    for i in range(layers):
        more = i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2
        tensors |= {
            f"blk.{i}.attn_q.weight": ((hidden, 4096), Q4_K),
            f"blk.{i}.attn_k.weight": ((hidden, 512), Q4_K),
            f"blk.{i}.attn_v.weight": ((hidden, 512), Q6_K if more else Q4_K),
            f"blk.{i}.attn_output.weight": ((4096, hidden), Q4_K),
            f"blk.{i}.ffn_gate_inp.weight": ((hidden, experts), F32),
            f"blk.{i}.ffn_gate_exps.weight": ((hidden, 768, experts), Q4_K),
            f"blk.{i}.ffn_up_exps.weight": ((hidden, 768, experts), Q4_K),
            f"blk.{i}.ffn_down_exps.weight": ((768, hidden, experts), Q6_K if more else Q4_K),
        }
    return values, tensors


def attention(layer: int) -> Tensors:
    return {
        f"blk.{layer}.attn_q.weight": ((256, 256), Q8_0),
        f"blk.{layer}.attn_k.weight": ((256, 128), Q8_0),
        f"blk.{layer}.attn_v.weight": ((256, 128), Q8_0),
        f"blk.{layer}.attn_output.weight": ((256, 256), Q8_0),
        f"blk.{layer}.attn_norm.weight": ((256,), F32),
    }


def stacked(layer: int, experts: int, kind: int) -> Tensors:
    return {
        f"blk.{layer}.ffn_gate_inp.weight": ((256, experts), F32),
        f"blk.{layer}.ffn_gate_exps.weight": ((256, 512, experts), kind),
        f"blk.{layer}.ffn_up_exps.weight": ((256, 512, experts), kind),
        f"blk.{layer}.ffn_down_exps.weight": ((512, 256, experts), Q6_K if kind == Q4_K else kind),
    }
