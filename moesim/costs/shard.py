"""What one of several GPUs holds and computes of a model that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from moesim.architecture import TensorBytes
from moesim.errors import PolicyError

if TYPE_CHECKING:
    from moesim.costs.roofline import Roofline
    from moesim.model import Model


PROXY = 8192  # rows and columns of the product that tells GPUs' speeds apart


def speeds(costs: Sequence[Roofline]) -> tuple[float, ...]:
    """How fast each GPU is, in any unit: one over its time for a large matrix product (HEXA-MoE, section 3.3)."""
    return tuple(1 / one.gemm(PROXY, PROXY * PROXY, 2 * PROXY * PROXY, depth=PROXY) for one in costs)


def slices(
    model: Model, costs: Sequence[Roofline], given: Sequence[float], attention: bool, experts: bool
) -> tuple[tuple[float, ...], list[Model]]:
    """(share, slice of the model) of each GPU. given: shares in any unit; none: by speed, equal where GPUs are alike.

    Raises PolicyError for unlike GPUs that would have equal parts, and for shares that are not one for each GPU.
    """
    gpus, alike = len(costs), len({id(one) for one in costs}) == 1
    if not alike and (attention or not experts):
        raise PolicyError(
            "GPUs that are not alike share experts by slices and have whole sequences; use HEXA-MoE, or set "
            "parallel.attention=data and parallel.experts=tensor"
        )
    if given and len(given) != gpus:
        raise PolicyError(f"parallel.shares has {len(given)} numbers for {gpus} GPUs; give one for each")
    weights = given or ([1.0] * gpus if alike else speeds(costs))
    shares = tuple(weight / sum(weights) for weight in weights)
    if len(set(shares)) == 1:
        return shares, [shard(model, gpus, attention, experts)] * gpus
    return shares, [shard(model, gpus, attention, experts, width) for width in widths(model.expert_ffn, shares)]


def widths(total: int, shares: Sequence[float]) -> list[int]:
    """`total` columns divided by shares: whole numbers that add up to it, none of them 0. PolicyError if too few."""
    if total < len(shares):
        raise PolicyError(f"{total} columns of an expert cannot be divided over {len(shares)} GPUs")
    room, whole = total - len(shares), sum(shares)
    ends = [round(room * sum(shares[:i]) / whole) for i in range(len(shares) + 1)]
    return [1 + after - before for before, after in pairwise(ends)]


def shard(model: Model, gpus: int, attention: bool, experts: bool, width: int | None = None) -> Model:
    """The slice of `model` on one of `gpus`: of attention, dense and shared parts and vocabulary, and of every expert.

    A latent (MLA) and KV heads that are fewer than the GPUs are kept on each. Routed experts that are not sliced stay
    as many as they are: which GPU has which is not a matter of shapes. width: columns of its slice of an expert; None:
    as many as the others'. Raises PolicyError where heads do not divide.
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
    own = width or -(-model.expert_ffn // gpus)

    def slice_of(nbytes: int) -> int:
        return -(-nbytes * width // model.expert_ffn) if width else -(-nbytes // gpus)

    if experts:
        changes["expert_ffn"] = own
        if model.expert_sizes is not None:
            changes["expert_sizes"] = tuple(tuple(slice_of(n) for n in layer) for layer in model.expert_sizes)
    part = replace(model, tensor_bytes=None, **changes)  # type: ignore[arg-type]
    if model.tensor_bytes is None:
        return part
    whole = model.tensor_bytes
    sizes = tuple(slice_of(n) for n in whole.experts) if experts else whole.experts
    other = round(whole.other * part.other_params / model.other_params)
    return replace(part, tensor_bytes=TensorBytes(sizes, other))
