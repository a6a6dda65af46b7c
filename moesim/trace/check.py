"""The rules a trace must keep, checked once where it enters; traces/README.md lists them for users."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.errors import TraceError
from moesim.trace.trace import DECODE, PHASES, PREFILL, Trace, TraceInfo

MAX_EXPERTS = 32767  # ids are int16
MAX_LAYERS = 1024
MAX_BYTES = 64 << 30  # of routing arrays in memory
CHUNK = 65536  # rows checked at a time, so that temporary arrays stay small
SUM_TOLERANCE = 0.01  # float16 and bfloat16 round each weight by up to 0.4 %
LARGEST_FLOAT16 = 0x7BFF  # as bits: anything above is infinite, NaN or negative
MINUS_ZERO = 0x8000


class RoutedModel(Protocol):
    """The part of a `moesim.model.Model` that a trace must agree with."""

    @property
    def name(self) -> str: ...
    @property
    def experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...


def check(trace: Trace, where: str) -> None:
    """Raise TraceError naming `where`, the row, the value, the rule and the remedy if `trace` breaks the schema."""
    check_info(trace.info, where)
    _check_shapes(trace, where)
    _check_requests(trace, where)
    _check_rows(trace, where)
    for rows in chunks(trace.tokens):
        _check_experts(trace, rows, where)
        if trace.weights is not None:
            _check_weights(trace, rows, where)
        if trace.probabilities is not None:
            _check_probabilities(trace, rows, where)


def check_matches(trace: Trace, model: RoutedModel) -> None:
    """Raise TraceError unless the trace has the model's experts, top-k and number of MoE layers."""
    ours = {"experts": trace.info.experts, "top_k": trace.info.top_k, "MoE layers": trace.layers}
    theirs = {"experts": model.experts, "top_k": model.top_k, "MoE layers": len(model.moe_layers)}
    for what, value in ours.items():
        if value != theirs[what]:
            raise TraceError(
                f"trace of {trace.info.model}: {what} {value}, but model {model.name} has {theirs[what]}; "
                f"use a trace of {model.name}"
            )


def check_info(info: TraceInfo, where: str) -> None:
    """Check what the metadata alone can tell."""
    if not info.model:
        raise TraceError(f"{where}: metadata has an empty model name; name the model the routing belongs to")
    if not 1 <= info.experts <= MAX_EXPERTS:
        raise TraceError(f"{where}: {info.experts} experts; must be 1 to {MAX_EXPERTS}")
    if not 1 <= info.top_k <= info.experts:
        raise TraceError(f"{where}: top_k {info.top_k}, but {info.model} has {info.experts} experts; must be 1 to that")
    layers = info.moe_layers
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise TraceError(f"{where}: {len(layers)} MoE layers; must be 1 to {MAX_LAYERS}")
    if layers[0] < 0 or any(a >= b for a, b in itertools.pairwise(layers)):
        raise TraceError(f"{where}: moe_layers {_short(layers)} must be layer numbers in rising order, from 0")
    if info.id_space != "logical":
        raise TraceError(
            f"{where}: id_space '{info.id_space}'; must be 'logical': map replica ids back to expert ids "
            "with the engine's physical-to-logical map"
        )
    if info.provenance not in ("real", "synthetic"):
        raise TraceError(f"{where}: provenance '{info.provenance}'; must be 'real' or 'synthetic'")


def check_size(tokens: int, per_token: int, where: str) -> None:
    """Refuse routing arrays of `tokens` rows of `per_token` bytes that no machine here should try to hold."""
    if tokens < 1:
        raise TraceError(f"{where}: no tokens; a trace needs at least one row")
    if tokens * per_token > MAX_BYTES:
        raise TraceError(
            f"{where}: {tokens} tokens need {tokens * per_token / 2**30:.0f} GiB in memory, "
            f"more than {MAX_BYTES >> 30} GiB; cut it into parts first"
        )


def chunks(tokens: int) -> Iterator[slice]:
    """Slices of at most CHUNK rows, in order."""
    return (slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK))


