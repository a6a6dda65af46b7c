"""What is packed comes back, whatever its sizes are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.packing import MOST, TILE, pack, unpack


@settings(deadline=None)  # the first call compiles
@given(
    st.sampled_from([1, 2, 3, 4, TILE - 1, TILE, TILE + 1, 5 * TILE + 3]),
    st.lists(st.sampled_from([0, 1, 7, 8, 15, 16, 31, 32, 33, 63]), min_size=3, max_size=3),
    st.sampled_from([(), (0,), (0, 2), (2, 0, 1)]),
    st.booleans(),
    st.integers(0, 1 << 16),
)
def test_rows_come_back(n, bits, chain, few, seed):
    """Random numbers of so many bits a column, or sums of them; all different or a few of them."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(-(1 << b), (1 << b) - 1, n, endpoint=True, dtype=np.int64) for b in bits]
    if few:
        columns = [rng.choice(values[:3], n) for values in columns]
    rows = np.cumsum(np.stack(columns, axis=1), axis=int(rng.integers(2)))
    ((rows_in_block, block),) = pack(rows, chain)
    assert rows_in_block == n
    assert np.array_equal(np.stack(unpack(block, n, chain, range(3)), axis=1), rows)
    assert np.array_equal(unpack(block, n, chain, [1])[0], rows[:, 1])


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_exceptions_and_full_dictionaries(share):
    rng, n = np.random.default_rng(0), MOST + 700
    values = np.where(rng.random((n, 2)) < share, rng.integers(1 << 40, size=(n, 2)), rng.integers(300, size=(n, 2)))
    values[:3000] %= 1000
    whole = [unpack(block, rows, (0, 1), range(2)) for rows, block in pack(values, (0, 1))]
    assert np.array_equal(np.concatenate([np.stack(columns, axis=1) for columns in whole]), values)


def test_what_never_changes_takes_nothing():
    rows = np.stack([np.arange(1000) * 3, np.full(1000, 7)], axis=1)
    ((_, block),) = pack(rows, ())
    assert sum(column.nbytes for column in block) == 0
