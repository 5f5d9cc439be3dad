"""The gateway's pages in a real Jupyter server, in Debian's chromium, for a model that a notebook
holds: status and chat."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser_page import ask_for_little, browser, drawn, faults, listen, shot
from jupyter_client_http import JupyterServer
from playwright.sync_api import Browser, expect

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.browser, pytest.mark.model]
LOAD = "import llmkit; llm = llmkit.load('smollm2', n_slots=4)"


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """A Jupyter server with a notebook whose kernel holds a model."""
    server = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    try:
        server.notebook("01_quickstart.ipynb").run(LOAD)
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_status_page_in_jupyter(browser: Browser, server: JupyterServer, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 700}, color_scheme=scheme)  # type: ignore[arg-type]
    errors = listen(page)
    page.goto(f"{server.url}/llmkit?token={server.token}")
    expect(page.get_by_text("01_quickstart.ipynb")).to_be_visible()
    page.wait_for_timeout(2500)
    shot(page, f"status-{scheme}")
    assert page.locator("#state table").count() >= 1
    assert faults(page, "body") == [] and not errors, errors
    page.close()


def test_the_chat_page_in_jupyter(browser: Browser, server: JupyterServer) -> None:
    """With Jupyter's login and its XSRF cookie."""
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    errors = listen(page)
    page.goto(f"{server.url}/llmkit/chat?token={server.token}")
    expect(page.get_by_role("button", name="Model: smollm2")).to_be_visible()
    ask_for_little(page)
    page.get_by_label("Message", exact=True).fill("What is the capital of France?")
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant:not(.streaming) .prose")
    expect(answer).not_to_be_empty()
    drawn(page)
    said = answer.inner_text()
    row = page.locator("#sessions li.current")
    row.hover()
    row.get_by_role("button", name="More for").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.keyboard.type("Capitals")
    page.keyboard.press("Enter")
    expect(row).to_contain_text("Capitals")
    shot(page, "chat-in-jupyter")
    page.get_by_role("link", name="Models").click()
    expect(page.get_by_role("region", name="Models")).to_be_visible()
    assert page.url.endswith("/llmkit/") and not errors, errors
    page.get_by_role("link", name="Chat").click()
    expect(answer).to_have_text(said, use_inner_text=True)
    page.close()
