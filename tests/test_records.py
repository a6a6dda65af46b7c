"""Tables give back what was put in, whatever it was, and hold it in little memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moesim.records import Table

INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(arrays(np.int64, st.tuples(st.integers(0, 9), st.just(3)), elements=INT64), max_size=4), st.booleans())
def test_rows_come_back_in_order(blocks, singly):
    table = Table(("a", "b", "c"))
    for rows in blocks:
        if singly:
            for row in rows.tolist():
                table.add(row)
        else:
            table.extend(rows)
    whole = np.concatenate([np.empty((0, 3), dtype=np.int64), *blocks])
    assert len(table) == len(whole)
    assert np.array_equal(table.rows(), whole)
    assert np.array_equal(table.column("b"), whole[:, 1])


def test_a_block_may_be_written_over_afterwards():
    table, rows = Table(("a",)), np.arange(5)[:, None]
    table.extend(rows)
    rows[:] = 0
    table.add((7,))
    table.extend(rows)
    assert table.column("a").tolist() == [0, 1, 2, 3, 4, 7, 0, 0, 0, 0, 0]


def test_times_of_layers_take_a_tenth_of_their_numbers():
    rng, rows = np.random.default_rng(0), 50_000
    took = rng.choice([40_000, 41_000, 1_200_000], size=rows)
    end = np.cumsum(took)
    table = Table(("layer", "start", "end"), ("start", "end"))
    table.extend(np.stack([np.arange(rows) % 32, end - took, end], axis=1))
    held = sum(packed.nbytes for _, columns in table._blocks for packed in columns)
    assert held < 3 * 8 * rows / 8
