"""Shared bandwidth: closed forms, fairness, and that nobody pays who shares nothing."""

from __future__ import annotations

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.engine.fluid import Fluid, fair_rates


def test_two_flows_share_a_full_resource_equally():
    assert fair_rates([10, 10], [("a",), ("a",)], {"a": 10}) == pytest.approx([5, 5])


def test_a_slow_flow_leaves_its_share_to_others():
    assert fair_rates([2, 10], [("a",), ("a",)], {"a": 10}) == pytest.approx([2, 8])


def test_a_flow_is_held_by_the_narrowest_of_its_resources():
    rates = fair_rates([10, 10, 10], [("a", "b"), ("a",), ("b",)], {"a": 12, "b": 4})
    assert rates == pytest.approx([2, 10, 2])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.sets(st.sampled_from("abc"))), min_size=1, max_size=6),
    st.fixed_dictionaries({name: st.floats(0.1, 100) for name in "abc"}),
)
def test_rates_respect_every_limit_and_waste_nothing(flows, capacity):
    own = [rate for rate, _ in flows]
    uses = [tuple(sorted(names)) for _, names in flows]
    rates = fair_rates(own, uses, capacity)
    load = {name: sum(r for r, u in zip(rates, uses, strict=True) if name in u) for name in capacity}
    assert all(0 <= rate <= limit * (1 + 1e-9) for rate, limit in zip(rates, own, strict=True))
    assert all(load[name] <= capacity[name] * (1 + 1e-9) for name in capacity)
    for rate, limit, names in zip(rates, own, uses, strict=True):
        held = any(load[name] >= capacity[name] * (1 - 1e-6) for name in names)
        assert rate >= limit * (1 - 1e-6) or held, "a flow below its own rate meets a full resource"


def run(capacity, flows):
    """Ends of flows (start, bytes, time alone, resources)."""
    env = simpy.Environment()
    fluid = Fluid(env, capacity)
    ends = {}

    def start(i, at, nbytes, alone, uses):
        yield env.timeout(at)
        fluid.run(nbytes, alone, uses, lambda _: ends.setdefault(i, env.now))

    for i, flow in enumerate(flows):
        env.process(start(i, *flow))
    env.run()
    return [ends[i] for i in range(len(flows))]


def test_alone_a_flow_takes_exactly_its_time():
    assert run({"dram": 5}, [(3, 1000, 777, ("dram",))]) == [780]


def test_two_equal_flows_take_twice_as_long_together():
    assert run({"dram": 1}, [(0, 1000, 1000, ("dram",)), (0, 1000, 1000, ("dram",))]) == [2000, 2000]


def test_a_late_comer_slows_the_rest_of_the_first():
    """Alone for 500 ns (500 bytes), then both at half speed: the first needs 1000 more, the second 500 alone after."""
    assert run({"dram": 1}, [(0, 1000, 1000, ("dram",)), (500, 1000, 1000, ("dram",))]) == [1500, 2000]


def test_unshared_flows_do_not_notice_each_other():
    assert run({"dram": 1}, [(0, 1000, 1000, ("dram",)), (0, 1000, 1000, ("pcie",))]) == [1000, 1000]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 500), st.integers(1, 5000), st.integers(1, 5000), st.just(("dram",))),
        min_size=1,
        max_size=6,
    ),
    st.floats(0.1, 10),
)
def test_no_flow_ends_before_its_time_alone_and_bytes_take_their_time(flows, capacity):
    ends = run({"dram": capacity}, flows)
    for end, (start, _, alone, _) in zip(ends, flows, strict=True):
        assert end >= start + alone
    if all(n / a <= capacity for _, n, a, _ in flows):
        total = sum(nbytes for _, nbytes, _, _ in flows)
        assert max(ends) - min(f[0] for f in flows) >= total / capacity - 1
