"""The lessons in a real JupyterLab and Notebook 7, in Debian's chromium: they run to the end, and
what is saved can be read without widgets."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from browser_page import (
    CARD,
    browser,
    jupyterlab,
    lesson,
    one_cell,
    opened,
    run_all,
    saved,
    select,
    shot,
)
from conftest import ROOT
from jupyter_client_http import JupyterServer
from playwright.sync_api import Browser, Page
from saved_notebook import check_saved

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.browser, pytest.mark.model]
FIRST, *OTHERS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Those that show most; nbval runs every lesson, and `make soak` shows every one here.
SHOWN = [n for n in OTHERS if os.environ.get("SOAK") or n.name[:2] in ("05", "07", "10")]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    folder = tmp_path_factory.mktemp("lab")
    for module in (ROOT / "notebooks").glob("*.py"):
        shutil.copy(module, folder)
    with jupyterlab(folder) as server:
        yield server


@pytest.fixture
def page(browser: Browser) -> Page:
    return browser.new_page(viewport={"width": 1280, "height": 1600})


def test_notebook_01_runs_to_the_end(page: Page, lab: JupyterServer) -> None:
    with opened(page, lab, FIRST.name, lesson(FIRST)):
        run_all(page)
        assert check_saved(saved(page, lab, FIRST.name)) > 0, "a monitor"
        assert page.get_by_text("smollm2 is served in Jupyter").count() == 1
        assert page.locator(".jp-RenderedImage img").count() == 1, "the profile's picture"
        assert (
            "Red"
            in page.locator(".jp-CodeCell")
            .filter(has_text="the stock client, in another process")
            .locator(".jp-OutputArea-output")
            .inner_text()
        )
        for i in (0, 9, 16, 24):
            select(page, i)
            page.evaluate(
                "() => { const c = window.jupyterapp.shell.currentWidget.content; "
                "c.scrollToItem(c.activeCellIndex, 'start'); }"
            )
            page.wait_for_timeout(500)
            shot(page, f"notebook-{i:02d}")


def test_notebook_7_shows_widgets(page: Page, tmp_path: Path) -> None:
    server = JupyterServer(
        tmp_path, "--JupyterNotebookApp.expose_app_in_browser=True", app="notebook"
    )
    notebook = one_cell("import llmkit\nllm = llmkit.load(n_ctx=512)\nllm")
    for code in ("llm.monitor()", "llm.stream('Once', max_tokens=3).result()", "llm.chat_panel()"):
        notebook.cells.append(nbformat.v4.new_code_cell(code))
    try:
        with opened(page, server, "widgets.ipynb", notebook, app="notebooks"):
            run_all(page)
            shot(page, "notebook-7")
            assert page.locator(CARD).count() >= 1
            assert page.get_by_role("button", name="Send").count() == 1
    finally:
        server.stop()


@pytest.mark.parametrize("notebook", SHOWN, ids=lambda notebook: notebook.name)
def test_the_lessons_run_to_the_end(page: Page, lab: JupyterServer, notebook: Path) -> None:
    with opened(page, lab, notebook.name, lesson(notebook)):
        run_all(page)
        shot(page, notebook.stem)
        check_saved(saved(page, lab, notebook.name))
