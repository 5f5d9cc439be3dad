"""Long conversations on the chat page, which come by pages; and ids that lead somewhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import browser, drawn
from playwright.sync_api import Browser, Page, Route, expect
from scripted_model import ScriptedModel, ServedModels
from test_web_chat import model, page, say, served

from llmkit.gateway.web import assets
from llmkit.store.conversation_formats import FORMAT

__all__ = ["browser", "model", "page", "served"]

COUNT = "document.querySelectorAll('.message').length"
BOX = "document.getElementById('thread')"
SOURCES = sorted((Path(assets.__file__).parent / "assets").glob("*.js"))


def long(count: int, head: str, **more: Any) -> dict[str, Any]:
    """A system prompt, then questions and answers m0, m1, …; and a second branch after m3."""
    messages: list[Any] = [{"id": "s", "parent": None, "role": "system", "content": "Be brief."}]
    for i in range(count):
        parent = f"m{i - 1}" if i else "s"
        role = ("user", "assistant")[i % 2]
        messages.append({"id": f"m{i}", "parent": parent, "role": role, "content": f"Number {i}."})
    other = {"id": "b0", "parent": "m3", "role": "user", "content": "Another way."}
    messages.insert(6, other)
    messages.insert(7, {"id": "b1", "parent": "b0", "role": "assistant", "content": "Yes."})
    return {"format": FORMAT, "version": 1, "head": head, "messages": messages, **more}


def imported(page: Page, data: dict[str, Any]) -> str:
    made = page.evaluate(
        "async data => (await fetch('v1/sessions/import', {method: 'POST', "
        "headers: {'Content-Type': 'application/json'}, body: JSON.stringify(data)})).json()",
        data,
    )
    return str(made["id"])


def opened(page: Page, served: ServedModels, data: dict[str, Any]) -> str:
    """Import a conversation, and show it."""
    made = imported(page, data)
    page.goto(f"{served.url}#{made}")
    page.reload()
    return made


class Gate:
    """Holds back requests, those for earlier messages say, until it opens."""

    def __init__(self, page: Page, requests: str = "**/messages?*after=*") -> None:
        self.waiting: list[Route] = []
        self._is_open = False
        page.route(requests, lambda route: self._take(route))

    def _take(self, route: Route) -> None:
        if self._is_open:
            route.continue_()
        else:
            self.waiting.append(route)

    def open(self) -> None:
        self._is_open = True
        for route in self.waiting:
            route.continue_()


def asked_for(page: Page, gate: Gate, count: int = 1) -> None:
    for _ in range(2400):
        if len(gate.waiting) >= count:
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"{len(gate.waiting)} requests wait at the gate, not {count}")


def steady(page: Page, number: str) -> float:
    """What a number of the page is once it changes no more."""
    before, now = None, page.evaluate(number)
    while now != before:
        page.wait_for_timeout(100)
        drawn(page)
        before, now = now, page.evaluate(number)
    return float(now)


@pytest.mark.browser
def test_the_last_messages_come_first(page: Page, served: ServedModels) -> None:
    gate = Gate(page)
    opened(page, served, long(1400, "m1399"))
    expect(page.locator(".message").last).to_contain_text("Number 1399.")
    page.wait_for_function(f"() => {COUNT} === 60")
    asked_for(page, gate)
    # What is before all of this is known where it matters.
    page.get_by_role("button", name="Settings of this conversation").click()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_role("button", name="Save").click()
    page.evaluate(f"{BOX}.scrollTop = 0")
    say(page, "One more")
    expect(page.locator(".message")).to_have_count(62)
    gate.open()
    page.wait_for_function(f"() => {COUNT} === 1403")
    said = page.locator(".message .prose, .message .text").all_text_contents()
    assert said[1:1401] == [f"Number {i}." for i in range(1400)]
    assert said[1401:] == ["One more", "You said: One more"]
    question = page.locator(".message", has_text="Number 4.").first
    expect(question.locator(".branches")).to_have_text("1/2")
    question.get_by_role("button", name="Next branch").click()
    expect(page.locator(".message").last).to_contain_text("Yes.")
    expect(page.locator(".message")).to_have_count(7)


@pytest.mark.browser
def test_an_old_branch_is_shown_whole(page: Page, served: ServedModels) -> None:
    opened(page, served, long(1200, "b1"))
    expect(page.locator(".message").last).to_contain_text("Yes.")
    expect(page.locator(".message")).to_have_count(7)
    page.get_by_role("button", name="Previous branch").click()
    page.wait_for_function(f"() => {COUNT} === 1201")


@pytest.mark.browser
def test_a_conversation_that_is_left_is_loaded_no_further(page: Page, served: ServedModels) -> None:
    asked: list[str] = []
    held: list[Route] = []

    def take(route: Route) -> None:
        asked.append(route.request.url)
        if len(asked) == 1:
            held.append(route)
        else:
            route.continue_()

    made = imported(page, long(1700, "b1"))  # whose shown end is four pages back
    page.route("**/messages?*after=*", take)
    page.evaluate("id => { location.hash = id; }", made)
    for _ in range(1200):
        if held:
            break
        page.wait_for_timeout(50)
    page.get_by_role("button", name="New chat").first.click()
    expect(page.locator("#welcome")).to_be_visible()
    with page.expect_response("**/messages?*after=*"):
        held[0].continue_()
    page.wait_for_timeout(500)
    assert len(asked) == 1
    expect(page.locator("#welcome")).to_be_visible()
    assert page.locator("#thread[aria-busy]").count() == 0


@pytest.mark.browser
def test_reading_goes_on_where_it_was(page: Page, served: ServedModels) -> None:
    """Earlier messages do not push away what is being read."""
    gate = Gate(page)
    opened(page, served, long(700, "m699"))
    page.wait_for_function(f"() => {COUNT} === 60")
    page.locator(".message", has_text="Number 670.").scroll_into_view_if_needed()
    top = "document.querySelector('[data-seen]').getBoundingClientRect().top"
    page.locator(".message", has_text="Number 670.").evaluate("e => e.dataset.seen = 1")
    before = steady(page, top)
    gate.open()
    page.wait_for_function(f"() => {COUNT} === 701")
    assert abs(steady(page, top) - before) < 5


@pytest.mark.browser
def test_pages_that_fail_are_asked_for_again(page: Page, served: ServedModels) -> None:
    tries: list[str] = []

    def fail_twice(route: Route) -> None:
        tries.append(route.request.url)
        if len(tries) > 2:
            route.continue_()
        else:  # an answer of a proxy; the console stays clean
            route.fulfill(status=200, body="no json")

    page.route("**/messages?*after=*", fail_twice)
    opened(page, served, long(300, "m299"))
    page.wait_for_function(f"() => {COUNT} === 301")
    assert len(tries) == 3


@pytest.mark.browser
def test_what_was_loaded_of_the_list_stays(page: Page) -> None:
    page.evaluate(
        "async () => { for (let i = 0; i < 50; i++) await fetch('v1/sessions', {method: 'POST', "
        "headers: {'Content-Type': 'application/json'}, body: JSON.stringify({title: `S${i}`})}); }"
    )
    page.reload()
    rows = page.locator("#sessions li[data-id]")
    expect(rows).to_have_count(40)
    page.get_by_role("button", name="Show more").click()
    expect(rows).to_have_count(50)
    say(page, "One more")
    expect(rows.first).to_contain_text("One more")
    page.wait_for_timeout(1000)  # the list is loaded once more after the answer
    expect(rows).to_have_count(50)


@pytest.fixture
def quiet(browser: Browser, served: ServedModels) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(served.url)
    yield page
    page.close()


@pytest.mark.browser
@pytest.mark.parametrize("part", ["session", "messages"])
def test_another_s_answer_is_refused(
    quiet: Page, served: ServedModels, model: ScriptedModel, part: str
) -> None:
    page, sent = quiet, []
    page.on("request", lambda r: sent.append(r.url) if r.method != "GET" else None)
    made = opened(page, served, long(4, "m3"))
    expect(page.locator(".message").last).to_contain_text("Number 3.")
    evil = "../../../../api/kernels?x="
    html = "<b id=pwned>x</b>"
    message = {
        "id": "m", "parent": None, "role": "assistant", "content": "x", "html": [html],
        "session": evil if part == "messages" else made,
    }  # fmt: skip

    def answer(route: Route) -> None:
        if "/messages" in route.request.url:
            data: Any = {"data": [message], "has_more": False, "last_id": "m"}
        elif route.request.url.endswith("/turns"):
            data = {"data": []}
        else:
            data = {"id": evil if part == "session" else made, "settings": {}, "title": "x"}
        route.fulfill(status=200, body=json.dumps(data), content_type="application/json")

    page.route("**/v1/sessions/sess_**", answer)
    sent.clear()
    page.reload()
    expect(page.get_by_text("The server answers with another conversation.")).to_be_visible()
    assert page.locator("#pwned").count() == 0 and sent == []


@pytest.mark.browser
def test_an_id_in_an_address_leads_nowhere_else(page: Page) -> None:
    made = page.evaluate(
        "async () => { const {url} = await import(document.querySelector('script[type=module]')"
        ".src.replace('main.js', 'api.js')); const ids = ['a/b', '../x', 'a?b#c', '%2e', 'ä'];"
        "const bad = ['', '.', '..'].map(id => { try { return url`v1/${id}/m`; } catch (error) "
        "{ return null; } }); return [ids.map(id => url`v1/${id}/m`), bad, url`v1`]; }"
    )
    assert made == [
        ["v1/a%2Fb/m", "v1/..%2Fx/m", "v1/a%3Fb%23c/m", "v1/%252e/m", "v1/%C3%A4/m"],
        [None, None, None],
        "v1",
    ]


def test_every_id_in_an_address_is_encoded() -> None:
    """By `url`, or by hand; also where addresses of the page itself are made."""
    found = 0
    for source in SOURCES:
        text = re.sub(r"^\s*//.*$", "", source.read_text(), flags=re.MULTILINE)
        for match in re.finditer(r"(\w*)`((?:v1|admin|assets)/[^`]*)`", text):
            found += 1
            assert match[1] == "url" or "${" not in match[2], (source.name, match[0])
        for match in re.finditer(r"#\$\{(?!encodeURIComponent)[^}]*\}", text):
            raise AssertionError((source.name, match[0]))
        assert not re.search(r"""['"](?:v1|admin)/[^'"]*/['"] \+""", text), source.name
    assert found >= 8