def narrow(values: NDArray[Any], dtype: Any, name: str, where: str, *, row: int = 0, per_row: int = 1) -> NDArray[Any]:
    """`values` unchanged where their type fits `dtype`; otherwise checked, as a cast would wrap around."""
    if values.dtype != dtype:
        limits = np.iinfo(dtype)
        wrong = (values < limits.min) | (values > limits.max)
        if wrong.any():
            first = int(np.argmax(wrong))
            raise TraceError(
                f"{where}, row {row + first // per_row}: {name} {values[first]}; must be {limits.min} to {limits.max}"
            )
    return values


def _short(layers: tuple[int, ...]) -> str:
    return str(list(layers)) if len(layers) <= 8 else f"[{', '.join(map(str, layers[:8]))}, ...]"


def _check_shapes(trace: Trace, where: str) -> None:
    info, tokens = trace.info, trace.experts.shape[0]
    check_size(tokens, 2 * len(info.moe_layers) * info.top_k, where)
    expected = {
        "experts": (np.int16, (tokens, len(info.moe_layers), info.top_k)),
        "request": (np.int32, (tokens,)),
        "phase": (np.uint8, (tokens,)),
        "position": (np.int32, (tokens,)),
        "weights": (np.float16, (tokens, len(info.moe_layers), info.top_k)),
        "probabilities": (np.float16, (tokens, len(info.moe_layers), info.experts)),
    }
    for name, (dtype, shape) in expected.items():
        array = getattr(trace, name)
        if array is None and name in ("weights", "probabilities"):
            continue
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {list(array.shape)}"
            raise TraceError(f"{where}: {name} is {found}, but must be {np.dtype(dtype)} {list(shape)}")


def _check_requests(trace: Trace, where: str) -> None:
    requests, n = trace.requests, len(trace.requests)
    sizes = {len(requests.task), len(requests.prompt_tokens)}
    if requests.arrival_ns is not None:
        sizes.add(len(requests.arrival_ns))
    if sizes != {n}:
        raise TraceError(f"{where}: {n} request ids, but tasks, prompt_tokens or arrival_ns of another length")
    step = np.diff(trace.request, prepend=0)
    wrong = np.flatnonzero((step < 0) | (step > 1))
    if wrong.size or trace.request[0] != 0 or trace.request[-1] != n - 1:
        row = int(wrong[0]) if wrong.size else 0
        raise TraceError(f"{where}, row {row}: rows must be grouped by request, in the order of {n} requests")
    seen: set[str] = set()
    for index, name in enumerate(requests.request_id):
        if not name or name in seen:
            row = int(trace.first_row[index])
            raise TraceError(f"{where}, row {row}: request_id '{name}'; each request needs its own non-empty id")
        seen.add(name)
    _check_request_values("prompt_tokens", requests.prompt_tokens, trace, where)
    if requests.arrival_ns is not None:
        _check_request_values("arrival_ns", requests.arrival_ns, trace, where)


def _check_request_values(name: str, values: NDArray[np.integer], trace: Trace, where: str) -> None:
    negative = np.flatnonzero(values < 0)
    if negative.size:
        row = trace.first_row[negative[0]]
        raise TraceError(f"{where}, row {row}: {name} {values[negative[0]]}; must not be negative")


def _check_rows(trace: Trace, where: str) -> None:
    """Phases, positions and prompt lengths of each request."""
    phase, position = trace.phase, trace.position
    within = np.diff(trace.request, prepend=-1) == 0  # this row continues the request of the row before
    prompt = trace.requests.prompt_tokens[trace.request]

    def refuse(bad: NDArray[np.bool_], why: str) -> None:
        if bad.any():
            row = int(np.argmax(bad))
            raise TraceError(
                f"{where}, row {row}: {PHASES[phase[row]] if phase[row] < 2 else phase[row]} token at position "
                f"{position[row]} of request '{trace.requests.request_id[trace.request[row]]}' "
                f"(prompt_tokens {prompt[row]}): {why}"
            )

    refuse(phase > DECODE, "phase must be prefill or decode")
    refuse(position < 0, "positions must not be negative")
    refuse(within & (np.diff(phase.astype(np.int8), prepend=0) < 0), "prefill rows must come before decode rows")
    refuse(within & (np.diff(position, prepend=0) <= 0), "positions must rise within a request")
    refuse((phase == PREFILL) & (position >= prompt), "prefill positions must be below prompt_tokens")
    refuse((phase == DECODE) & (position < prompt), "decode positions must be prompt_tokens or above")


