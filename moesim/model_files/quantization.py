"""Bits per weight, scales included, from `quantization_config` or hf_quant_config.json.

A scheme says which modules are stored in how many bits. Quantisers convert linear layers: embeddings, routers and norms
keep the checkpoint's own type.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

from moesim.errors import ModelError
from moesim.model_files.config_keys import Keys

FLOAT_BITS = {
    "float64": 64, "float32": 32, "bfloat16": 16, "float16": 16, "half": 16, "bf16": 16, "fp16": 16, "fp32": 32,
    "float8_e4m3fn": 8, "float8_e5m2": 8,
}  # fmt: skip
SCALE_BITS, BLOCK_SCALE_BITS = 16, 32  # a group's scale in half precision; a 2-D block's in single precision
FP8_BLOCK = 8 + BLOCK_SCALE_BITS / (128 * 128)
MODELOPT_BITS = {
    "FP8": 8, "FP8_PER_CHANNEL_PER_TOKEN": 8, "FP8_PB_WO": FP8_BLOCK, "FP8_BLOCK_SCALES": FP8_BLOCK,
    "W8A8_SQ_PER_CHANNEL": 8, "W8A16": 8, "INT8": 8, "NVFP4": 4 + 8 / 16, "W4A16_MXFP4": 4 + 8 / 32,
    "MXFP4": 4 + 8 / 32, "MXFP8": 8 + 8 / 32,
}  # fmt: skip
MAX_GLOBS = 64
_PREFIXES = ("model.layers", "model.language_model.layers", "language_model.model.layers", "backbone.layers")
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn", "mixer")


@dataclass(frozen=True)
class Scheme:
    """Modules matching an `ignored` pattern keep `base` bits; of the others, the first group that matches decides."""

    base: float
    groups: tuple[tuple[tuple[str, ...], float], ...] = ()  # (patterns, bits); no patterns = every linear layer
    ignored: tuple[str, ...] = ()
    experts_only: bool = False
    kv_bits: float = 16  # of the KV cache: the checkpoint's own type unless the scheme says otherwise

    def experts(self, layer: int) -> float:
        """Bits of the routed experts of one layer."""
        return self._bits(layer, [f"{block}.experts.0.{w}" for block in _BLOCKS for w in ("down_proj", "w2")])

    def attention(self, layer: int) -> float:
        names = ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.qkv_proj", "mixer.q_proj")
        return self.base if self.experts_only else self._bits(layer, names)

    def shared(self, layer: int) -> float:
        names = [f"{block}.{shared}.down_proj" for block in _BLOCKS for shared in ("shared_experts", "shared_expert")]
        return self.base if self.experts_only else self._bits(layer, names)

    def dense(self, layer: int) -> float:
        return self.base if self.experts_only else self._bits(layer, [f"{block}.down_proj" for block in _BLOCKS])

    def _bits(self, layer: int, modules: Sequence[str]) -> float:
        names = [f"{prefix}.{layer}.{module}" for prefix in _PREFIXES for module in modules]
        if _covered(self.ignored, names):
            return self.base
        for patterns, bits in self.groups:
            if not patterns or "Linear" in patterns or _covered(patterns, names):
                return bits
        return self.base


def read_scheme(keys: Keys, separate: dict[str, Any] | None = None) -> Scheme:
    """The scheme of a config, whose `quantization_config` may lie in a `separate` hf_quant_config.json."""
    dtype = keys.text("torch_dtype", "dtype").removeprefix("torch.")
    if dtype == "fp8":  # DeepSeek's own inference configs
        return Scheme(16, (((), FP8_BLOCK),))
    if dtype and dtype not in FLOAT_BITS:
        raise ModelError(f"{keys.where}: weights of type '{dtype}' are unknown; known: {', '.join(FLOAT_BITS)}")
    base = FLOAT_BITS.get(dtype, 16)
    quant = keys.child("quantization_config") or (Keys(separate, "hf_quant_config.json") if separate else None)
    if quant is None:
        return Scheme(base, kv_bits=max(base, 16))
    method = quant.text("quant_method").lower()
    if method.startswith("modelopt") or quant.has("quantization", "quant_algo"):
        return _modelopt(base, quant)
    if method == "compressed-tensors":
        return _compressed_tensors(base, quant)
    ignored = quant.strings("modules_to_not_convert", "ignored_layers", "llm_int8_skip_modules")
    if method == "mxfp4":
        return Scheme(base, (((), 4 + 8 / 32),), tuple(ignored), experts_only=True)
    if method == "gptq":
        ignored = [*ignored, *_gptq_skipped(quant)]
    return Scheme(base, (((), _uniform_bits(quant, method)),), tuple(ignored))


def _uniform_bits(quant: Keys, method: str) -> float:
    """Methods that store every converted layer alike."""
    if method in ("fp8", "fbgemm_fp8"):
        block = quant.get("weight_block_size")
        return 8 if block is None else 8 + BLOCK_SCALE_BITS / _area(quant, block)
    if method in ("gptq", "awq", "auto-round", "intel/auto-round"):
        bits = quant.positive("bits", "w_bit")
        return _grouped(bits, quant.get("group_size", "q_group_size"), quant, zero_point=bits)
    if method == "bitsandbytes" and quant.get("load_in_4bit", "_load_in_4bit"):
        double = bool(quant.get("bnb_4bit_use_double_quant"))
        return 4 + (8 / 64 + 32 / (64 * 256) if double else 32 / 64)  # QLoRA, arXiv 2305.14314, section 3
    if method == "bitsandbytes":
        return 8
    raise ModelError(
        f"{quant.where}: quantisation method '{method}' is unknown; remove quantization_config to read the model "
        "unquantised, then set the bits yourself"
    )


def _modelopt(base: float, quant: Keys) -> Scheme:
    inner = quant.child("quantization") or quant
    algo = inner.text("quant_algo").upper()
    cache = inner.text("kv_cache_quant_algo").upper()
    ignored = tuple(inner.strings("exclude_modules", "ignore"))
    if cache and cache not in MODELOPT_BITS:
        raise ModelError(f"{quant.where}: KV cache type '{cache}' is unknown; known: {', '.join(MODELOPT_BITS)}")
    kv_bits = MODELOPT_BITS[cache] if cache else 16
    if not algo:
        return Scheme(base, kv_bits=kv_bits)
    if "AWQ" in algo:
        bits = _grouped(4, inner.get("group_size") or 128, quant)
    elif algo in MODELOPT_BITS:
        bits = MODELOPT_BITS[algo]
    else:
        raise ModelError(f"{quant.where}: quant_algo '{algo}' is unknown; known: {', '.join(MODELOPT_BITS)}, *AWQ")
    return Scheme(base, (((), bits),), ignored, kv_bits=kv_bits)


def _compressed_tensors(base: float, quant: Keys) -> Scheme:
    groups = []
    config_groups = quant.child("config_groups")
    for name, group in (config_groups.values if config_groups else {}).items():
        keys = Keys(group, f"{quant.where}: group '{name}'") if isinstance(group, dict) else None
        weights = keys.child("weights") if keys else None
        if keys is None or weights is None:
            raise ModelError(f"{quant.where}: config_groups '{name}' says nothing of its weights")
        groups.append((tuple(keys.strings("targets")), _compressed_bits(weights)))
    if not groups:
        raise ModelError(f"{quant.where}: compressed-tensors needs config_groups")
    return Scheme(base, tuple(groups), tuple(quant.strings("ignore")))


def _compressed_bits(weights: Keys) -> float:
    bits = weights.positive("num_bits")
    block = weights.get("block_structure")
    if weights.text("strategy") == "block" and block is not None:
        return bits + BLOCK_SCALE_BITS / _area(weights, block)
    if weights.text("type") == "float" and bits == 4:  # NVFP4 and MXFP4: 8-bit scales
        return bits + 8 / weights.positive("group_size")
    zero_point = 0 if weights.values.get("symmetric", True) else bits
    return _grouped(bits, weights.get("group_size"), weights, zero_point)


def _grouped(bits: int, group: Any, quant: Keys, zero_point: int = 0) -> float:
    """Bits with a scale (and zero point) per group; -1 or none is a whole row, whose scale does not count."""
    if group is None or group == -1:
        return bits
    if isinstance(group, bool) or not isinstance(group, int) or group < 1:
        raise ModelError(f"{quant.where}: group_size is {group!r}, but must be -1 or a whole number of 1 or more")
    return bits + (SCALE_BITS + zero_point) / group


def _area(quant: Keys, block: Any) -> int:
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(b, int) and 0 < b < 1 << 20 for b in block):
        raise ModelError(f"{quant.where}: a weight block must be two sizes such as [128, 128], not {block!r}")
    return block[0] * block[1]


def _gptq_skipped(quant: Keys) -> list[str]:
    """GPTQModel's per-module rules: `-:regex` leaves modules alone; other rules would need a precision per module."""
    rules = quant.get("dynamic")
    names = list(rules) if isinstance(rules, dict) else []
    if any(not name.startswith("-:") for name in names):
        raise ModelError(f"{quant.where}: a precision per module ('dynamic') cannot be read; use the model's GGUF")
    return ["re:" + name[2:] for name in names]


