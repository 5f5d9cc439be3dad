"""The lessons in a real JupyterLab, in Debian's chromium: they run to the end, the monitor moves
while a cell is busy, the stop button stops, the chat panel chats, and axe finds no serious fault in
what we show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_page import (
    ARGUMENTS,
    begun,
    command,
    copy_unrun,
    faults,
    open_notebook,
    pictures,
    run_code,
    select,
    shot,
    wait_done,
)
from conftest import ROOT
from jupyter_client_http import JupyterServer
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = [pytest.mark.browser, pytest.mark.model]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    folder = tmp_path_factory.mktemp("lab")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        copy_unrun(notebook, folder)
    settings = folder / "settings"
    notifications = (
        settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    )
    notifications.parent.mkdir(parents=True)
    notifications.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    os.environ["JUPYTERLAB_SETTINGS_DIR"] = str(settings)
    os.environ["JUPYTERLAB_WORKSPACES_DIR"] = str(
        folder / "workspaces"
    )  # which tabs are open is nobody else's business
    server = JupyterServer(
        folder,
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
        app="jupyterlab",
    )
    yield server
    server.stop()
    del os.environ["JUPYTERLAB_SETTINGS_DIR"], os.environ["JUPYTERLAB_WORKSPACES_DIR"]


@pytest.fixture(scope="module")
def page(lab: JupyterServer, chromium: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 1600})
        page.errors = []  # type: ignore[attr-defined]
        page.on("pageerror", lambda error: page.errors.append(str(error)))  # type: ignore[attr-defined]
        open_notebook(page, f"{lab.url}/lab/tree/01_quickstart.ipynb?token={lab.token}")
        yield page
        shot(page, "at-the-end")
        browser.close()


def test_notebook_01_runs_to_the_end(page: Page) -> None:
    command(page, "notebook:run-all-cells")
    page.wait_for_timeout(1500)
    wait_done(page)
    errors = page.locator(
        ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], "
        ".jp-OutputArea-output pre span.ansi-red-fg"
    )
    assert errors.count() == 0, errors.all_text_contents()
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
    assert not page.errors, page.errors  # type: ignore[attr-defined]


def test_the_monitor_moves_while_a_cell_is_busy(page: Page, lab: JupyterServer) -> None:
    run_code(page, "llm = llmkit.load('smollm2', n_slots=4); monitor = llm.monitor(); monitor")
    page.wait_for_timeout(3000)
    wait_done(page)
    busy = "import time; end = time.time() + 8\nwhile time.time() < end: sum(range(1000))"
    run_code(
        page,
        (
            "s = llm.stream('Once', max_tokens=1500, ignore_eos=True)\n"
            f"print('python', 'runs', flush=True)\n{busy}"
        ),
    )
    seen = pictures(page, "python runs")
    shot(page, "monitor-busy")
    assert len(seen) >= 3, seen
    assert any("1 of 4 / 0" in text for text in seen), seen
    wait_done(page)


def test_the_monitor_moves_while_c_code_has_the_cell(page: Page) -> None:
    """One long call that releases the GIL: no bytecode of the cell runs, and no widget message is
    handled."""
    busy = "import ctypes; ctypes.CDLL(None).usleep(8_000_000)"
    run_code(
        page,
        (
            "s.close(); s = llm.stream('Once', max_tokens=1500, ignore_eos=True)\n"
            f"print('c', 'runs', flush=True)\n{busy}"
        ),
    )
    seen = pictures(page, "c runs")
    assert len(seen) >= 3, seen
    wait_done(page)


def test_the_stop_button_stops_a_generation(page: Page) -> None:
    run_code(
        page,
        (
            "s.close(); print('model', 'runs', flush=True); "
            "llm.generate('Once', max_tokens=3000, ignore_eos=True)"
        ),
    )
    begun(page, "model runs")
    page.wait_for_timeout(1000)
    page.locator(
        ".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel'], "
        ".jp-NotebookPanel-toolbar [title^='Interrupt']"
    ).first.click()
    page.wait_for_function(
        "() => document.body.innerText.includes('the text so far is in llm.last')", timeout=20_000
    )
    wait_done(page, 30_000)
    shot(page, "stopped")
    assert (
        page.locator(".jp-OutputArea-output")
        .filter(has_text="Interrupted")
        .last.inner_text()
        .count("\n")
        <= 2
    ), "one line, no traceback"


def test_the_stop_button_stops_a_long_prompt(page: Page) -> None:
    run_code(
        page, "print('prompt', 'runs', flush=True); llm.generate('word and ' * 1800, max_tokens=5)"
    )
    begun(page, "prompt runs")
    page.wait_for_timeout(500)
    page.locator(
        ".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel'], "
        ".jp-NotebookPanel-toolbar [title^='Interrupt']"
    ).first.click()
    wait_done(page, 60_000)
    run_code(
        page,
        (
            "print('stopped', llm.last.finish_reason.value, repr(llm.last.text), "
            "llm.generate('The', max_tokens=2).usage.completion_tokens)"
        ),
    )
    begun(page, "stopped abort '' 2")
    assert not page.errors, page.errors  # type: ignore[attr-defined]


def test_prices_are_no_formulas(page: Page) -> None:
    """MathJax reads "$250 for size a_b and $" as mathematics, in markdown and in HTML outputs."""
    said = "No: $250 for size a_b and $260 for c_d."
    code = f"""from dataclasses import replace
    from IPython.display import HTML, display
    talk = llm.session(); said = {said!r}
    display(HTML('<p>$' + 'E=mc^2$</p>'))
    display(replace(llm.generate('a', max_tokens=1), text=said))
    talks = [{{'role': role, 'content': said}} for role in ('user', 'assistant')]
    llm.chat_panel(messages=talks)"""
    run_code(page, "\n".join(line.strip() for line in code.splitlines()))
    wait_done(page)
    page.locator(".jp-OutputArea-output mjx-container").first.wait_for(
        timeout=20_000
    )  # a formula that is meant is one: MathJax has been here
    shown = page.locator(".jp-OutputArea-output").filter(has_text="$250 for size a_b and $260")
    assert shown.count() >= 2 and shown.locator("mjx-container").count() == 0


def test_the_chat_panel_streams_stops_and_edits(page: Page) -> None:
    run_code(page, "panel = llm.chat_panel(temperature=0, max_tokens=1500, ignore_eos=True); panel")
    wait_done(page)
    output = page.locator(".jp-OutputArea-output").filter(has_text="Chat with smollm2").last
    output.scroll_into_view_if_needed()
    output.locator("textarea").fill("Tell a long story about a lighthouse.")
    output.get_by_role("button", name="Send").click()
    page.wait_for_function(
        "() => document.body.innerText.includes('\u258d')", timeout=10_000
    )  # an answer is coming
    shot(page, "chat-panel")
    run_code(page, "print('not', 'blocked')")
    page.wait_for_function("() => document.body.innerText.includes('not blocked')", timeout=10_000)
    output.get_by_role("button", name="Stop").click()
    output.get_by_text("answer complete").wait_for(timeout=10_000)
    assert "lighthouse" in output.inner_text().lower()
    assert faults(page, ".jp-OutputArea-output .widget-vbox") == []
    output.get_by_role("button", name="Edit last").click()
    expect(output.locator("textarea")).to_have_value(
        "Tell a long story about a lighthouse.", timeout=20_000
    )
    assert not page.errors, page.errors  # type: ignore[attr-defined]


def test_the_chat_panel_by_keyboard_alone(page: Page) -> None:
    run_code(page, "panel = llm.chat_panel(temperature=0, max_tokens=1500, ignore_eos=True); panel")
    wait_done(page)
    output = page.locator(".jp-OutputArea-output").filter(has_text="Chat with smollm2").last
    output.scroll_into_view_if_needed()
    page.keyboard.press("Escape")
    for _ in range(40):
        page.keyboard.press("Tab")
        if (
            page.evaluate("document.activeElement.matches('.jp-OutputArea-output textarea')")
            and output.locator("textarea:focus").count()
        ):
            break
    else:
        pytest.fail("Tab never comes to the message box")
    page.keyboard.type(
        "Tell a long story about dd bridges."
    )  # dd deletes a cell where keys are commands
    page.keyboard.press("Tab")
    assert output.locator("button:focus").inner_text().strip() == "Send"
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.body.innerText.includes('\u258d')", timeout=20_000)
    expect(output.get_by_role("button", name="Stop")).to_be_enabled(timeout=20_000)
    page.keyboard.press("Tab")
    assert output.locator("button:focus").inner_text().strip() == "Stop"
    page.keyboard.press("Space")
    output.get_by_text("answer complete").wait_for(timeout=10_000)
    page.keyboard.press("Tab")
    assert output.locator("button:focus").inner_text().strip() == "Edit last"
    page.keyboard.press("Enter")
    page.wait_for_function(
        (
            "() => [...document.querySelectorAll('.jp-OutputArea-output textarea')]"
            ".pop().value.includes('dd bridges')"
        ),
        timeout=10_000,
    )


@pytest.mark.parametrize("theme", ["JupyterLab Dark", "JupyterLab Light"])
def test_what_we_show_is_accessible(page: Page, theme: str) -> None:
    page.evaluate(
        "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme
    )
    page.wait_for_function(
        "theme => document.body.dataset.jpThemeName === theme", arg=theme, timeout=10_000
    )
    page.wait_for_timeout(1000)
    shot(page, f"panel-{theme[-5:].strip().lower()}")
    for where in (
        ".jp-OutputArea-output [role=group][aria-label^='llmkit']",
        ".jp-OutputArea-output .widget-vbox",
    ):
        assert page.locator(where).count() and faults(page, where) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_status_page_in_jupyter(page: Page, lab: JupyterServer, scheme: str) -> None:
    other = page.context.browser.new_page(
        viewport={"width": 1280, "height": 700}, color_scheme=scheme
    )  # type: ignore[union-attr,arg-type]
    errors: list[str] = []
    other.on("pageerror", lambda error: errors.append(str(error)))
    other.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    other.goto(f"{lab.url}/llmkit?token={lab.token}")
    other.get_by_text("01_quickstart.ipynb").wait_for(timeout=30_000)
    other.wait_for_timeout(2500)
    shot(other, f"status-{scheme}")
    assert (
        other.locator("#state table").count() >= 1 and faults(other, "body") == [] and not errors
    ), errors
    other.close()


def test_the_chat_page_in_jupyter(page: Page, lab: JupyterServer) -> None:
    """With Jupyter's login and its XSRF cookie, for a model that a notebook holds."""
    other = page.context.browser.new_page(viewport={"width": 1280, "height": 860})  # type: ignore[union-attr]
    errors: list[str] = []
    other.on("pageerror", lambda error: errors.append(str(error)))
    other.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    other.goto(f"{lab.url}/llmkit/chat?token={lab.token}")
    other.get_by_role("button", name="Model: smollm2").wait_for(timeout=30_000)
    other.get_by_label("Message", exact=True).fill("What is the capital of France?")
    other.keyboard.press("Enter")
    answer = other.locator(".message.assistant:not(.streaming) .prose")
    expect(answer).not_to_be_empty(timeout=60_000)
    said = answer.inner_text()
    row = other.locator("#sessions li.current")
    row.hover()
    row.get_by_role("button", name="More for").click()
    other.get_by_role("menuitem", name="Rename").click()
    other.keyboard.type("Capitals")
    other.keyboard.press("Enter")
    expect(row).to_contain_text("Capitals")
    shot(other, "chat-in-jupyter")
    other.get_by_role("link", name="Models").click()
    other.get_by_role("region", name="Models").wait_for(timeout=10_000)
    assert other.url.endswith("/llmkit/") and not errors, errors
    other.get_by_role("link", name="Chat").click()
    expect(answer).to_have_text(said, use_inner_text=True)
    other.close()


