"""The chat page in Debian's chromium, in front of a model that says what each test wants: send,
stop, branches, a reload in mid-stream, a lost connection, attacks in what the model writes."""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import browser, drawn, listen, shot
from playwright.sync_api import Browser, Page, Route, expect
from scripted_model import ScriptedModel, ServedModels
from test_web_markdown import HOSTILE

from llmkit.gateway.sockets import following

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.browser
ANSWER = (
    "Rain on *quiet* stones.\n\n```python\nprint(1)\n```\n\n| a | b |\n|--|--|\n| $x^2$ | 2 |\n"
)
LONG = "".join(f"{i} bottles of water on the wall, " for i in range(400)).strip()


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel()


@pytest.fixture
def served(tmp_path: Path, model: ScriptedModel) -> Iterator[ServedModels]:
    served = ServedModels(tmp_path, model, ScriptedModel("other"))
    yield served
    served.stop()


@pytest.fixture
def page(browser: Browser, served: ServedModels) -> Iterator[Page]:
    """The page, at its root; faults of scripts and of the policy fail the test."""
    page = browser.new_page(viewport={"width": 1280, "height": 860})
    errors = listen(page)
    page.goto(served.url)
    yield page
    page.close()
    assert not errors, errors


def say(page: Page, text: str, *, ends: bool = True) -> None:
    before = page.locator(".message.assistant").count()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    expect(page.locator(".message.user").last).to_contain_text(text[:40])
    expect(page.locator(".message.assistant")).to_have_count(before + 1)
    if ends:
        ended(page)


def ended(page: Page) -> None:
    expect(page.locator(".message.assistant:not(.streaming)").last).to_be_visible()
    expect(page.locator(".streaming")).to_have_count(0)
    drawn(page)


def answers(page: Page) -> list[str]:
    drawn(page)
    return page.locator(".message.assistant .prose").all_inner_texts()


def test_a_question_is_answered(page: Page, model: ScriptedModel) -> None:
    model.script = lambda said: ANSWER
    expect(page.get_by_role("button", name="Model: scripted, ready")).to_be_visible()
    say(page, "Write about rain")
    answer = page.locator(".message.assistant")
    assert answer.locator("em").inner_text() == "quiet"
    assert answer.locator("pre .nb").inner_text() == "print"
    assert answer.locator("td math msup").count() == 1
    for part in ("tokens/s", "tokens", "prompt", "cached"):
        expect(answer.locator(".stats")).to_contain_text(part)
    expect(page.locator("#context")).to_contain_text("of 8,192 tokens")
    expect(page.locator("#said")).to_contain_text("Answer: Rain on")
    expect(page.locator("#sessions li.current")).to_contain_text("Write about rain")
    assert re.search(r"#sess_[0-9a-f]{24}$", page.url)
    expect(page).to_have_title("Write about rain · llmkit")
    assert page.evaluate("document.activeElement.id") == "message"
    shot(page, "chat-answer")
    page.reload()
    expect(page.locator(".message.assistant em")).to_have_text("quiet")
    say(page, "And again")
    assert len(model.asked[-1].messages or ()) == 3


def test_stop_keeps_what_there_is(page: Page, model: ScriptedModel) -> None:
    model.script, model.token_s = lambda said: LONG, 0.02
    say(page, "Count", ends=False)
    expect(page.locator(".streaming .prose")).to_contain_text("1 bottles")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped before its end.")).to_be_visible()
    (before,) = answers(page)
    assert before and len(before) < len(LONG)
    page.reload()
    expect(page.get_by_text("Stopped before its end.")).to_be_visible()
    assert answers(page) == [before]
    model.token_s = 0
    say(page, "Go on")
    assert answers(page)[1] == LONG


def test_edit_and_regenerate_make_branches(page: Page, model: ScriptedModel) -> None:
    say(page, "first")
    say(page, "second")
    question = page.locator(".message.user").first
    question.get_by_role("button", name="Edit").click()
    page.keyboard.press("Control+End")
    page.keyboard.type(" changed")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant")).to_have_count(1)
    ended(page)
    assert answers(page) == ["You said: first changed"]
    expect(page.locator(".message.user .branches")).to_have_text("2/2")
    model.script = lambda said: "Another one"
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".message.assistant .branches")).to_have_text("2/2")
    ended(page)
    assert answers(page) == ["Another one"]
    page.locator(".message.assistant").get_by_role("button", name="Previous branch").click()
    expect(page.locator(".assistant .prose")).to_have_text(["You said: first changed"])
    with page.expect_response(lambda reply: reply.request.method == "PATCH"):  # keeps the head
        page.locator(".message.user").first.get_by_role("button", name="Previous branch").click()
    both = ["You said: first", "You said: second"]
    expect(page.locator(".assistant .prose")).to_have_text(both)
    page.wait_for_function("document.activeElement.ariaLabel === 'Next branch'")
    shot(page, "chat-branches")
    page.reload()
    expect(page.locator(".assistant .prose")).to_have_text(both)
    expect(page.locator(".message.user .branches")).to_have_text("1/2")