def _check_experts(trace: Trace, rows: slice, where: str) -> None:
    ids, info = trace.experts[rows], trace.info
    lowest, highest = ids.min(), ids.max()
    if lowest < -1 or highest >= info.experts:
        row, layer, rank = np.argwhere((ids < -1) | (ids >= info.experts))[0]
        raise TraceError(
            f"{_place(trace, rows, row, layer, where)}: expert {ids[row, layer, rank]}, "
            f"but {info.model} has {info.experts} (0 to {info.experts - 1})"
        )
    # NOTE: one contiguous vector per rank; comparing inside [rows, layers, k] is several times slower.
    by_rank = np.ascontiguousarray(ids.reshape(-1, info.top_k).T)
    for rank in range(1, info.top_k):
        if lowest < 0:
            _refuse(trace, rows, where, (by_rank[rank - 1] < 0) & (by_rank[rank] >= 0), "unused ranks must come last")
        for other in range(rank):
            same = by_rank[other] == by_rank[rank]
            if lowest < 0:
                same &= by_rank[rank] >= 0
            _refuse(trace, rows, where, same, "an expert may appear once per token and layer")
    if lowest < 0:
        unrouted = (ids.reshape(len(ids), -1) < 0).all(axis=1)
        if unrouted.any():
            row = rows.start + int(np.argmax(unrouted))
            raise TraceError(f"{where}, row {row}: no expert at any layer; drop padding rows before importing")


def _refuse(trace: Trace, rows: slice, where: str, bad: NDArray[np.bool_], why: str) -> None:
    """Raise at the first True of `bad`, which is flat over [rows, layers]."""
    if bad.any():
        row, layer = divmod(int(np.argmax(bad)), trace.layers)
        raise TraceError(
            f"{_place(trace, rows, row, layer, where)}: experts {trace.experts[rows][row, layer].tolist()}; {why}"
        )


def _check_weights(trace: Trace, rows: slice, where: str) -> None:
    assert trace.weights is not None
    weights, k = trace.weights[rows], trace.info.top_k
    _check_float16(trace, rows, weights, "weight", where)
    by_rank = weights.reshape(-1, k).T
    total = np.zeros(by_rank.shape[1], np.float32)
    for rank in range(k):
        total += by_rank[rank]
    if total.max() > 1 + SUM_TOLERANCE:
        row, layer = divmod(int(np.argmax(total > 1 + SUM_TOLERANCE)), trace.layers)
        raise TraceError(
            f"{_place(trace, rows, row, layer, where)}: weights sum to {total[row * trace.layers + layer]:.4g}; they "
            "are shares of at most 1: divide by the model's routed scaling factor, or by their sum"
        )
    unused = (trace.experts[rows] < 0) & (weights != 0)
    if unused.any():
        row, layer, rank = np.argwhere(unused)[0]
        raise TraceError(
            f"{_place(trace, rows, row, layer, where)}: weight {weights[row, layer, rank]} on an unused rank; must be 0"
        )


def _check_probabilities(trace: Trace, rows: slice, where: str) -> None:
    assert trace.probabilities is not None
    probabilities = trace.probabilities[rows]
    _check_float16(trace, rows, probabilities, "probability", where)
    total = probabilities.sum(axis=-1, dtype=np.float32)
    wrong = np.abs(total - 1) > SUM_TOLERANCE
    if wrong.any():
        row, layer = np.argwhere(wrong)[0]
        raise TraceError(
            f"{_place(trace, rows, row, layer, where)}: probabilities sum to {total[row, layer]:.4g}; "
            "must be 1: divide the router's scores by their sum"
        )


def _check_float16(trace: Trace, rows: slice, values: NDArray[np.float16], what: str, where: str) -> None:
    # NOTE: comparing bit patterns, as float16 arithmetic is slow in numpy.
    bits = values.view(np.uint16)
    if bits.max() <= LARGEST_FLOAT16:
        return
    bad = (bits > LARGEST_FLOAT16) & (bits != MINUS_ZERO)
    if bad.any():
        row, layer, rank = np.argwhere(bad)[0]
        raise TraceError(
            f"{_place(trace, rows, row, layer, where)}: {what} {values[row, layer, rank]}; "
            "must be finite and not negative"
        )


def _place(trace: Trace, rows: slice, row: int, layer: int, where: str) -> str:
    return f"{where}, row {rows.start + row}, layer {trace.info.moe_layers[layer]}"
