"""The app: `streamlit run` starts this file; options come in environment variables that `moesim dashboard` sets."""

from __future__ import annotations

import os
from pathlib import Path

import streamlit as st

from moesim.dashboard import pages
from moesim.dashboard.controls import controls, shared
from moesim.dashboard.state import Files
from moesim.trace import cache

st.set_page_config("moesim", page_icon=":material/speed:", layout="wide")

home = cache.folder() / "dashboard"
traces = os.environ.get("MOESIM_TRACES")
files = Files(Path(traces) if traces else None, home / "uploads")

shown = st.navigation(
    [
        st.Page(pages.fit, title="Fit & flags", icon=":material/memory:", url_path="fit", default=True),
        st.Page(pages.lab, title="Cache & prefetch lab", icon=":material/science:", url_path="lab"),
        st.Page(pages.capacity, title="Capacity & cost", icon=":material/payments:", url_path="capacity"),
        st.Page(pages.timeline, title="Timeline & validation", icon=":material/timeline:", url_path="timeline"),
    ],
    position="top",
)
asked = controls(files)
shared(asked, files, home)
shown.run()
