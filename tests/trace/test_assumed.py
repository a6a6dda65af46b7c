"""Routing nobody recorded: ids that differ, spread evenly; the tuned model is kept, and a damaged copy made anew."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.model import load_model
from moesim.trace import assumed
from moesim.trace.check import check

TINY = load_model("tiny-moe-8x16")


@pytest.mark.parametrize("name", ["tiny-moe-8x16", "mixtral-8x7b", "deepseek-v3"])
def test_distinct_routing_repeats_no_expert_and_favours_none(name):
    model = load_model(name)
    trace = assumed.distinct_routing(model, 20, 5, 5)
    check(trace, name)
    counts = np.bincount(trace.experts.ravel(), minlength=model.experts)
    assert abs(counts / counts.mean() - 1).max() < 6 / np.sqrt(counts.mean())
    assert (trace.experts == assumed.distinct_routing(model, 20, 5, 5).experts).all()


def test_a_tuned_model_is_kept_and_a_damaged_one_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path))

    def drawn():
        assumed._fitted.cache_clear()
        return assumed.local_routing(TINY, 2, 4, 4)

    first = drawn()
    (kept,) = tmp_path.glob("routing/*.npz")
    monkeypatch.setattr(assumed, "from_parameters", lambda *given, **more: pytest.fail("tuned again"))
    again = drawn()
    assert (again.experts == first.experts).all() and again.info == first.info
    monkeypatch.undo()
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path))
    kept.write_bytes(kept.read_bytes()[:1000])
    assert (drawn().experts == first.experts).all()
    monkeypatch.setenv("MOESIM_CACHE_DIR", "/proc/nowhere")  # cannot be written: no error
    assert (drawn().experts == first.experts).all()
