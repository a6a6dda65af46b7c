"""Imports point downwards, and the command line starts without the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import moesim

PACKAGE = Path(moesim.__file__).parent

# From the ground up, as in docs/design.md; a module may import from its own line and those above.
ROOMS = [
    ["errors", "units", "files", "output"],
    ["efficiencies", "architecture", "model_files", "model", "prices", "machine", "machine_file", "hardware"],
    ["costs", "memory"],
    ["profile", "profile_import", "profile_compare", "this_machine", "calibrate"],
    ["trace"],
    ["workload", "workload_files", "prediction"],
    ["policies"],
    ["transforms"],
    ["systems", "placement_files"],
    ["packing", "records"],
    ["engine"],
    ["metrics", "timeline", "plots", "run_figures", "profile_plots", "contracts", "model_error"],
    ["question"],
    [
        "compare",
        "page",
        "model_report",
        "whatif",
        "doctor",
        "run_report",
        "published",
        "published_report",
        "capacity",
        "result_formats",
    ],
    ["plan"],
    ["dashboard", "commands", "cli"],
]
HEAVY = ("torch", "plotly", "streamlit", "pandas", "numba", "scipy.optimize", "scipy.stats", "sklearn")


def room_of(module: str) -> int:
    for level, names in enumerate(ROOMS):
        if module.split(".")[1] in names:
            return level
    raise AssertionError(f"{module} is in no room: add it to ROOMS and to docs/design.md")


def imports_at_module_level(path: Path) -> list[str]:
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


def test_imports_point_downwards():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(("moesim", *path.relative_to(PACKAGE).with_suffix("").parts))
        if module == "moesim.__init__":
            continue
        for target in imports_at_module_level(path):
            if target.startswith("moesim."):
                assert room_of(target) <= room_of(module), f"{module} imports {target}, which lies above it"


def loaded_after(code: str) -> set[str]:
    script = f"import sys; {code}; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.splitlines()[-1].split()) if out.stdout.strip() else set()


def test_importing_moesim_loads_nothing_heavy():
    assert loaded_after("import moesim") == set()
    assert loaded_after("import moesim.question, moesim.compare, moesim.page, moesim.trace.io") == set()


def test_help_loads_no_numpy():
    code = "import sys, moesim.cli; print('numpy' in sys.modules, 'pyarrow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
