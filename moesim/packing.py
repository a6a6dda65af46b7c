"""Rows of int64 in few bytes: each number as its difference to one it is close to, in 0, 1, 2 or 4 bytes.

A column counts from its own number in the row before. The columns of `chain` are times that follow one another: the
first counts from the last of the row before, each of the others from the one on its left. From a difference comes off
what it mostly is, and what is left has its sign in the lowest bit. TILE rows in turn have one size; what does not fit
is an exception (patched frame of reference, Zukowski et al., ICDE 2006). Where that is much, the number's place in a
dictionary does, while that has room: what takes time takes one of a few times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

MOST = 8192  # rows packed at once
TILE = 128
FAR = 0xFFFFFFFF  # in place of four bytes: the number is among those of eight
KINDS = (np.uint8, np.uint8, np.uint16, np.uint32, np.uint8, np.uint32, np.uint16, np.uint32, np.uint64)
SIZES, ONE, TWO, FOUR, CODES, WORDS, PLACES, EXCEPTIONS, EIGHT = range(len(KINDS))
MOST_WORDS = 256  # of a column's dictionary


@dataclass(frozen=True, slots=True)
class Packed:
    """A column of some rows: its first number, what differences mostly are, and the rest.

    parts: of every tile which of the next four holds it, or 0 (none where all is as mostly); the tiles of each size,
    one after the other; codes and the dictionary; places, then values, of exceptions; those of more than four bytes.
    """

    first: int
    mostly: int
    parts: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


def pack(rows: NDArray[np.int64], chain: tuple[int, ...]) -> list[tuple[int, list[Packed]]]:
    """Blocks of at most MOST rows: their number, and every column. rows: [n, columns]."""
    n, columns = rows.shape
    tiles = -(-min(n, MOST) // TILE)
    before, same_row = _before(columns, chain)
    parts = tuple([np.empty((columns, tiles * TILE), dtype=kind) for kind in KINDS])
    blocks = []
    for begin in range(0, n, MOST):
        part = np.ascontiguousarray(rows[begin : begin + MOST])
        mostly, used = np.zeros(columns, dtype=np.int64), np.zeros((columns, len(KINDS)), dtype=np.int64)
        _encode(part, before, same_row, mostly, used, parts)
        block = []
        first, usual, many = part[0].tolist(), mostly.tolist(), used.tolist()
        for c in range(columns):
            own = tuple(
                [array[c, :size].tobytes() if size else b"" for array, size in zip(parts, many[c], strict=True)]
            )
            block.append(Packed(first[c], usual[c], own))
        blocks.append((len(part), block))
    return blocks


def unpack(block: list[Packed], n: int, chain: tuple[int, ...], columns: Sequence[int]) -> list[NDArray[np.int64]]:
    """Some columns of a block of n rows."""
    times: dict[int, NDArray[np.int64]] = {}
    if set(chain) & set(columns):
        steps = np.stack([_differences(block[c], n) for c in chain], axis=1)
        steps[0, 0] = block[chain[0]].first
        whole = np.cumsum(steps.ravel()).reshape(n, len(chain))
        times = {c: whole[:, i] for i, c in enumerate(chain)}
    out = []
    for c in columns:
        if c in times:
            out.append(times[c])
            continue
        steps = _differences(block[c], n)
        steps[0] = block[c].first
        out.append(np.cumsum(steps))
    return out


def _before(columns: int, chain: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Which column each one counts from, and whether in the same row."""
    before, same_row = np.arange(columns), np.zeros(columns, dtype=np.bool_)
    for i, c in enumerate(chain):
        before[c], same_row[c] = chain[i - 1], i > 0
    return before, same_row


