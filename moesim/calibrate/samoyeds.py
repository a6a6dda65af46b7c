"""Structured-sparse weights: the Samoyeds (N, M, V) format with a reference kernel, and plain 2:4.

Samoyeds (EuroSys'25, arXiv 2503.10725) cuts a weight into blocks of M rows x V columns, keeps N of the M row pieces in
each block, and inside those two of every four values. Activations are sparse too: only the tokens routed to the expert
are read, through an index. The kernel here is correct and plain, and no match for the published one in speed: it
expands the 2:4 part and multiplies block column by block column.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from moesim.errors import CalibrationError


@dataclass(frozen=True)
class Samoyeds:
    """A weight [rows, columns] in (n, m, v) form; `kept` = rows * n / m.

    values [kept, columns / 2]; positions uint8 [kept, columns / 8], two bits per value, first value lowest;
    pieces int32 [kept, columns / v]: which of the m rows of its block a piece is, in four bytes as the published kernel
    keeps it.
    """

    n: int
    m: int
    v: int
    rows: int
    values: Any
    positions: Any
    pieces: Any

    @property
    def nbytes(self) -> int:
        """Bytes held: values, positions and row indices."""
        return sum(part.numel() * part.element_size() for part in (self.values, self.positions, self.pieces))


def encode(weight: Any, n: int, m: int, v: int) -> Samoyeds:
    """Prune `weight` [rows, columns] by magnitude and pack it. Raises CalibrationError where blocks do not fit."""
    rows, columns = weight.shape
    check_shape(rows, columns, n, m, v)
    blocks = weight.view(rows // m, m, columns // v, v)
    norms = blocks.float().square().sum(-1)
    pieces = norms.topk(n, dim=1).indices.sort(dim=1).values  # [rows / m, n, columns / v]
    compact = blocks.gather(1, pieces.unsqueeze(-1).expand(-1, -1, -1, v)).reshape(-1, columns // 4, 4)
    chosen = compact.abs().topk(2, dim=-1).indices.sort(dim=-1).values
    values = compact.gather(-1, chosen).view(-1, columns // 2)
    return Samoyeds(n, m, v, rows, values, _pack(chosen.view(-1, columns // 8, 4)), pieces.view(-1, columns // v).int())


def check_shape(rows: int, columns: int, n: int, m: int, v: int) -> None:
    """Raises CalibrationError where (n, m, v) makes no sense or does not divide a weight [rows, columns]."""
    if not (0 < n <= m and v > 0 and v % 4 == 0):
        raise CalibrationError(f"samoyeds-{n},{m},{v}: needs 0 < N <= M and V a multiple of 4")
    if rows % m or columns % v or columns % 8:
        raise CalibrationError(
            f"samoyeds-{n},{m},{v}: a weight of {rows} x {columns} does not divide into blocks of {m} x {v} "
            "(and columns into eights); choose M and V that divide it"
        )


def decode(encoded: Samoyeds) -> Any:
    """The dense weight [rows, columns], zero where pruned."""
    compact = _expand(encoded)
    columns = compact.shape[1]
    blocks = compact.new_zeros(encoded.rows // encoded.m, encoded.m, columns // encoded.v, encoded.v)
    index = encoded.pieces.long().view(-1, encoded.n, columns // encoded.v, 1).expand(-1, -1, -1, encoded.v)
    source = compact.view(-1, encoded.n, columns // encoded.v, encoded.v)
    return blocks.scatter_(1, index, source).view(encoded.rows, columns)


def multiply(encoded: Samoyeds, x: Any, selected: Any | None = None) -> Any:
    """x [tokens, columns] times the weight, transposed: [t, rows]; only the tokens `selected` (t indices) are read.

    Sums are kept in float32 and returned in x's type.
    """
    import torch

    x = x if selected is None else x.index_select(0, selected)
    compact = _expand(encoded)
    kept, columns = compact.shape
    stripes, tokens = columns // encoded.v, x.shape[0]
    left = x.view(tokens, stripes, encoded.v).transpose(0, 1)
    right = compact.view(kept, stripes, encoded.v).permute(1, 2, 0)
    partial = torch.bmm(left, right).float()  # [stripes, tokens, kept]
    block = torch.arange(kept, device=x.device).div(encoded.n, rounding_mode="floor") * encoded.m
    target = (block.unsqueeze(1) + encoded.pieces.long()).t()  # [stripes, kept]: the row each piece adds to
    flat = partial.transpose(0, 1).reshape(tokens, stripes * kept)
    out = torch.zeros(tokens, encoded.rows, dtype=torch.float32, device=x.device)
    return out.scatter_add_(1, target.reshape(1, -1).expand(tokens, -1), flat).to(x.dtype)


def prune_2_4(weight: Any) -> Any:
    """`weight` with the two smaller of every four neighbours in a row set to zero."""
    import torch

    groups = weight.view(weight.shape[0], -1, 4)
    chosen = groups.abs().topk(2, dim=-1).indices
    return torch.zeros_like(groups).scatter_(-1, chosen, groups.gather(-1, chosen)).view_as(weight)


def parse(name: str) -> tuple[int, int, int]:
    """(N, M, V) of `samoyeds-1,2,128`."""
    match = re.fullmatch(r"samoyeds-(\d+),(\d+),(\d+)", name)
    if match is None:
        raise CalibrationError(f"sparse format '{name}': not known; known: 2:4, samoyeds-N,M,V")
    return int(match[1]), int(match[2]), int(match[3])


def _pack(positions: Any) -> Any:
    """Four two-bit positions [.., 4] to a byte."""
    import torch

    shifts = torch.arange(0, 8, 2, device=positions.device)
    return (positions << shifts).sum(-1).byte()


def _expand(encoded: Samoyeds) -> Any:
    """The kept pieces with their 2:4 zeros: [kept, columns]."""
    import torch

    kept, half = encoded.values.shape
    shifts = torch.arange(0, 8, 2, device=encoded.values.device, dtype=torch.uint8)
    positions = ((encoded.positions.unsqueeze(-1) >> shifts) & 3).view(kept, half // 2, 2)
    groups = encoded.values.new_zeros(kept, half // 2, 4)
    return groups.scatter_(-1, positions.long(), encoded.values.view(kept, half // 2, 2)).view(kept, 2 * half)
