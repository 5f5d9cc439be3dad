"""Turns on the chat page that go on elsewhere: behind another conversation, in another tab, without
a connection."""

from __future__ import annotations

import re

import pytest
from browser_page import browser
from playwright.sync_api import Browser, Page, WebSocketRoute, expect
from scripted_model import ScriptedModel, ServedModels
from test_web_chat import LONG, answers, ended, model, page, say, served
from test_web_waiting import box, quiet

from llmkit.gateway.conversations import turns

__all__ = ["browser", "model", "page", "quiet", "served"]  # fixtures

pytestmark = pytest.mark.browser


def test_a_streamed_answer_is_whole_after_a_look_elsewhere(
    page: Page, model: ScriptedModel
) -> None:
    model.script, model.token_s = lambda said: LONG, 0.01
    say(page, "Count", ends=False)
    for name in ("New chat", "Models"):
        seen = len(page.locator(".streaming .prose").inner_text())
        page.wait_for_function(
            "seen => document.querySelector('.streaming .prose').innerText.length > seen + 400",
            arg=seen,
        )
        if name == "New chat":
            page.get_by_role("button", name=name).click()
            expect(page.locator("#welcome")).to_be_visible()
            page.locator("#sessions li[data-id] a").click()
        else:
            page.get_by_role("link", name=name).click()
            expect(page.locator("#state table").first).to_be_visible()
            page.get_by_role("link", name="Chat").click()
        expect(page.locator(".streaming .prose")).to_contain_text("0 bottles of water")
        expect(page.locator(".streaming .prose")).to_contain_text(", 20 bottles of water")
    model.token_s = 0
    ended(page)
    assert answers(page) == [LONG]


class Line:
    """The sockets of a page, which connect only while ``is_there``."""

    def __init__(self, page: Page) -> None:
        self.is_there = True
        page.route_web_socket("**/v1/chat/ws", self._connect)
        page.reload()

    def _connect(self, socket: WebSocketRoute) -> None:
        if self.is_there:
            socket.connect_to_server()
        else:
            socket.close()


def stored(page: Page, text: str) -> None:
    """Wait until the page has put away what is written, which it does a moment later."""
    page.wait_for_function("text => Object.values(sessionStorage).includes(text)", arg=text)


def test_a_message_without_a_connection(quiet: Page, model: ScriptedModel) -> None:
    """It is sent once there is one; until then it can be taken back, and outlives a reload."""
    page, line = quiet, Line(quiet)
    line.is_there = False
    box(page).fill("precious words")
    box(page).press("Enter")
    expect(page.locator("#offline")).to_be_visible()
    expect(box(page)).to_have_value("")
    page.get_by_role("button", name="Stop").click()
    expect(box(page)).to_have_value("precious words")
    expect(page.locator(".message")).to_have_count(0)
    box(page).press("Enter")
    expect(page.locator(".message.user")).to_have_text(re.compile("precious words"))
    stored(page, "precious words")
    page.reload()
    expect(box(page)).to_have_value("precious words")
    box(page).press("Enter")
    expect(page.locator("#offline")).to_be_visible()
    page.keyboard.type("more")
    line.is_there = True
    expect(page.locator(".message.assistant")).to_have_count(1)
    ended(page)
    assert [m.text for asked in model.asked for m in asked.messages or ()] == ["precious words"]
    stored(page, "more")
    page.reload()
    expect(page.locator(".message.assistant")).to_have_count(1)
    expect(box(page)).to_have_value("more")


def test_a_conversation_that_went_on_elsewhere(
    page: Page, browser: Browser, model: ScriptedModel
) -> None:
    say(page, "first")
    other = browser.new_page()
    other.goto(page.url)
    expect(other.locator(".message.assistant")).to_have_count(1)
    say(other, "second")
    other.close()
    box(page).fill("third")
    box(page).press("Enter")
    expect(page.locator("#note.error")).to_contain_text("went on elsewhere")
    expect(page.locator(".message.assistant")).to_have_count(2)
    expect(box(page)).to_have_value("third")
    say(page, "third")
    assert answers(page) == ["You said: first", "You said: second", "You said: third"]


def test_a_turn_that_the_server_forgot(
    quiet: Page, served: ServedModels, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a long sleep, or a new start of the server: what is stored is shown."""
    page, line = quiet, Line(quiet)
    model.script, model.token_s = lambda said: LONG, 0.01
    say(page, "Count", ends=False)
    expect(page.locator(".streaming .prose")).to_contain_text("20 bottles")
    monkeypatch.setattr(turns, "KEPT_S", 0.0)
    line.is_there = False
    served.cut_sockets()
    expect(page.locator("#offline")).to_be_visible()
    model.token_s = 0
    page.wait_for_function(
        "async url => !(await (await fetch(url)).json()).data.length",
        arg=f"v1/sessions/{page.url.partition('#')[2]}/turns",
    )
    line.is_there = True
    ended(page)
    assert answers(page) == [LONG]
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    say(page, "Again")
