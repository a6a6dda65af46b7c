"""What layers without a KV cache are made of: Mamba, linear attention, short convolutions.

Each function gives the weights of one layer and the bytes of state one sequence keeps in it. Recurrent state is counted
at 4 bytes a value (engines that keep 2 use less), convolution state at 2. Shapes are those of the model classes in
transformers 5; the tests compare them with its parameter counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.errors import ModelError
from moesim.model_files.config_keys import Keys

STATE_BYTES, CONV_BYTES = 4, 2


@dataclass(frozen=True)
class Mixer:
    params: int  # weights of one layer
    state_bytes: int  # one sequence, one layer


def read_mixer(keys: Keys, hidden: int, heads: int, head_dim: int) -> Mixer:
    """The token mixer of the layers that hold no KV cache; ModelError when the config describes none we know."""
    if keys.has("linear_num_value_heads"):
        return gated_delta_net(keys, hidden)
    if keys.has("linear_attn_config", "linear_num_heads"):
        return delta_attention(keys.child("linear_attn_config") or keys, hidden)
    if keys.has("mamba_n_heads", "mamba_num_heads"):
        return mamba2(keys, hidden)
    if keys.has("mamba_d_state"):
        return mamba1(keys, hidden)
    if keys.has("conv_L_cache"):
        kernel = keys.number("conv_L_cache")
        return Mixer(4 * hidden * hidden + hidden * kernel, hidden * kernel * CONV_BYTES)
    if keys.text("model_type").lower().startswith("minimax"):
        width = heads * head_dim  # lightning attention: q, k, v, gate, output
        return Mixer(5 * hidden * width, width * head_dim * STATE_BYTES)
    raise ModelError(
        f"{keys.where}: some layers hold no KV cache, but their kind is unknown "
        "(known: Mamba 1 and 2, gated delta net, Kimi delta attention, lightning attention, short convolution)"
    )


def gated_delta_net(keys: Keys, hidden: int) -> Mixer:
    """Qwen3-Next, Qwen3.5: projections of q, k, v, gate and two scalars per value head; a convolution over q, k, v."""
    value_heads, value_dim = keys.number("linear_num_value_heads"), keys.number("linear_value_head_dim")
    key_dim = keys.number("linear_key_head_dim")
    key, value = keys.number("linear_num_key_heads") * key_dim, value_heads * value_dim
    kernel, channels = keys.number("linear_conv_kernel_dim", default=4), 2 * key + value
    params = hidden * (channels + value + 2 * value_heads) + channels * kernel + value * hidden
    return Mixer(params, value_heads * key_dim * value_dim * STATE_BYTES + channels * kernel * CONV_BYTES)


def delta_attention(keys: Keys, hidden: int) -> Mixer:
    """Kimi Linear (arXiv 2510.26692): q, k, v, output, two low-rank gates; a convolution over q, k, v."""
    heads, dim = keys.number("linear_num_heads", "num_heads"), keys.number("linear_head_dim", "head_dim")
    kernel = keys.number("linear_conv_kernel_dim", "short_conv_kernel_size", default=4)
    width = heads * dim
    params = 4 * hidden * width + 2 * dim * (hidden + width) + hidden * heads + 3 * width * kernel
    return Mixer(params, heads * dim * dim * STATE_BYTES + 3 * width * kernel * CONV_BYTES)


def mamba1(keys: Keys, hidden: int) -> Mixer:
    """Mamba (arXiv 2312.00752) as in Jamba."""
    inner, state = keys.number("mamba_expand", default=2) * hidden, keys.number("mamba_d_state")
    kernel = keys.number("mamba_d_conv", default=4)
    rank = -(-hidden // 16) if keys.text("mamba_dt_rank") == "auto" else keys.number("mamba_dt_rank")
    params = 3 * inner * hidden + inner * (kernel + 2 * rank + 3 * state + 3)
    return Mixer(params, inner * state * STATE_BYTES + inner * kernel * CONV_BYTES)


def mamba2(keys: Keys, hidden: int) -> Mixer:
    """Mamba-2 (arXiv 2405.21060) as in Granite 4 and Nemotron-H."""
    heads = keys.positive("mamba_n_heads", "mamba_num_heads")
    dim = keys.number("mamba_d_head", "mamba_head_dim", default=0) or 2 * hidden // heads
    groups, state = keys.number("mamba_n_groups", "n_groups"), keys.number("mamba_d_state", "ssm_state_size")
    kernel = keys.number("mamba_d_conv", "conv_kernel", default=4)
    inner = heads * dim
    channels = inner + 2 * groups * state
    params = hidden * (inner + channels + heads) + channels * (kernel + 1) + inner * hidden
    return Mixer(params, inner * state * STATE_BYTES + channels * kernel * CONV_BYTES)
