"""What the browser tests do to a page of JupyterLab."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


SHOTS = (
    Path(os.environ.get("LLMKIT_SCREENSHOTS", "")) if os.environ.get("LLMKIT_SCREENSHOTS") else None
)


IDLE = (
    '.jp-NotebookPanel-toolbar [data-status="idle"], '
    '.jp-Notebook-ExecutionIndicator[data-status="idle"]'
)


def copy_unrun(notebook: Path, folder: Path) -> None:
    """A lesson without the outputs that it is kept with."""
    lesson = nbformat.read(notebook, as_version=4)
    for cell in lesson.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(lesson, folder / notebook.name)


def open_notebook(page: Page, url: str) -> None:
    """Open a notebook and wait until its kernel is there."""
    page.goto(url, timeout=90_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=60_000)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    page.wait_for_selector(IDLE, timeout=60_000)


def faults(page: Page, where: str) -> list[str]:
    """Serious accessibility faults that axe finds."""
    found = Axe().run(page, context=where).response["violations"]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:200]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


def shot(page: Page, name: str) -> None:
    if SHOTS is not None:
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{name}.png")


def command(page: Page, name: str) -> None:
    """Run a JupyterLab command without waiting for its end."""
    page.evaluate("name => { window.jupyterapp.commands.execute(name); }", name)


def wait_done(page: Page, timeout: int = 240_000) -> None:
    """Every code cell has run."""
    cells = (
        "window.jupyterapp.shell.currentWidget.content.widgets.filter(w => w.model.type === 'code')"
    )
    page.wait_for_function(
        f"() => {cells}.every(w => w.model.executionCount !== null)", timeout=timeout
    )
    page.wait_for_selector(IDLE, timeout=timeout)


def select(page: Page, index: int) -> None:
    page.evaluate(
        (
            "i => { const c = window.jupyterapp.shell.currentWidget.content; "
            "c.activeCellIndex = i < 0 ? c.widgets.length + i : i; }"
        ),
        index,
    )
    page.wait_for_timeout(300)


def run_code(page: Page, code: str) -> None:
    """Type into a new last cell and run it, without waiting."""
    select(page, -1)
    for name in ("notebook:insert-cell-below", "notebook:enter-edit-mode"):
        page.evaluate("name => window.jupyterapp.commands.execute(name)", name)
        page.wait_for_timeout(200)
    page.keyboard.insert_text(code)
    page.keyboard.press("Control+Enter")


def begun(page: Page, mark: str) -> None:
    """Wait for what a cell prints when it begins."""
    page.locator(".jp-OutputArea-output pre").get_by_text(mark, exact=True).wait_for(timeout=30_000)


def pictures(page: Page, mark: str) -> set[str]:
    """What the monitor has shown while the last cell, which says when it begins, was busy."""
    begun(page, mark)
    card = page.locator(".jp-OutputArea-output [role=group][aria-label^='llmkit']").last
    seen = set()
    for _ in range(20):
        seen.add(card.inner_text())
        page.wait_for_timeout(250)
    return seen
