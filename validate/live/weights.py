"""Real experts: weights in host memory or in a file, slots on the device, and the arithmetic of one expert."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesim.calibrate.samoyeds import prune_2_4

HIGH_BITS, LOW_BITS = 32, 16
DTYPES = {HIGH_BITS: torch.float32, LOW_BITS: torch.bfloat16}  # bits per weight that experts are kept in


@dataclass(frozen=True)
class Shape:
    """Gated experts of three [hidden, ffn] matrices, `experts` in each of `layers` layers.

    sparse: bfloat16 with two of four weights left, as cuSPARSELt packs them: half of the values and 2 bits for each.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    ffn: int
    sparse: bool = False

    @property
    def weights(self) -> int:
        return 3 * self.hidden * self.ffn

    @property
    def stored(self) -> int:
        """Numbers an expert is kept in."""
        return self.weights * 9 // 16 if self.sparse else self.weights

    def dtype(self, bits: int) -> torch.dtype:
        return torch.bfloat16 if self.sparse else DTYPES[bits]

    def nbytes(self, bits: float = HIGH_BITS) -> int:
        return self.stored * self.dtype(int(bits)).itemsize


class Backend:
    """Where experts are computed. On a GPU copies have a stream of their own; each call below waits for its own.

    There, kernels are replayed as graphs: launched one by one from Python they would wait for the interpreter's lock
    whenever the copy thread holds it, which no engine written for the purpose does.
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if self.cuda else None
        self._captures = torch.cuda.Stream(self.device) if self.cuda else None
        self._pool = torch.cuda.graph_pool_handle() if self.cuda else None

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as one launch; on the CPU as it is. What it reads and writes must stay where it lies."""
        if not self.cuda:
            return work
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._captures):
            work()  # the libraries set themselves up outside the capture
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # the copy thread goes on meanwhile
            work()
            graph.capture_end()
        torch.cuda.synchronize(self.device)
        return graph.replay

    def computed(self) -> None:
        """Wait for the kernels of this thread, not for copies."""
        if self.cuda:
            torch.cuda.current_stream(self.device).synchronize()

    def copying(self) -> Any:
        return torch.cuda.stream(self._copies) if self._copies is not None else nullcontext()

    def copied(self) -> None:
        if self._copies is not None:
            self._copies.synchronize()


class HostExperts:
    """Every expert at one precision: in memory (pinned beside a GPU), or in an unlinked file read with `preadv`.

    One layer is drawn and the others repeat it, which costs the same to copy and to compute.
    """

    def __init__(self, shape: Shape, bits: int, pinned: bool = False, on_disk: bool = False) -> None:
        self.shape, self.bits, self.nbytes = shape, bits, shape.nbytes(bits)
        generator = torch.Generator().manual_seed(0)
        layer = torch.randn(shape.experts, shape.weights, generator=generator) / shape.hidden**0.5
        layer = torch.stack([_packed(shape, expert) for expert in layer]) if shape.sparse else layer.to(DTYPES[bits])
        self._file: int | None = None
        if on_disk:
            self._memory = layer
            self._file = self._write(layer)
        else:
            self._memory = layer.repeat(shape.layers, 1)
            if pinned:
                self._memory = self._memory.pin_memory()

    def _write(self, layer: Tensor) -> int:
        handle, name = tempfile.mkstemp(prefix="moesim-experts-")
        Path(name).unlink()
        try:
            for _ in range(self.shape.layers):
                for expert in layer:
                    os.write(handle, _bytes(expert))
        except OSError:
            os.close(handle)
            raise
        return handle

    def close(self) -> None:
        """Give the file back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def of(self, layer: int, expert: int) -> Tensor:
        """The expert in host memory; a file's weights are those of its one drawn layer."""
        return self._memory[expert if self._file is not None else layer * self.shape.experts + expert]

    def copy_to(self, slot: Tensor, layer: int, expert: int, part: int = 0, parts: int = 1) -> None:
        """Bring one of `parts` equal pieces into `slot`; on a GPU the copy is only queued."""
        size = self.shape.stored // parts
        piece = slot[part * size : (part + 1) * size]
        if self._file is None:
            piece.copy_(self.of(layer, expert)[part * size : (part + 1) * size], non_blocking=True)
            return
        width = slot.element_size()
        place = (layer * self.shape.experts + expert) * self.nbytes + part * size * width
        if os.preadv(self._file, [_bytes(piece)], place) != size * width:
            raise OSError(f"short read of layer {layer} expert {expert}")


def _bytes(values: Tensor) -> memoryview:
    """A CPU tensor's memory."""
    return values.view(torch.uint8).numpy().data


def _packed(shape: Shape, expert: Tensor) -> Tensor:
    """An expert's three matrices pruned to 2:4 and packed on the GPU, one after the other."""
    matrices = expert.cuda().to(torch.bfloat16).view(3, -1)
    sides = ((shape.ffn, shape.hidden), (shape.ffn, shape.hidden), (shape.hidden, shape.ffn))
    packed = [torch._cslt_compress(prune_2_4(m.view(s))).flatten() for m, s in zip(matrices, sides, strict=True)]
    return torch.cat(packed).cpu()


def _sparse_forward(shape: Shape, weights: Tensor, x: Tensor) -> Tensor:
    gate, up, down = weights.view(3, -1)
    gate, up, down = gate.view(shape.ffn, -1), up.view(shape.ffn, -1), down.view(shape.hidden, -1)
    inner = torch.nn.functional.silu(torch._cslt_sparse_mm(gate, x.T)) * torch._cslt_sparse_mm(up, x.T)
    return torch._cslt_sparse_mm(down, inner).T


