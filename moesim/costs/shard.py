"""What one of several GPUs holds and computes of a model that they share."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from moesim.architecture import TensorBytes
from moesim.errors import PolicyError

if TYPE_CHECKING:
    from moesim.model import Model


def shard(model: Model, gpus: int, attention: bool, experts: bool) -> Model:
    """The slice of `model` on one of `gpus`: of attention, dense and shared parts and vocabulary, and of every expert.

    A latent (MLA) and KV heads that are fewer than the GPUs are kept on each. Routed experts that are not sliced stay
    as many as they are: which GPU has which is not a matter of shapes. Raises PolicyError where heads do not divide.
    """
    if gpus == 1:
        return model
    changes: dict[str, object] = {}
    if attention:
        if model.heads % gpus or (model.mla is None and model.kv_heads % gpus and gpus % model.kv_heads):
            raise PolicyError(
                f"{model.name}: {model.heads} heads and {model.kv_heads} KV heads do not divide over {gpus} GPUs; set "
                "parallel.attention=data"
            )
        changes |= {
            "heads": model.heads // gpus,
            "kv_heads": max(model.kv_heads // gpus, 1),
            "shared_ffn": -(-model.shared_ffn // gpus),
            "dense_ffn": -(-model.dense_ffn // gpus),
            "vocab": -(-model.vocab // gpus),
            "extra_params": -(-model.extra_params // gpus),
            "state_bytes": -(-model.state_bytes // gpus),
        }
    if experts:
        changes["expert_ffn"] = -(-model.expert_ffn // gpus)
        if model.expert_sizes is not None:
            changes["expert_sizes"] = tuple(tuple(-(-n // gpus) for n in layer) for layer in model.expert_sizes)
    part = replace(model, tensor_bytes=None, **changes)  # type: ignore[arg-type]
    if model.tensor_bytes is None:
        return part
    whole = model.tensor_bytes
    sizes = tuple(-(-n // gpus) for n in whole.experts) if experts else whole.experts
    other = round(whole.other * part.other_params / model.other_params)
    return replace(part, tensor_bytes=TensorBytes(sizes, other))
