"""What the browser tests share: chromium, a JupyterLab, and what they do to its pages.

A module may share a browser and a server. A test has a page, a notebook and a kernel of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe
from jupyter_client_http import JupyterServer
from nbformat import NotebookNode
from playwright.sync_api import Browser, Page, expect, sync_playwright

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
WRONG = (
    ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], "
    ".jp-OutputArea-output pre span.ansi-red-fg"
)
# Notebook 7.6 itself stumbles over a setting while it starts.
NOTEBOOK_7_FAULT = "Cannot read properties of undefined (reading 'schema')"
CARD = ".jp-OutputArea-output [role=group][aria-label^='llmkit']"

# A loaded machine is slow, and a test that holds waits no longer than it must.
TIMEOUT_MS = 60_000
expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


def listen(page: Page, *, console: bool = True) -> list[str]:
    """What goes wrong in the scripts of a page, as it does; and what its console calls an error."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    if console:
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
    return errors


@contextmanager
def jupyterlab(folder: Path, base_url: str = "/") -> Iterator[JupyterServer]:
    """A JupyterLab whose settings, open tabs and data are in a folder of its own."""
    news = folder / "settings" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text(
        '{"fetchNews": "false", "checkForUpdates": false}'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTERLAB_SETTINGS_DIR", str(folder / "settings"))
        patch.setenv("JUPYTERLAB_WORKSPACES_DIR", str(folder / "workspaces"))
        patch.setenv("XDG_DATA_HOME", str(folder / "data"))
        options = ("expose_app_in_browser=True", "extension_manager=readonly")
        server = JupyterServer(
            folder, *(f"--LabApp.{each}" for each in options), app="jupyterlab", base_url=base_url
        )
    yield server
    server.stop()


def drawn(page: Page) -> None:
    """Wait for the next frame: a message that has just come, or is not written any more, has no
    ``innerText`` before the browser knows that it is in view."""
    page.evaluate("() => new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))")


def ask_for_little(page: Page) -> None:
    """Let the answers on the chat page be short, and the same each time: a small model may else go
    on and on until its context is full, which takes minutes on a loaded machine."""
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Longest answer").fill("16")
    page.get_by_role("button", name="Save").click()


def lesson(notebook: Path) -> NotebookNode:
    """A lesson without the outputs that it is kept with."""
    lesson = nbformat.read(notebook, as_version=4)
    for cell in lesson.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return lesson


def one_cell(code: str) -> NotebookNode:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell(code)]
    return nbformat.v4.new_notebook(metadata={"kernelspec": kernel}, cells=cells)


@contextmanager
def opened(
    page: Page,
    server: JupyterServer,
    path: str,
    notebook: NotebookNode,
    *,
    app: Literal["lab/tree", "notebooks"] = "lab/tree",
) -> Iterator[Page]:
    """The page shows a fresh notebook. In the end it is closed, and the server has no kernel left.

    Fails if a script of the page has failed.
    """
    server.request("PUT", f"/api/contents/{path}", {"type": "notebook", "content": notebook})
    errors = listen(page, console=False)
    try:
        open_notebook(page, f"{server.url}/{app}/{path}?token={server.token}&reset")
        yield page
        if app == "notebooks":
            errors = [error for error in errors if NOTEBOOK_7_FAULT not in error]
        assert not errors, errors
    finally:
        page.close()
        for session in server.request("GET", "/api/sessions"):
            server.request("DELETE", f"/api/sessions/{session['id']}")


def open_notebook(page: Page, url: str) -> None:
    """Open a notebook and wait until its kernel is there."""
    page.goto(url, timeout=90_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-CodeCell", timeout=TIMEOUT_MS)
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.ready")
    page.wait_for_selector(IDLE, timeout=TIMEOUT_MS)


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
    """Every code cell has run, or was stopped. Fails at once when one fails."""
    said = page.wait_for_function(
        """() => {
          const cells = window.jupyterapp.shell.currentWidget.content.widgets
            .filter(w => w.model.type === 'code').map(w => w.model);
          const wrong = cells.flatMap(cell => cell.outputs.toJSON())
            .find(o => o.output_type === 'error' && o.ename !== 'Interrupted');
          if (wrong) return [wrong.ename, wrong.evalue, ...wrong.traceback].join('\\n');
          const ended = cell => cell.executionCount !== null && cell.executionState === 'idle';
          return cells.every(ended) && 'done';
        }""",
        timeout=timeout,
    ).json_value()
    assert said == "done", said
    page.wait_for_selector(IDLE, timeout=timeout)


def run_all(page: Page, timeout: int = 240_000) -> None:
    """Run the cells of a notebook that has not run yet, to the end; nothing may go wrong."""
    command(page, "notebook:run-all-cells")
    wait_done(page, timeout)
    assert page.locator(WRONG).count() == 0, page.locator(WRONG).all_text_contents()


def saved(page: Page, server: JupyterServer, path: str) -> NotebookNode:
    """Save the notebook that is shown, and read it."""
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    return nbformat.from_dict(server.request("GET", f"/api/contents/{path}")["content"])


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
    page.evaluate(
        """async () => {
          const {commands, shell} = window.jupyterapp, {content} = shell.currentWidget;
          content.activeCellIndex = content.widgets.length - 1;
          await commands.execute('notebook:insert-cell-below');
          await commands.execute('notebook:enter-edit-mode');
        }"""
    )
    page.wait_for_function(
        """() => {
          const {editor} = window.jupyterapp.shell.currentWidget.content.activeCell;
          if (editor && !editor.hasFocus()) editor.focus();
          return editor?.hasFocus();
        }"""
    )
    page.keyboard.insert_text(code)
    page.wait_for_function(
        "code => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel"
        ".getSource() === code",
        arg=code,
    )
    page.keyboard.press("Control+Enter")


def begun(page: Page, mark: str) -> None:
    """Wait for what a cell prints when it begins."""
    page.locator(".jp-OutputArea-output pre").get_by_text(mark, exact=True).wait_for(
        timeout=TIMEOUT_MS
    )


def pictures(page: Page, mark: str, enough: Callable[[set[str]], bool]) -> set[str]:
    """What the monitor shows from when a busy cell says that it begins, until it is enough."""
    begun(page, mark)
    card = page.locator(CARD).last
    seen: set[str] = set()
    end = time.monotonic() + TIMEOUT_MS / 1000
    while not enough(seen) and time.monotonic() < end:
        seen.add(card.inner_text())
        page.wait_for_timeout(250)
    return seen
