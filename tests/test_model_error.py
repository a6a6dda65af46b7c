"""P10 and P90: costs and the model's own error, what they are fitted to, and that no source's band knows the source."""

from __future__ import annotations

import math

import pytest

from moesim.efficiencies import read_table
from moesim.model_error import Miss, ModelError, band, fit, model_error


def test_bands_add_resources_as_squares():
    low, high = band(1.0, [0.5, 2.0, 0.25, 1.0])
    assert low == pytest.approx(2 ** -(5**0.5)) and high == pytest.approx(2.0)


def test_the_models_own_error_is_added_as_another_square():
    low, high = band(10.0, [8.0, 10.0], ModelError(costs=0.5, own=0.3))
    down = math.hypot(0.5 * math.log(10 / 8), 0.3)
    assert low == pytest.approx(10 * math.exp(-down)) and high == pytest.approx(10 * math.exp(0.3))


def test_a_fit_covers_four_of_five():
    """Where costs say nothing, the model's own error is the 80th percentile of what predictions were off by."""
    misses = [Miss("a", 0.0, i / 100) for i in range(1, 51)]
    error = fit(misses)
    assert sum(miss.off <= error.half_width(miss.costs) for miss in misses) / len(misses) == pytest.approx(
        0.8, abs=0.03
    )


def test_a_fit_trusts_costs_as_far_as_they_go():
    """Where misses are in proportion to what costs allow, a share of the costs is enough, and it is found."""
    misses = [Miss("a", scale, scale * i / 100) for scale in (0.1, 1.0) for i in range(1, 51)]
    assert fit(misses) == (0.5, 0.0) or fit(misses).own < 0.05


def test_a_source_with_many_rows_weighs_no_more_than_one_with_few():
    few, many = [Miss("few", 0.0, 0.3)], [Miss("many", 0.0, 0.1)] * 100
    assert fit(few + many).own == pytest.approx(0.3)
    assert fit([*[Miss("few", 0.0, 0.1)] * 5, Miss("one", 0.0, 0.1), *many]).own == pytest.approx(0.1)


def test_every_basis_has_a_fit_to_all_and_unknown_sources_get_it():
    rows = read_table("model_error")
    for basis in {row["basis"] for row in rows}:
        assert model_error(basis) == model_error(basis, "a source nobody has seen")
