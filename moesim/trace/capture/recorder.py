"""Hooks on routers, and the trace they add up to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.trace.capture.routers import (
    SCORINGS,
    BareLogits,
    Choice,
    Picked,
    Router,
    find_routers,
    find_scoring,
    read_choice,
)
from moesim.trace.check import check
from moesim.trace.trace import DECODE, PREFILL, Requests, Trace, TraceInfo

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class _Recorded:
    """One request: experts and weights [tokens, layers, k], probabilities [tokens, layers, experts] or None."""

    request_id: str
    task: str
    prompt_tokens: int
    experts: NDArray[np.int16]
    weights: NDArray[np.float16]
    probabilities: NDArray[np.float16] | None


class Recorder:
    """Collects what the routers decide. Made by `capture`."""

    def __init__(self, name: str, engine: str, routers: list[Router], bare: BareLogits, probabilities: bool) -> None:
        self._name = name
        self._engine = engine
        self._routers = routers
        self._bare = bare
        self._probabilities = probabilities
        self._scoring = ""  # found at the end of the first request
        self._experts = 0
        self._open: str | None = None
        self._calls: list[list[Choice]] = []
        self._recorded: list[_Recorded] = []

    @contextmanager
    def request(self, request_id: str, task: str = "") -> Iterator[None]:
        """Record what the model does inside as one request: first the prompt in one pass, then a token a pass.

        Nothing is kept of a request that ends by an exception. Raises TraceError for a request inside another, or
        where the passes are not those of one sequence.
        """
        if self._open is not None:
            raise TraceError(f"request '{request_id}' inside request '{self._open}'; end the first one before")
        self._open = request_id
        self._calls = [[] for _ in self._routers]
        try:
            yield
            self._recorded.append(self._finish(request_id, task))
        finally:
            self._open = None
            self._calls = []

    def trace(self, *, sampling: str = "", source: str = "") -> Trace:
        """All requests recorded so far, as a checked Trace; raises TraceError if there is none."""
        if not self._recorded:
            raise TraceError('nothing recorded; run the model inside `with recorder.request("r1"):`')
        lengths = [len(r.experts) for r in self._recorded]
        prompts = np.array([r.prompt_tokens for r in self._recorded], dtype=np.int32)
        position = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
        request = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        kept = [r.probabilities for r in self._recorded if r.probabilities is not None]
        trace = Trace(
            info=TraceInfo(
                model=self._name,
                experts=self._experts,
                top_k=self._recorded[0].experts.shape[2],
                moe_layers=tuple(router.layer for router in self._routers),
                engine=self._engine,
                sampling=sampling,
                source=source,
            ),
            requests=Requests(
                tuple(r.request_id for r in self._recorded), tuple(r.task for r in self._recorded), prompts
            ),
            experts=np.concatenate([r.experts for r in self._recorded]),
            request=request,
            phase=np.where(position < prompts[request], PREFILL, DECODE).astype(np.uint8),
            position=position,
            weights=np.concatenate([r.weights for r in self._recorded]),
            probabilities=np.concatenate(kept) if kept else None,
        )
        check(trace, "capture")
        return trace

    def _saw(self, index: int, output: Any) -> None:
        router = self._routers[index]
        if self._open is None:
            raise TraceError(
                'the model ran outside a request; wrap the call in `with recorder.request("r1"):` '
                "(warm up before capture begins)"
            )
        self._calls[index].append(read_choice(router, output, self._bare))

    def _finish(self, request_id: str, task: str) -> _Recorded:
        self._check_passes(request_id)
        logits, weights, ids = (self._gather(field) for field in ("logits", "weights", "ids"))
        weights /= np.array([router.scaling for router in self._routers])[:, None]
        probabilities = self._distribution(logits, weights, ids) if self._probabilities else None
        self._experts = logits.shape[-1]
        # Not every router returns its choices in order, and sigmoid scores may sum to more than 1.
        rank = np.argsort(-weights, axis=-1, kind="stable")
        weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1)
        return _Recorded(
            request_id=request_id,
            task=task,
            prompt_tokens=len(self._calls[0][0].ids),
            experts=np.take_along_axis(ids, rank, -1).astype(np.int16),
            weights=np.take_along_axis(weights, rank, -1).astype(np.float16),
            probabilities=None if probabilities is None else probabilities.astype(np.float16),
        )

    def _check_passes(self, request_id: str) -> None:
        passes = [[len(choice.ids) for choice in calls] for calls in self._calls]
        if not passes[0]:
            raise TraceError(f"request '{request_id}': the routers were never called; run the model inside it")
        for router, lengths in zip(self._routers, passes, strict=True):
            if lengths != passes[0]:
                raise TraceError(
                    f"request '{request_id}': {router.name} saw passes of {lengths} tokens, but "
                    f"{self._routers[0].name} {passes[0]}; each router must run once a pass on every token"
                )
        longer = [length for length in passes[0][1:] if length != 1]
        if longer:
            raise TraceError(
                f"request '{request_id}': a pass of {longer[0]} tokens after the first; record each sequence as its "
                "own request, generated with a KV cache (use_cache=True), whole prompt first, then one token a pass"
            )

    def _gather(self, field: str) -> NDArray[Any]:
        """One field of every call as [tokens, layers, width]."""
        import torch

        layers: list[Tensor] = [torch.cat([getattr(choice, field) for choice in calls]) for calls in self._calls]
        widths = {layer.shape[1] for layer in layers}
        if len(widths) > 1:
            raise TraceError(
                f"routers differ in {field}: {sorted(widths)} columns; one trace needs the same number of experts and "
                "top-k at every layer: pass routers=[...] that agree"
            )
        arrays = [layer.float() if layer.is_floating_point() else layer.long() for layer in layers]
        return np.stack([array.cpu().numpy() for array in arrays], axis=1)

    def _distribution(
        self, logits: NDArray[np.float32], weights: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        self._scoring = self._scoring or find_scoring(logits, weights, ids)
        scores = SCORINGS[self._scoring](logits)
        return scores / scores.sum(-1, keepdims=True)


@contextmanager
def capture(
    model: nn.Module,
    *,
    routers: Picked | None = None,
    top_k: int | None = None,
    renormalise: bool | None = None,
    probabilities: bool = True,
    name: str = "",
) -> Iterator[Recorder]:
    """Watch the routers of `model` until the block ends; yields the Recorder.

    routers        the router modules, or which(name, module) -> bool; without it, found as in Hugging Face models.
                   A router returns logits [tokens, experts], or (logits, weights [tokens, k], ids [tokens, k])
    top_k          experts per token, where routers return logits only; default: the config's num_experts_per_tok
    renormalise    whether the top-k weights are divided by their sum, where routers return logits only; default:
                   the config's norm_topk_prob, or yes, as in Mixtral
    probabilities  keep the whole distribution of each router: experts / top_k times the size of the rest
    name           of the model, in the trace; default: the name it was loaded by, or its class

    Weights are what the router uses, less a routed scaling factor, which would make them no shares; scores whose
    sum exceeds 1 (sigmoid, not normalised) are divided by it. Probabilities are the router's scores over their sum.
    Raises TraceError where no router is found, for a batch or padding, and for an output it cannot read.
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    bare = BareLogits(
        top_k=getattr(config, "num_experts_per_tok", None) if top_k is None else top_k,
        renormalise=bool(getattr(config, "norm_topk_prob", True) if renormalise is None else renormalise),
    )
    recorder = Recorder(name or _name(model, config), _engine(model), find_routers(model, routers), bare, probabilities)
    handles = [model.register_forward_pre_hook(_refuse_batches, with_kwargs=True)]
    try:
        for index, router in enumerate(recorder._routers):
            handles.append(router.module.register_forward_hook(_watch(recorder, index)))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _watch(recorder: Recorder, index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        recorder._saw(index, output)

    return hook


def _name(model: nn.Module, config: Any) -> str:
    """Hub name, or the last folder of a local path: where a machine keeps its models has no place in a trace."""
    loaded = getattr(config, "name_or_path", "")
    return (Path(loaded).name if Path(loaded).is_absolute() else loaded) or type(model).__name__


def _engine(model: nn.Module) -> str:
    import torch

    if type(model).__module__.startswith("transformers."):
        import transformers

        return f"transformers {transformers.__version__}"
    return f"torch {torch.__version__}"


def _refuse_batches(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TraceError for several sequences or padding: a router sees tokens without knowing whose they are."""
    named = [kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None]
    inputs: Any = (named or list(args) or [None])[0]
    if hasattr(inputs, "shape"):
        several = inputs.dim() == (3 if inputs.is_floating_point() else 2) and inputs.shape[0] != 1
        if several:
            raise TraceError(
                f"batch of {inputs.shape[0]} sequences; capture records one at a time: call the model once for each"
            )
    mask: Any = kwargs.get("attention_mask")
    if hasattr(mask, "shape") and mask.dim() == 2 and not mask.bool().all():
        raise TraceError(
            f"attention_mask hides {int((mask == 0).sum())} of {mask.numel()} tokens; padding has no place in a trace: "
            "pass the sequence without it"
        )
