"""The tutorial notebooks run, by nbval and by nbconvert, and are kept as they ran."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from saved_notebook import check_saved

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.model


def test_there_are_notebooks() -> None:
    assert [n.name[:2] for n in NOTEBOOKS] == [
        f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)
    ] and len(NOTEBOOKS) >= 3


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_nbval(notebook: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval-lax",
        "--nbval-sanitize-with",
        str(ROOT / "tests" / "nbval.cfg"),
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(notebook.parent),
        str(notebook),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, cwd=notebook.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def test_nbconvert_runs_a_lesson(tmp_path: Path) -> None:
    """One: nbval runs the cells of each, and `test_browser` looks at what some of them save."""
    (notebook,) = [n for n in NOTEBOOKS if n.name.startswith("06")]
    out = tmp_path / "out.ipynb"
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]
    done = subprocess.run(
        [*command, str(notebook), "--output", str(out)],
        capture_output=True,
        text=True,
        timeout=560,
        cwd=notebook.parent,
    )
    assert done.returncode == 0, done.stderr
    check_saved(nbformat.read(out, as_version=4))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebooks_are_kept_as_they_ran(notebook: Path) -> None:
    """`make notebooks` writes them: a reader sees the pictures; what is the same everywhere is
    marked, and nbval compares it."""
    cells = [c for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), (
        "run from top to bottom"
    )
    outputs = [o for c in cells for o in c.outputs]
    assert check_saved(nbformat.read(notebook, as_version=4)) == 0, "make notebooks"
    assert any("nbval-check-output" in c.metadata.get("tags", ()) for c in cells)
    shown = json.dumps(
        [
            {k: v for k, v in o.get("data", {}).items() if k != "image/png"} or o.get("text", "")
            for o in outputs
        ]
    )
    assert not re.search(r"/(root|home|tmp|work|usr|var|Users)/", shown), (
        "an output names a place of the machine it ran on"
    )
