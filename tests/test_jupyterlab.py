"""The sidebar "Models" and its item in the status bar, in a real JupyterLab and Notebook 7, with a
kernel that holds a model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from browser_page import (
    begun,
    browser,
    command,
    faults,
    jupyterlab,
    one_cell,
    opened,
    run_code,
    shot,
)
from conftest import ROOT
from jupyter_client_http import JupyterServer
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect

from llmkit.version import __version__

__all__ = ["browser"]  # a fixture

SOURCE = ROOT / "jupyter_ext" / "labextension"
INSTALLED = Path(sys.prefix) / "share" / "jupyter" / "labextensions" / "@llmkit" / "lab"
LOAD = "import llmkit; llm = llmkit.load('smollm2', n_ctx=2048, n_slots=2)"
BUSY = "streams = [llm.stream('Once', max_tokens=1500, ignore_eos=True) for _ in range(3)]"


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_it_is_installed_as_it_is_here() -> None:
    assert files(INSTALLED) == files(SOURCE), "run `make setup`"
    recorded = importlib.metadata.files("llmkit") or ()
    assert any(str(file).endswith("labextensions/@llmkit/lab/package.json") for file in recorded)


def test_jupyterlab_lists_it_as_enabled() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jupyter", "labextension", "list"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    listed = re.sub(r"\x1b\[\d*m", "", done.stdout + done.stderr)
    assert f"@llmkit/lab v{__version__} enabled OK (python, llmkit)" in listed


def test_browsers_fetch_it_anew_when_it_has_changed() -> None:
    """The version in the address of its files is their checksum."""
    package = json.loads((SOURCE / "package.json").read_text())
    assert package["version"] == __version__
    scripts = files(SOURCE / "static")
    checksum = hashlib.sha256(b"".join(scripts[name] for name in sorted(scripts))).hexdigest()[:12]
    assert package["jupyterlab"]["_build"]["load"] == f"static/remoteEntry.js?v={checksum}"


def test_its_look_is_the_themes() -> None:
    style = (SOURCE / "static" / "models.css").read_text()
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b|rgba?\(|hsl", style), "only JupyterLab's variables"


NOTEBOOK = "work/sums.ipynb"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "work").mkdir()
    with jupyterlab(folder, base_url="/ann/") as server:
        yield server


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    context = browser.new_context(
        viewport={"width": 1280, "height": 800}, permissions=["clipboard-read", "clipboard-write"]
    )
    yield context
    context.close()


@pytest.fixture
def page(lab: JupyterServer, context: BrowserContext) -> Iterator[Page]:
    with opened(context.new_page(), lab, NOTEBOOK, one_cell("1 + 1")) as page:
        yield page
        shot(page, "models-at-the-end")


@pytest.fixture
def panel(page: Page) -> Locator:
    """The sidebar, shown, of a page whose kernel holds a model."""
    command(page, "llmkit:show-models")
    panel = page.get_by_role("region", name="Models")
    panel.wait_for()
    run_code(page, LOAD)
    expect(panel.get_by_role("heading", name="smollm2")).to_be_visible()
    return panel


def answered(answer: tuple[int, Any] | None, route: Route) -> None:
    """Answer in the server's place; with None, not at all."""
    if answer is None:
        route.abort()
    else:
        route.fulfill(status=answer[0], json=answer[1])


pictured = [pytest.mark.browser, pytest.mark.model]


