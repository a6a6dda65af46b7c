"""Documentation cannot drift: outputs shown are the outputs printed, examples run, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest

from moesim.cli import app
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("traces/*.md")])
SHOWN = [
    (page, command, output)
    for page in PAGES
    for command, output in re.findall(r"<!-- output: (moesim .+?) -->\n```\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "command", "output"), SHOWN, ids=[f"{p.name}: {c}" for p, c, _ in SHOWN])
def test_outputs_shown_are_what_the_command_prints(page, command, output):
    code = "from moesim.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", code, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.stdout == output, f"paste the present output into {page.name}"


def test_files_shown_are_the_files_themselves():
    for page in PAGES:
        for name, shown in re.findall(r"<!-- file: (.+?) -->\n```python\n(.*?)```", page.read_text(), re.DOTALL):
            assert shown == (page.parent / name).read_text(), f"paste {name} into {page.name}"


def test_the_example_of_a_policy_prints_what_the_page_says():
    page = (ROOT / "docs" / "add-a-policy.md").read_text()
    example = re.search(r"<!-- example -->\n```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", page, re.DOTALL)
    assert example
    run = subprocess.run([sys.executable, "-c", example[1]], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout == example[2], run.stderr


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_documented_in_the_readme_or_docs():
    text = "".join(page.read_text() for page in PAGES)
    names = [command.name or command.callback.__name__ for command in app.registered_commands]
    names += [group.name for group in app.registered_groups]
    for name in names:
        assert f"moesim {name}" in text, f"`moesim {name}` is documented nowhere"


def test_the_notebook_prints_what_it_shows(tmp_path):
    """Executed anew, with the outputs that are text compared; figures are drawn and not compared."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shown = nbformat.read(ROOT / "docs" / "python.ipynb", as_version=4)
    again = nbformat.from_dict(shown)
    nbclient.NotebookClient(again, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    assert [_printed(cell) for cell in again.cells] == [_printed(cell) for cell in shown.cells]


def _printed(cell) -> str:
    outputs = cell.get("outputs", [])
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)