def test_notebook_7_runs_the_first_lesson(page: Page, tmp_path: Path) -> None:
    copy_unrun(ROOT / "notebooks" / "01_quickstart.ipynb", tmp_path)
    server = JupyterServer(
        tmp_path, "--JupyterNotebookApp.expose_app_in_browser=True", app="notebook"
    )
    other = page.context.browser.new_page(viewport={"width": 1280, "height": 1600})  # type: ignore[union-attr]
    try:
        errors: list[str] = []
        other.on("pageerror", lambda error: errors.append(str(error)))
        open_notebook(other, f"{server.url}/notebooks/01_quickstart.ipynb?token={server.token}")
        other.wait_for_timeout(3000)
        errors.clear()  # Notebook 7.6 itself stumbles over a setting while it starts
        command(other, "notebook:run-all-cells")
        other.wait_for_timeout(1500)
        wait_done(other, 180_000)
        shot(other, "notebook-7")
        failed = other.locator(
            ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], "
            ".jp-OutputArea-output pre span.ansi-red-fg"
        )
        assert failed.count() == 0, failed.all_text_contents()
        assert (
            other.locator(".jp-OutputArea-output [role=group][aria-label^='llmkit']").count() >= 1
            and not errors
        ), errors
    finally:
        other.close()
        server.stop()


@pytest.mark.parametrize(
    "lesson", [n.name for n in sorted((ROOT / "notebooks").glob("*.ipynb"))[1:]]
)
def test_the_lessons_run_to_the_end(page: Page, lab: JupyterServer, lesson: str) -> None:
    other = page.context.browser.new_page(viewport={"width": 1280, "height": 1600})  # type: ignore[union-attr]
    errors: list[str] = []
    other.on("pageerror", lambda error: errors.append(str(error)))
    open_notebook(other, f"{lab.url}/lab/tree/{lesson}?token={lab.token}&reset")
    command(other, "notebook:run-all-cells")
    other.wait_for_timeout(1500)
    wait_done(other, 180_000)
    failed = other.locator(
        ".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], "
        ".jp-OutputArea-output pre span.ansi-red-fg"
    )
    assert failed.count() == 0, failed.all_text_contents()
    shot(other, lesson.removesuffix(".ipynb"))
    assert not errors, errors
    command(other, "notebook:shutdown-kernel")
    other.close()
