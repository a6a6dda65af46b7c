"""Find a model's routers and read what they return."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError

if TYPE_CHECKING:
    from torch import Tensor, nn

Picked: TypeAlias = "Sequence[nn.Module] | Callable[[str, nn.Module], bool]"

ROUTER_NAMES = ("gate", "router")  # what Hugging Face classes call the router that stands beside `experts`
LARGEST_MISFIT = 0.02  # of a chosen expert's share; bfloat16 routers reach 0.004


@dataclass(frozen=True)
class Router:
    name: str
    layer: int  # of the model
    module: nn.Module

    @property
    def scaling(self) -> float:
        """What the router multiplies its weights with (DeepSeek's routed scaling factor)."""
        return float(getattr(self.module, "routed_scaling_factor", 1.0))


@dataclass(frozen=True)
class Choice:
    """One call of one router: logits [tokens, experts], weights and ids [tokens, k]."""

    logits: Tensor
    weights: Tensor
    ids: Tensor


@dataclass(frozen=True)
class BareLogits:
    """How a model chooses whose routers return logits only: softmax over all, top k, renormalised or not."""

    top_k: int | None
    renormalise: bool


def find_routers(model: nn.Module, picked: Picked | None) -> list[Router]:
    """The routers in model order: those the user picked, or each `gate` or `router` beside `experts`.

    Raises TraceError where there is none, as in a dense model.
    """
    names = {module: name for name, module in model.named_modules()}
    if picked is None:
        found = [
            module
            for parent in model.modules()
            for child, module in parent.named_children()
            if child in ROUTER_NAMES and hasattr(parent, "experts")
        ]
    elif callable(picked):
        found = [module for module, name in names.items() if picked(name, module)]
    else:
        found = list(picked)
    if not found:
        raise TraceError(
            f"{type(model).__name__}: no router found; capture needs an MoE model and looks for "
            f"{' or '.join(ROUTER_NAMES)} beside 'experts': for one built otherwise pass routers=[...], "
            "and a dense model has no routing to record"
        )
    found_names = [names.get(module, f"router {i}") for i, module in enumerate(found)]
    layers = _layer_numbers(found_names)
    return [Router(*fields) for fields in zip(found_names, layers, found, strict=True)]


def _layer_numbers(names: list[str]) -> list[int]:
    """The first number in each name where these rise, as in model.layers.3.mlp.gate; otherwise 0, 1, 2 ..."""
    numbers = [int(match.group(1)) if (match := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)) else -1 for name in names]
    rising = numbers[0] >= 0 and all(a < b for a, b in itertools.pairwise(numbers))
    return numbers if rising else list(range(len(names)))


def read_choice(router: Router, output: Any, bare: BareLogits) -> Choice:
    """What the router decided. `output` is (logits, weights, ids), as in transformers 5, or logits alone."""
    tensors = list(output) if isinstance(output, tuple) else [output]
    if not all(hasattr(t, "shape") for t in tensors) or len(tensors) not in (1, 3):
        raise _unreadable(router, tensors)
    if any(t.dim() > 2 and t.shape[:-2].numel() != 1 for t in tensors):
        raise TraceError(
            f"{router.name}: output {_shapes(tensors)} holds several sequences; capture records one at a time: "
            "call the model once for each"
        )
    # A copy, as some models write the next step into the same memory (CUDA graphs).
    tensors = [t.detach().reshape(-1, t.shape[-1]).clone() for t in tensors]
    choice = Choice(*tensors) if len(tensors) == 3 else _choose(router, tensors[0], bare)
    tokens, experts = choice.logits.shape
    same = choice.weights.shape == choice.ids.shape == (tokens, choice.ids.shape[1])
    kinds = [t.is_floating_point() for t in (choice.logits, choice.weights, choice.ids)]
    if not same or choice.ids.shape[1] > experts or kinds != [True, True, False]:
        raise _unreadable(router, tensors)
    return choice


def _choose(router: Router, logits: Tensor, bare: BareLogits) -> Choice:
    if bare.top_k is None or not 1 <= bare.top_k <= logits.shape[1]:
        raise TraceError(
            f"{router.name} returns logits of {logits.shape[1]} experts, from which top_k {bare.top_k} are chosen; "
            "pass capture(..., top_k=...), between 1 and the number of experts"
        )
    weights, ids = logits.float().softmax(-1).topk(bare.top_k, dim=-1)
    return Choice(logits, weights / weights.sum(-1, keepdim=True) if bare.renormalise else weights, ids)


def _unreadable(router: Router, tensors: list[Any]) -> TraceError:
    return TraceError(
        f"{router.name} ({type(router.module).__name__}) returned {_shapes(tensors)}; capture reads logits "
        "[tokens, experts], or a tuple of them with weights [tokens, k] and expert ids [tokens, k] as the routers of "
        "transformers 5 or later return: pass routers=[...] that do"
    )


def _shapes(tensors: list[Any]) -> str:
    return ", ".join(f"{t.dtype} {list(t.shape)}" if hasattr(t, "shape") else type(t).__name__ for t in tensors)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return 0.5 * (1 + np.tanh(0.5 * logits))


def unchanged(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return logits


SCORINGS = {"softmax": softmax, "sigmoid": sigmoid, "none": unchanged}


def find_scoring(logits: NDArray[np.float32], weights: NDArray[np.float32], ids: NDArray[np.int64]) -> str:
    """Which function of the logits gives scores in proportion to the weights of the chosen experts.

    Routers differ (softmax; sigmoid in DeepSeek-V3; some return probabilities already) and do not say so, but
    their weights tell. Raises TraceError where no function fits.
    """
    misfit = {}
    for name, function in SCORINGS.items():
        chosen = np.take_along_axis(function(logits), ids, -1)
        if ids.shape[-1] == 1:  # a single share is always 1 and tells nothing
            misfit[name] = float(np.abs(chosen - weights).mean())
        elif (chosen >= 0).all():
            shares = chosen / np.maximum(chosen.sum(-1, keepdims=True), 1e-30)
            misfit[name] = float(np.abs(shares - weights / weights.sum(-1, keepdims=True)).mean())
    best = min(misfit, key=lambda name: misfit[name])
    if not misfit[best] <= LARGEST_MISFIT:
        raise TraceError(
            f"the router's weights follow none of {', '.join(SCORINGS)} of its logits (nearest: {best}, off by "
            f"{misfit[best]:.3f}), so its probabilities are unknown; pass capture(..., probabilities=False)"
        )
    return best