def test_a_branch_is_rendered_whenever_it_is_shown(page: Page, model: ScriptedModel) -> None:
    model.script = lambda said: ANSWER
    say(page, "Write about rain")
    answer = page.locator(".message.assistant")
    before = answer.locator(".prose").inner_html()
    page.get_by_role("button", name="Regenerate").click()
    expect(answer.locator(".branches")).to_have_text("2/2")
    ended(page)
    for name in ("Previous branch", "Next branch"):
        answer.get_by_role("button", name=name).click()
        expect(answer.locator("em")).to_have_text("quiet")
        assert answer.locator(".prose").inner_html() == before


def test_an_answer_that_is_rendered_late(
    page: Page, model: ScriptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is shown meanwhile; the first answer of a busy server is one."""
    fed, is_seen = following.Page._fed, threading.Event()

    async def late(self: following.Page, text: str, *, last: bool = False) -> Any:
        if text or last:
            await asyncio.to_thread(is_seen.wait, 60)
        return await fed(self, text, last=last)

    monkeypatch.setattr(following.Page, "_fed", late)
    model.script = lambda said: "*No*"  # one token, and one block of HTML
    say(page, "Is it?", ends=False)
    expect(page.locator(".message.assistant .tail")).to_have_text("*No*")
    is_seen.set()
    expect(page.locator(".message.assistant em")).to_have_text("No")
    ended(page)
    assert answers(page) == ["No"]


def test_a_reload_in_mid_stream_goes_on(page: Page, model: ScriptedModel) -> None:
    model.script, model.token_s = lambda said: LONG, 0.01
    say(page, "Count", ends=False)
    expect(page.locator(".streaming .prose")).to_contain_text("20 bottles")
    page.reload()
    expect(page.locator(".streaming .prose")).to_contain_text("25 bottles")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    model.token_s = 0  # nobody waits for the rest
    ended(page)
    assert answers(page) == [LONG]


def test_a_lost_connection_comes_back(
    page: Page, model: ScriptedModel, served: ServedModels
) -> None:
    model.script, model.token_s = lambda said: LONG, 0.01
    say(page, "Count", ends=False)
    for seen in ("20 bottles", "60 bottles", "90 bottles"):
        expect(page.locator(".streaming .prose")).to_contain_text(seen)
        served.cut_sockets()
    model.token_s = 0  # nobody waits for the rest
    ended(page)
    assert answers(page) == [LONG]
    expect(page.get_by_text("The connection was lost")).to_be_hidden()


def test_what_a_model_writes_runs_and_loads_nothing(
    page: Page, model: ScriptedModel, served: ServedModels
) -> None:
    foreign: list[str] = []
    page.on(
        "request",
        lambda r: None if r.url.startswith((served.url, "blob:")) else foreign.append(r.url),
    )
    page.on("dialog", lambda dialog: foreign.append(dialog.message))
    model.token_s = 0
    text = "\n\n".join(HOSTILE).replace("alert(1)", "window.pwned=1")
    model.script = lambda said: text
    say(page, "<img src=x onerror=window.pwned=1> <script>window.pwned=1</script>")
    for _ in range(2):
        prose = page.locator(".message.assistant .prose")
        assert (
            prose.locator("script, img, iframe, form, input, style, object, svg:not(.icon)").count()
            == 0
        )
        for handler in ("onclick", "onerror", "onload", "onmouseover", "style"):
            assert prose.locator(f"[{handler}]").count() == 0
        for link in prose.locator("a").all():
            link.hover()
        assert page.evaluate("window.pwned") is None and foreign == []
        page.reload()
        expect(page.locator(".message.assistant")).to_be_visible()


def test_reasoning_is_folded_and_calls_are_shown(
    page: Page, model: ScriptedModel, served: ServedModels
) -> None:
    model.description = ScriptedModel(reasoning="think").description
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    model.script = lambda said: f"<think>Let me see.</think>\n\nFour.\n{call}"
    made = page.evaluate(
        "async settings => (await fetch('v1/sessions', {method: 'POST', headers: "
        "{'Content-Type': 'application/json'}, body: JSON.stringify({settings})})).json()",
        {"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]},
    )
    page.goto(f"{served.url}#{made['id']}")
    page.reload()
    say(page, "2 + 2")
    for _ in range(2):
        for name, inner in (("Reasoning", "Let me see."), ("Calls add", '"a": 1')):
            fold = page.locator("details:visible", has_text=name)
            expect(fold.get_by_text(inner)).to_have_count(1)
            expect(fold.get_by_text(inner)).to_be_hidden()
            fold.locator("summary").click()
            expect(fold.get_by_text(inner)).to_be_visible()
        assert answers(page) == ["Four."]
        page.reload()


def test_conversations_are_found_renamed_exported_deleted(page: Page) -> None:
    for text in ("About whales", "About bread"):
        page.get_by_role("button", name="New chat").click()
        say(page, text)
    rows = page.locator("#sessions li[data-id]")
    expect(rows).to_have_count(2)
    page.get_by_label("Search conversations").fill("whales")
    expect(rows).to_have_count(1)
    rows.first.hover()
    page.get_by_role("button", name="More for About whales").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.keyboard.type("Whales of the north")
    page.keyboard.press("Enter")
    expect(rows.first).to_contain_text("Whales of the north")
    for form, end in (("Markdown", "md"), ("JSON", "json")):
        page.get_by_role("button", name="More for Whales of the north").click()
        with page.expect_download() as download:
            page.get_by_role("menuitem", name=f"Export as {form}").click()
        assert download.value.suggested_filename == f"Whales of the north.{end}"
        text = Path(download.value.path()).read_text()
        assert "You said: About whales" in text
    assert json.loads(text)["messages"]
    page.get_by_role("button", name="More for Whales of the north").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(0)
    page.get_by_label("Search conversations").fill("")
    expect(rows).to_have_count(1)
    rows.first.click()
    expect(page.locator(".message.assistant")).to_contain_text("About bread")


def test_a_list_that_comes_late_undoes_nothing(page: Page) -> None:
    """It was asked for before a conversation was renamed, and before another was deleted."""
    for text in ("About whales", "About bread", "About rain"):
        page.get_by_role("button", name="New chat").click()
        say(page, text)
    rows = page.locator("#sessions li[data-id]")
    expect(rows).to_have_count(3)
    late: list[Route] = []
    is_late = True
    page.route(
        "**/v1/sessions?*", lambda route: late.append(route) if is_late else route.continue_()
    )
    say(page, "And more")  # asks for the list, a moment later
    for _ in range(1200):
        if late:
            break
        page.wait_for_timeout(50)
    is_late = False
    assert late
    replies = [route.fetch() for route in late]
    page.get_by_role("button", name="More for About whales").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.keyboard.type("Whales of the north")
    page.keyboard.press("Enter")
    expect(rows.filter(has_text="Whales of the north")).to_be_visible()
    page.get_by_role("button", name="More for About bread").click()
    page.get_by_role("menuitem", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(rows).to_have_count(2)
    for route, reply in zip(late, replies, strict=True):
        route.fulfill(response=reply)
    page.wait_for_timeout(500)
    assert sorted(rows.all_inner_texts()) == ["About rain", "Whales of the north"]


def test_settings_and_model_reach_the_model(page: Page, model: ScriptedModel) -> None:
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Longest answer").fill("3")
    page.get_by_role("button", name="Save").click()
    say(page, "hello there")
    asked = model.asked[-1]
    assert asked.sampling.temperature == 0.25 and asked.sampling.max_tokens == 3
    assert [m.role for m in asked.messages or ()] == ["system", "user"]
    expect(page.get_by_text("Cut off at the limit of tokens.")).to_be_visible()
    page.get_by_role("button", name="Model: scripted").click()
    page.get_by_role("menuitemradio", name="other").click()
    say(page, "and you")
    expect(page.locator(".message .name")).to_have_text(["scripted", "other"])
    page.reload()
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()
    page.get_by_role("button", name="Settings of this conversation").click()
    expect(page.get_by_label("Temperature")).to_have_value("0.25")
    page.get_by_label("System prompt").fill("Be long.")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".message.system .branches")).to_have_text("2/2")
    expect(page.locator(".message.user")).to_have_count(0)
    page.get_by_role("button", name="Previous branch").click()
    expect(page.locator(".message.user")).to_have_count(2)


def test_an_address_names_the_model(page: Page, served: ServedModels) -> None:
    """As JupyterLab's sidebar opens the page."""
    page.goto(f"{served.url}?model=other")
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()
    say(page, "Hi")
    page.reload()
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()
    page.goto(f"{served.url}?model=other@{os.getpid()}")  # exactly
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()
    page.goto(f"{served.url}?model=nothing")
    expect(page.get_by_role("button", name="Model: nothing, not here")).to_be_visible()


def test_files_go_along(page: Page, model: ScriptedModel, tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("x = '```'\n")
    (tmp_path / "b.bin").write_bytes(b"\0\1\2")
    page.locator("#file").set_input_files([tmp_path / "f.py", tmp_path / "b.bin"])
    expect(page.locator("#note")).to_have_text("b.bin is no text file.")
    expect(page.locator("#files li")).to_have_count(1)
    say(page, "What is this?")
    said = model.asked[-1].messages
    assert (
        said is not None and said[-1].text == "What is this?\n\nf.py:\n````python\nx = '```'\n````"
    )
    expect(page.locator("#files li")).to_have_count(0)


def test_what_cannot_be_sent_is_not_lost(page: Page, model: ScriptedModel) -> None:
    def refuses(said: str) -> str:
        raise ValueError("no")

    model.script = refuses
    page.get_by_label("Message", exact=True).fill("precious words")
    page.keyboard.press("Enter")
    expect(page.locator("#note.error")).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_have_value("precious words")
    expect(page.locator(".message.user")).to_have_count(0)
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("precious words")
