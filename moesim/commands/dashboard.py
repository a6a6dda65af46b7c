"""`moesim dashboard`: the pages in a browser."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from moesim.errors import MoesimError


def dashboard(
    port: Annotated[int, typer.Option("--port", help="Port to serve on.")] = 8501,
    traces: Annotated[Path, typer.Option("--traces", help="Folder of traces to offer.")] = Path("traces"),
    address: Annotated[str, typer.Option("--address", help="Address to listen on.")] = "localhost",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
) -> None:
    """Serve the what-if pages: fit and flags, cache lab, capacity and cost, timeline."""
    if importlib.util.find_spec("streamlit") is None:
        raise MoesimError("the dashboard needs streamlit; install it with: pip install 'moesim[dashboard]'")
    app = Path(__file__).parents[1] / "dashboard" / "app.py"
    options = {
        "server.port": port,
        "server.address": address,
        "server.headless": str(not browser).lower(),
        "server.maxUploadSize": 200,
        "browser.gatherUsageStats": "false",
    }
    settings = [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | ({"MOESIM_TRACES": str(traces.resolve())} if traces.is_dir() else {})
    command = [sys.executable, "-m", "moesim.dashboard.serve", "run", str(app), *settings]
    try:
        code = subprocess.call(command, env=environment)
    except KeyboardInterrupt:
        code = 0
    if code:
        raise typer.Exit(1)
