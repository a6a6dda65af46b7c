"""Starts Streamlit with what the first page needs already loaded, so that the first visitor does not wait for it."""

from __future__ import annotations

import sys

import plotly.graph_objects  # noqa: F401
from streamlit.web.cli import main

from moesim.dashboard import controls, pages  # noqa: F401
from moesim.model import load_model
from moesim.question import Question, estimate
from moesim.trace.assumed import distinct_routing

if __name__ == "__main__":
    small = load_model("tiny-moe-8x16")
    estimate(distinct_routing(small, 1, 2, 2), "LRU", Question(model=small))  # reads every catalogue once
    sys.exit(main())