def forward(shape: Shape, weights: Tensor, x: Tensor) -> Tensor:
    """One gated expert over rows of `x` [tokens, hidden]; low-precision weights are unpacked first."""
    if shape.sparse:
        return _sparse_forward(shape, weights, x)
    weights = weights.to(x.dtype)
    size = shape.hidden * shape.ffn
    gate, up, down = (weights[i * size : (i + 1) * size] for i in range(3))
    inner = torch.nn.functional.silu(x @ gate.view(shape.hidden, shape.ffn)) * (x @ up.view(shape.hidden, shape.ffn))
    return inner @ down.view(shape.ffn, shape.hidden)


class Stage:
    """All of one shape: its experts in host memory, slots on the device, hidden states, and the work of a layer."""

    def __init__(
        self, shape: Shape, backend: Backend, slots: int, low_slots: int, rows: int, on_disk: bool = False
    ) -> None:
        self.shape, self.backend = shape, backend
        counts = {HIGH_BITS: slots, LOW_BITS: low_slots}
        self.host = {
            bits: HostExperts(shape, bits, pinned=backend.cuda, on_disk=on_disk) for bits, n in counts.items() if n
        }
        self.slots = {
            bits: list(torch.full((n, shape.stored), 0.01, dtype=shape.dtype(bits), device=backend.device))
            for bits, n in counts.items()
        }
        generator = torch.Generator().manual_seed(1)
        # one row more than tokens: graphs of fixed sizes fill up with it
        dtype = torch.bfloat16 if shape.sparse else torch.float32
        self.x = torch.randn(rows + 1, shape.hidden, generator=generator).to(backend.device, dtype)
        self.out = torch.zeros_like(self.x)
        self._mixer = torch.randn(shape.hidden, shape.hidden, generator=generator).to(backend.device, dtype)
        self.host_x = self.x.cpu()
        self._mixers: dict[int, Callable[[], None]] = {}
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], Tensor]] = {}
        self._indices: dict[tuple[int, ...], Tensor] = {}
        if backend.cuda:
            self._capture(rows)

    def close(self) -> None:
        for experts in self.host.values():
            experts.close()

    def know(self, rows: int, tokens: Iterable[list[int]]) -> None:
        """Get ready to run a step of so many rows and experts over `tokens`, before a clock runs: a small copy to the
        device would wait there behind an expert's."""
        if rows not in self._mixers:
            self._mixers[rows] = self.backend.captured(partial(self._mix, rows))
        for each in tokens:
            self._index(each)

    def mixer(self, rows: int) -> None:
        """What stands in for attention, router and dense parts: four square products over the step's tokens."""
        self.know(rows, ())
        self._mixers[rows]()
        self.backend.computed()

    def _mix(self, rows: int) -> None:
        self.out[:rows].zero_()
        x = self.x[:rows]
        for _ in range(4):
            x = x @ self._mixer

    def compute(self, parts: list[tuple[Tensor, list[int]]]) -> None:
        """Add the output of every (weights, token rows) to `out`; returns when it is there."""
        for weights, rows in parts:
            if self.backend.cuda:
                self._replay(weights, rows)
            else:
                self._add_expert(weights, self._index(rows))
        self.backend.computed()

    def _add_expert(self, weights: Tensor, index: Tensor) -> None:
        self.out.index_add_(0, index, forward(self.shape, weights, self.x[index]))

    def _capture(self, rows: int) -> None:
        """A graph for every slot and power of two of tokens."""
        for slot in (slot for slots in self.slots.values() for slot in slots):
            for power in range(self._power(1), self._power(rows) + 1):
                index = torch.zeros(1 << power, dtype=torch.int64, device=self.backend.device)
                graph = self.backend.captured(partial(self._add_expert, slot, index))
                self._graphs[slot.data_ptr(), 1 << power] = graph, index

    def _power(self, rows: int) -> int:
        """Of two that so many rows are filled up to; sparse products take eight at least."""
        return max((rows - 1).bit_length(), 3 if self.shape.sparse else 0)

    def _replay(self, weights: Tensor, rows: list[int]) -> None:
        known = self._index(rows)
        replay, index = self._graphs[weights.data_ptr(), len(known)]
        index.copy_(known)
        replay()

    def _index(self, rows: list[int]) -> Tensor:
        """The rows on the device; beside a GPU filled up to a power of two."""
        if (found := self._indices.get(tuple(rows))) is None:
            filled = rows
            if self.backend.cuda:
                filled = rows + [len(self.x) - 1] * ((1 << self._power(len(rows))) - len(rows))
            found = self._indices[tuple(rows)] = torch.tensor(filled, device=self.backend.device)
        return found

    def copy(self, slot: Tensor, bits: int, layer: int, expert: int, part: int = 0, parts: int = 1) -> None:
        """Bring an expert, or a piece of it, to the device; returns when it is there."""
        with self.backend.copying():
            self.host[bits].copy_to(slot, layer, expert, part, parts)
        self.backend.copied()

    def on_host(self, layer: int, expert: int, rows: list[int]) -> Tensor:
        """One expert on the CPU, from where it lies: its output in host memory."""
        return forward(self.shape, self.host[HIGH_BITS].of(layer, expert), self.host_x[torch.tensor(rows)])

    def add(self, rows: list[int], values: Tensor) -> None:
        """Host results join those of the device."""
        self.out.index_add_(0, torch.tensor(rows, device=self.backend.device), values.to(self.backend.device))
        self.backend.computed()
