"""docs/costs.md says what the code computes with."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.efficiencies import terms
from tests.costs.test_published import ROWS

PAGE = (Path(__file__).parents[2] / "docs" / "costs.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", terms())
def test_every_term_is_documented_as_it_is(name: str) -> None:
    t = terms()[name]
    row = f"| `{name}` | {t.default:g} | {t.low:g} | {t.high:g} | {t.unit} | {t.meaning} | {t.source} |"
    assert row in PAGE, f"docs/costs.md: replace the row of {name} by\n{row}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_table_is_current(row) -> None:
    low, default, high = (row.predict(scale) for scale in ("low", "default", "high"))
    figures = f"| {row.ms:g} | {default:.1f} | {high:.1f} to {low:.1f} | {default / row.ms:.2f} |"
    assert figures in PAGE, f"docs/costs.md, against published runs: {row.name} is now {figures}"
