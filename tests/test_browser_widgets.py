"""What a notebook shows in a real JupyterLab, in Debian's chromium: the monitor moves while a cell
is busy, the stop button stops, the chat panel chats, and axe finds no serious fault."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_page import (
    CARD,
    TIMEOUT_MS,
    begun,
    browser,
    faults,
    jupyterlab,
    one_cell,
    opened,
    pictures,
    run_all,
    run_code,
    shot,
    wait_done,
)
from fakes import wait_for
from jupyter_client_http import JupyterServer
from playwright.sync_api import Browser, Locator, Page, expect

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.browser, pytest.mark.model]
LOAD = "import llmkit; llm = llmkit.load('smollm2', n_slots=4)"
GENERATES = "s = llm.stream('Once', max_tokens=3000, ignore_eos=True)"
PANEL = "panel = llm.chat_panel(temperature=0, max_tokens=3000, ignore_eos=True); panel"
COMING = "\u258d"  # the end of an answer that is coming


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    with jupyterlab(tmp_path_factory.mktemp("lab")) as server:
        yield server


@pytest.fixture
def page(browser: Browser, lab: JupyterServer, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A notebook whose kernel holds a model."""
    page = browser.new_page(viewport={"width": 1280, "height": 1600})
    with opened(page, lab, "story.ipynb", one_cell(LOAD)):
        run_all(page)
        yield page
        shot(page, f"{request.node.name}-at-the-end")


def moves(seen: set[str]) -> bool:
    """Whether the monitor has shown the request, and several pictures."""
    return len(seen) >= 3 and any("1 of 4 / 0" in text for text in seen)


def test_the_monitor_moves_while_a_cell_is_busy(page: Page, tmp_path: Path) -> None:
    run_code(page, "import os; monitor = llm.monitor(); monitor")
    wait_done(page)
    end = tmp_path / "end"
    busy = f"while not os.path.exists({str(end)!r}): sum(range(1000))"
    run_code(page, f"{GENERATES}\nprint('python', 'runs', flush=True)\n{busy}")
    seen = pictures(page, "python runs", moves)
    shot(page, "monitor-busy")
    assert moves(seen), seen
    end.touch()
    wait_done(page)


def test_the_monitor_moves_while_c_code_has_the_cell(page: Page, tmp_path: Path) -> None:
    """One long call that releases the GIL: no bytecode of the cell runs, and no widget message is
    handled."""
    run_code(page, "import ctypes; monitor = llm.monitor(); monitor")
    wait_done(page)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    busy = f"ctypes.CDLL(None).open({os.fsencode(pipe)!r}, 0)"  # returns when somebody writes
    run_code(page, f"{GENERATES}\nprint('c', 'runs', flush=True)\n{busy}")
    seen = pictures(page, "c runs", moves)
    assert moves(seen), seen
    pipe.open("w").close()
    wait_done(page)


def interrupt(page: Page, lab: JupyterServer) -> None:
    """Press ■ while the model computes."""

    def computes() -> bool:
        models = lab.request("GET", "/llmkit/status")["models"]
        return any(model["num_running"] for model in models)

    wait_for(computes, 60)
    page.locator(
        ".jp-NotebookPanel-toolbar [data-command='notebook:interrupt-kernel'], "
        ".jp-NotebookPanel-toolbar [title^='Interrupt']"
    ).first.click()


def test_the_stop_button_stops_a_generation(page: Page, lab: JupyterServer) -> None:
    run_code(page, "llm.generate('Once', max_tokens=3000, ignore_eos=True)")
    interrupt(page, lab)
    stopped = page.locator(".jp-OutputArea-output").filter(has_text="Interrupted")
    expect(stopped).to_contain_text("the text so far is in llm.last")
    wait_done(page)
    shot(page, "stopped")
    assert stopped.inner_text().count("\n") <= 2, "one line, no traceback"


def test_the_stop_button_stops_a_long_prompt(page: Page, lab: JupyterServer) -> None:
    run_code(page, "llm.generate('word and ' * 1800, max_tokens=5)")
    interrupt(page, lab)
    wait_done(page)
    run_code(
        page,
        (
            "print('stopped', llm.last.finish_reason.value, repr(llm.last.text), "
            "llm.generate('The', max_tokens=2).usage.completion_tokens)"
        ),
    )
    begun(page, "stopped abort '' 2")