def _covered(patterns: Sequence[str], names: Sequence[str]) -> bool:
    """Whether any pattern (a regular expression after `re:`, a glob, or part of a dotted path) covers any module."""
    paths = "".join(f".{name}.\n" for name in names)
    for pattern in patterns:
        if pattern.startswith("re:"):
            globs = _globs(pattern[3:])
        elif "*" in pattern:
            globs = (pattern, pattern + ".*")
        elif f".{pattern}." in paths:
            return True
        else:
            continue
        if any(fnmatchcase(name, glob) for glob in globs for name in names):
            return True
    return False


@cache
def _globs(expression: str) -> tuple[str, ...]:
    """A module expression as globs, so that a hostile one cannot take exponential time to match.

    Understood: literals, `.`, `.*`, `.+`, `\\.`, digits, `^`, `$` and groups of alternatives.
    """
    found, open_ = [], [f"({expression})"]
    while open_:
        text = open_.pop()
        group = re.search(r"\((?:\?:)?([^()]*)\)", text)
        if group:
            open_ += [text[: group.start()] + choice + text[group.end() :] for choice in group[1].split("|")]
        else:
            found.append(_glob(text, expression))
        if len(found) + len(open_) > MAX_GLOBS:
            raise ModelError(f"module pattern 're:{expression[:60]}' has more than {MAX_GLOBS} alternatives")
    return tuple(found)


def _glob(text: str, expression: str) -> str:
    tail = "" if text.endswith("$") else "*"  # an expression matches from the start, not to the end
    text = text.removeprefix("^").removesuffix("$").replace(r"\.", "\0")
    text = re.sub(r"(?:\\d|\[0-9\]|\.)[+*]", "\1", text)
    text = re.sub(r"\\d|\[0-9\]", "\2", text)
    if re.search(r"[\\()\[\]{}+*?^$]", text):
        raise ModelError(f"module pattern 're:{expression[:60]}' is too complicated; simplify it to literals and .*")
    return text.replace(".", "?").replace("\0", ".").replace("\1", "*").replace("\2", "[0-9]") + tail