class TestInJupyterLab:
    pytestmark = pictured

    def test_who_holds_what(self, page: Page, panel: Locator, lab: JupyterServer) -> None:
        card = panel.get_by_role("listitem")
        assert card.count() == 1
        run_code(page, BUSY)
        expect(card).to_contain_text("2 running, 1 waiting")
        expect(card).to_contain_text(re.compile(r"Speed[\d.]+ tokens/s"))
        for fact in ("Q4_1, CPU", "2,048 tokens", "97 MB"):
            expect(card).to_contain_text(fact)
        assert re.search(r"RAM\d+ MB, whole process", card.text_content() or "")
        status = page.locator("#jp-main-statusbar").get_by_role("button", name="smollm2")
        expect(status).to_have_text(re.compile(r"^smollm2 · [\d.]+ tokens/s · 1 waiting$"))
        shot(page, "models-busy")
        run_code(page, "[s.close() for s in streams]; del streams")
        expect(card).to_contain_text("0 running, 0 waiting")
        expect(status).to_have_text("smollm2 · idle")
        card.get_by_role("button", name="work/sums.ipynb").click()
        assert page.evaluate("window.jupyterapp.shell.currentWidget.context.path") == (
            "work/sums.ipynb"
        )

    def test_it_is_accessible(self, page: Page, panel: Locator) -> None:
        for theme in ("Dark", "Light"):
            page.evaluate(
                "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})",
                f"JupyterLab {theme}",
            )
            page.wait_for_function(
                "theme => document.body.dataset.jpThemeName === theme", arg=f"JupyterLab {theme}"
            )
            page.wait_for_timeout(1000)
            shot(page, f"models-{theme.lower()}")
            assert faults(page, ".llmkit-Models") == [] and faults(page, ".llmkit-Status") == []

    def test_the_address_and_the_chat(
        self, page: Page, panel: Locator, lab: JupyterServer, context: BrowserContext
    ) -> None:
        panel.get_by_role("button", name="Copy base URL").click()
        expect(panel.get_by_role("status")).to_have_text(f"Copied {lab.url}/llmkit/v1")
        assert page.evaluate("navigator.clipboard.readText()") == f"{lab.url}/llmkit/v1"
        assert (
            page.evaluate(
                "url => fetch(url + '/models').then(r => r.status)", lab.url + "/llmkit/v1"
            )
            == 200
        )
        with context.expect_page() as opened:
            panel.get_by_role("button", name="Open chat with smollm2").click()
        assert opened.value.url.startswith(f"{lab.url}/llmkit/chat?model=smollm2")
        opened.value.close()

    def test_unloading_asks_first(self, page: Page, panel: Locator, lab: JupyterServer) -> None:
        run_code(page, BUSY)
        expect(panel).to_contain_text("2 running")
        unload = panel.get_by_role("button", name="Unload smollm2")
        unload.focus()
        page.keyboard.press("Enter")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("It is held by work/sums.ipynb")
        expect(dialog).to_contain_text("3 requests that it is answering will end with an error")
        shot(page, "models-ask")
        page.keyboard.press("Enter")  # Cancel has the focus
        dialog.wait_for(state="detached")
        run_code(page, "print('still', 'here', llm.closed)")
        begun(page, "still here False")
        unload.click()
        dialog.get_by_role("button", name="Unload").click()
        said = panel.get_by_role("status")
        expect(said).to_have_text("Unloaded smollm2; its memory is free.")
        expect(panel).to_contain_text("No model is loaded")
        page.wait_for_function("document.activeElement.textContent === 'Models'")
        expect(page.locator(".llmkit-Status:visible")).to_have_count(0)
        run_code(page, "print('closed', llm.closed, repr(llm))")
        page.get_by_text(
            "closed True LLM('smollm2', gone: the model 'smollm2' was unloaded"
        ).wait_for()
        run_code(page, f"{LOAD}\nprint('anew', llm.closed)")
        begun(page, "anew False")
        expect(panel.get_by_role("heading", name="smollm2")).to_be_visible()

    def test_errors_are_shown(self, page: Page, panel: Locator) -> None:
        alert = panel.get_by_role("alert")
        for answer, said in [
            (None, "The Jupyter server does not answer."),
            ((404, {}), "jupyter server extension enable llmkit_jupyter"),
            ((403, {"message": "Forbidden"}), "Forbidden"),
        ]:
            page.route("**/llmkit/status*", partial(answered, answer))
            expect(alert).to_contain_text(said)
            expect(page.locator(".llmkit-Status")).to_have_text("Models: no answer")
            page.unroute("**/llmkit/status*")
        expect(alert).to_have_text("")
        failure = (500, {"error": {"message": "no luck"}})
        page.route("**/llmkit/admin/models/unload*", partial(answered, failure))
        panel.get_by_role("button", name="Unload smollm2").click()
        page.get_by_role("dialog").get_by_role("button", name="Unload").click()
        expect(panel.get_by_role("status")).to_have_text("smollm2 is not unloaded: no luck")
        page.unroute("**/llmkit/admin/models/unload*")

    def test_it_asks_only_while_somebody_looks(self, page: Page, panel: Locator) -> None:
        asked: list[str] = []
        page.on("request", lambda r: asked.append(r.url) if "llmkit/status" in r.url else None)
        hide = (
            "hidden => Object.defineProperty(document, 'hidden', "
            "{value: hidden, configurable: true})"
        )
        page.evaluate(hide, True)
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.wait_for_timeout(3000)  # what was under way
        asked.clear()
        page.wait_for_timeout(5000)
        assert asked == []
        page.evaluate(hide, False)
        with page.expect_request("**/llmkit/status?no_track_activity=1*"):
            page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


@pytest.mark.browser
@pytest.mark.model
def test_in_notebook_7(context: BrowserContext, tmp_path: Path) -> None:
    """It has a sidebar, but no status bar."""
    (tmp_path / "work").mkdir()
    server = JupyterServer(
        tmp_path, "--JupyterNotebookApp.expose_app_in_browser=True", app="notebook"
    )
    page = context.new_page()
    try:
        with opened(page, server, NOTEBOOK, one_cell("1 + 1"), app="notebooks"):
            run_code(page, f"{LOAD}; print('it', 'is', 'there')")
            begun(page, "it is there")
            command(page, "llmkit:show-models")
            panel = page.get_by_role("region", name="Models")
            expect(panel.get_by_role("heading", name="smollm2")).to_be_visible()
            expect(panel).to_contain_text("work/sums.ipynb")
            shot(page, "models-notebook-7")
            assert faults(page, ".llmkit-Models") == []
            panel.get_by_role("button", name="Unload smollm2").click()
            page.get_by_role("dialog").get_by_role("button", name="Unload").click()
            expect(panel).to_contain_text("No model is loaded")
    finally:
        server.stop()