def _differences(packed: Packed, n: int) -> NDArray[np.int64]:
    if not any(packed.parts):
        return np.full(n, packed.mostly, dtype=np.int64)
    sizes, one, two, four, codes, words, places, exceptions, eight = map(np.frombuffer, packed.parts, KINDS)
    rest = np.zeros((len(sizes), TILE), dtype=np.uint64)
    for size, values in ((ONE, one), (TWO, two), (FOUR, four), (CODES, words[codes])):
        rest[sizes == size] = values.reshape(-1, TILE)
    if len(places):
        large = exceptions.astype(np.uint64)
        large[large == FAR] = eight
        rest.ravel()[places] = large
    rest = rest.ravel()[:n]
    signed = (rest >> np.uint64(1)).view(np.int64) ^ -(rest & np.uint64(1)).view(np.int64)
    signed += packed.mostly
    return signed


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _encode(rows, before, same_row, mostly, used, parts):
    """used: [columns, kinds] numbers of each; none where all differences are as `mostly`."""
    n, columns = rows.shape
    sizes = parts[0]
    for c in range(columns):
        mostly[c] = _usual(rows, c, before[c], same_row[c])
    rest = np.empty(TILE, dtype=np.uint64)
    slots = np.full((columns, 4 * MOST_WORDS), -1, dtype=np.int16)
    for begin in range(0, n, TILE):
        end = min(begin + TILE, n)
        for c in range(columns):
            b, lag = np.uint64(before[c]), 0 if same_row[c] else 1
            some = _rest(rows, begin, end, np.uint64(c), b, lag, mostly[c], rest)
            size = 0
            if some:
                size = _choose_size(rest)
                if size >= TWO and some < FAR and _by_words(rest, slots[c], used[c], parts[4][c], parts[5][c]):
                    size = CODES
                else:
                    _store(rest, size, used[c], parts[1][c], parts[2][c], parts[3][c])
                    _except(rest, begin, size, used[c], parts[6][c], parts[7][c], parts[8][c])
            sizes[c, begin // TILE] = size
    for c in range(columns):
        if used[c, 1:].any():
            used[c, SIZES] = (n + TILE - 1) // TILE


@numba.njit(nogil=True, error_model="numpy")
def _usual(rows, c, b, same_row):
    """How long it takes at least, as far as the first rows know; of other differences the one that comes twice."""
    if same_row:
        least = rows[0, c] - rows[0, b]
        for i in range(1, min(len(rows), TILE)):
            least = min(least, rows[i, c] - rows[i, b])
        return least
    if len(rows) < 4:
        return 0
    x, y, z = rows[1, c] - rows[0, b], rows[2, c] - rows[1, b], rows[3, c] - rows[2, b]
    return x if x in (y, z) else (y if y == z else 0)


@numba.njit(nogil=True, error_model="numpy")
def _rest(rows, begin, end, c, b, lag, usual, rest):
    """What is left of the differences of a tile; whether anything is."""
    some = np.uint64(0)
    if begin < lag:
        rest[0] = 0
        begin += 1
    place = np.uint64(begin & (TILE - 1))
    for i in range(np.uint64(begin), np.uint64(end)):
        left = rows[i, c] - rows[i - np.uint64(lag), b] - usual
        rest[place] = np.uint64(left << 1 ^ left >> 63)
        some |= rest[place]
        place += np.uint64(1)
    for i in range(place, np.uint64(TILE)):
        rest[i] = 0
    return some


@numba.njit(nogil=True, error_model="numpy")
def _choose_size(rest):
    """What takes the fewest bytes, without a dictionary; an exception takes 6."""
    small = medium = large = 0
    for i in range(TILE):
        small += rest[i] > 0
        medium += rest[i] > 0xFF
        large += rest[i] > 0xFFFF
    cost, size = 6 * small, 0
    if TILE + 6 * medium < cost:
        cost, size = TILE + 6 * medium, ONE
    if 2 * TILE + 6 * large < cost:
        cost, size = 2 * TILE + 6 * large, TWO
    return size if cost <= 4 * TILE else FOUR


@numba.njit(nogil=True, error_model="numpy")
def _by_words(rest, slots, used, codes, words):
    """Whether the dictionary, or the room left in it, does for the whole tile."""
    at = used[CODES]
    for i in range(TILE):
        place = np.int64(rest[i] * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(54))  # of 4 * MOST_WORDS
        while slots[place] >= 0 and words[slots[place]] != rest[i]:
            place = (place + 1) & (4 * MOST_WORDS - 1)
        if slots[place] < 0:
            if used[WORDS] == MOST_WORDS:
                return False
            slots[place] = used[WORDS]
            words[used[WORDS]] = rest[i]
            used[WORDS] += 1
        codes[at + i] = slots[place]
    used[CODES] += TILE
    return True


@numba.njit(nogil=True, error_model="numpy")
def _store(rest, size, used, one, two, four):
    if size == ONE:
        narrow = one[used[ONE] : used[ONE] + TILE]
        for i in range(TILE):
            narrow[i] = rest[i]
    elif size == TWO:
        wide = two[used[TWO] : used[TWO] + TILE]
        for i in range(TILE):
            wide[i] = rest[i]
    elif size == FOUR:
        wider = four[used[FOUR] : used[FOUR] + TILE]
        for i in range(TILE):
            wider[i] = rest[i]
    if size:
        used[size] += TILE


@numba.njit(nogil=True, error_model="numpy")
def _except(rest, begin, size, used, places, exceptions, eight):
    """What does not fit the size."""
    most = np.uint64((0, 0xFF, 0xFFFF, FAR - 1)[size])
    for i in range(TILE):
        if rest[i] > most:
            places[used[PLACES]] = begin + i
            exceptions[used[EXCEPTIONS]] = min(rest[i], np.uint64(FAR))
            used[PLACES] += 1
            used[EXCEPTIONS] += 1
            if rest[i] >= FAR:
                eight[used[EIGHT]] = rest[i]
                used[EIGHT] += 1