def test_prices_are_no_formulas(page: Page) -> None:
    """MathJax reads "$250 for size a_b and $" as mathematics, in markdown and in HTML outputs."""
    said = "No: $250 for size a_b and $260 for c_d."
    code = f"""from dataclasses import replace
    from IPython.display import HTML, display
    from llmkit.protocol import Message
    said = {said!r}
    display(HTML('<p>$' + 'E=mc^2$</p>'))
    display(replace(llm.generate('a', max_tokens=1), text=said))
    talk = llm.session()
    talk.messages += [Message(role, said) for role in ('user', 'assistant')]
    display(talk, llm.chat_panel(session=talk))"""
    run_code(page, "\n".join(line.strip() for line in code.splitlines()))
    wait_done(page)
    page.locator(".jp-OutputArea-output mjx-container").first.wait_for(
        timeout=TIMEOUT_MS
    )  # a formula that is meant is one: MathJax has been here
    shown = page.locator(".jp-OutputArea-output").filter(has_text="$250 for size a_b and $260")
    expect(shown).to_have_count(3)
    assert shown.locator("mjx-container").count() == 0


def chat_panel(page: Page) -> Locator:
    """A chat panel whose answers are long."""
    run_code(page, PANEL)
    wait_done(page)
    output = page.locator(".jp-OutputArea-output").filter(has_text="Chat with smollm2")
    output.scroll_into_view_if_needed()
    return output


def test_the_chat_panel_streams_stops_and_edits(page: Page) -> None:
    output = chat_panel(page)
    output.locator("textarea").fill("Tell a long story about a lighthouse.")
    output.get_by_role("button", name="Send").click()
    expect(output).to_contain_text(COMING)
    shot(page, "chat-panel")
    run_code(page, "print('not', 'blocked')")
    begun(page, "not blocked")
    output.get_by_role("button", name="Stop").click()
    expect(output).to_contain_text("answer complete")
    assert "lighthouse" in output.inner_text().lower()
    assert faults(page, ".jp-OutputArea-output .widget-vbox") == []
    output.get_by_role("button", name="Edit last").click()
    expect(output.locator("textarea")).to_have_value("Tell a long story about a lighthouse.")


def test_the_chat_panel_by_keyboard_alone(page: Page) -> None:
    output = chat_panel(page)
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
    focused = output.locator("button:focus")
    expect(focused).to_have_text("Send")
    page.keyboard.press("Enter")
    expect(output).to_contain_text(COMING)
    expect(output.get_by_role("button", name="Stop")).to_be_enabled()
    page.keyboard.press("Tab")
    expect(focused).to_have_text("Stop")
    page.keyboard.press("Space")
    expect(output).to_contain_text("answer complete")
    expect(output.get_by_role("button", name="Edit last")).to_be_enabled()
    page.keyboard.press("Tab")
    expect(focused).to_have_text("Edit last")
    page.keyboard.press("Enter")
    expect(output.locator("textarea")).to_have_value(re.compile("dd bridges"))


def test_what_we_show_is_accessible(page: Page) -> None:
    run_code(
        page,
        (
            "from IPython.display import display\n"
            "panel = llm.chat_panel(temperature=0, max_tokens=20); panel.send('Hello')\n"
            "panel.wait(); display(llmkit.estimate('smollm2'), llm, llm.monitor(), panel)"
        ),
    )
    wait_done(page)
    panel = page.locator(".jp-OutputArea-output .widget-vbox")
    expect(panel.first).to_contain_text("Hello")
    for theme in ("JupyterLab Dark", "JupyterLab Light"):
        page.evaluate(
            "theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", theme
        )
        page.wait_for_function(
            "theme => document.body.dataset.jpThemeName === theme", arg=theme, timeout=TIMEOUT_MS
        )
        page.wait_for_timeout(1000)
        shot(page, f"panel-{theme[-5:].strip().lower()}")
        for where in (CARD, ".jp-OutputArea-output .widget-vbox"):
            assert page.locator(where).count() and faults(page, where) == [], theme
