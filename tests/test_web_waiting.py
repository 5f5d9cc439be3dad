"""What is written, set or chosen while a conversation is loaded, begun or changed: it is meant for
that conversation, waits for it, and is not lost when it cannot be had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser_page import browser
from playwright.sync_api import Browser, Locator, Page, Route, expect
from scripted_model import ScriptedModel, ServedModels
from test_web_chat import LONG, answers, ended, model, page, say, served
from test_web_history import Gate, asked_for

__all__ = ["browser", "model", "page", "served"]  # fixtures

pytestmark = pytest.mark.browser
SESSION = re.compile(r"/v1/sessions/sess_[0-9a-f]{24}$")
BEGIN = re.compile(r"/v1/sessions$")


@pytest.fixture
def quiet(browser: Browser, served: ServedModels) -> Iterator[Page]:
    """A page on which requests may fail."""
    page = browser.new_page()
    page.goto(served.url)
    yield page
    page.close()


def box(page: Page) -> Locator:
    return page.get_by_label("Message", exact=True)


def api(page: Page, path: str, body: Any = None) -> Any:
    asked = {"method": "POST" if body is not None else "GET", "body": body}
    return page.evaluate(
        "async ([path, {method, body}]) => (await fetch(path, {method, headers: "
        "{'Content-Type': 'application/json'}, "
        "...(body ? {body: JSON.stringify(body)} : {})})).json()",
        [path, asked],
    )


def begun(page: Page, **fields: Any) -> str:
    return str(api(page, "v1/sessions", fields)["id"])


def opening(page: Page, session: str, gate: Gate) -> None:
    """Show a conversation whose loading takes as long as the gate is shut."""
    page.evaluate("id => { location.hash = id; }", session)
    asked_for(page, gate)


def titles(page: Page) -> list[str]:
    return [each["title"] for each in api(page, "v1/sessions")["data"]]


def contents(page: Page, session: str) -> list[str]:
    return [each["content"] for each in api(page, f"v1/sessions/{session}/messages")["data"]]


def test_a_message_waits_for_its_conversation(page: Page, model: ScriptedModel) -> None:
    made = begun(page, title="Mine", settings={"temperature": 0.25})
    gate = Gate(page, SESSION)
    opening(page, made, gate)
    box(page).fill("hello")
    box(page).press("Enter")
    box(page).press("Enter")
    page.keyboard.type(" and then")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(box(page)).to_have_value("hello and then")
    assert model.asked == []
    gate.open()
    expect(page.locator(".message.assistant")).to_have_count(1)
    ended(page)
    assert answers(page) == ["You said: hello"]
    assert [asked.sampling.temperature for asked in model.asked] == [0.25]
    expect(box(page)).to_have_value("and then")
    assert titles(page) == ["Mine"] and page.url.endswith(made)


def test_one_that_waits_can_be_stopped(page: Page, model: ScriptedModel) -> None:
    made = begun(page, title="Mine")
    gate = Gate(page, SESSION)
    opening(page, made, gate)
    box(page).fill("hello")
    box(page).press("Enter")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    gate.open()
    expect(page).to_have_title("Mine · llmkit")
    expect(box(page)).to_have_value("hello")
    assert contents(page, made) == []


def test_one_that_begins_can_be_stopped(page: Page, model: ScriptedModel) -> None:
    model.script, model.token_s = lambda said: LONG, 0.01
    gate = Gate(page, BEGIN)
    box(page).fill("Count")
    box(page).press("Enter")
    asked_for(page, gate)
    page.keyboard.press("Escape")
    gate.open()
    expect(page.get_by_text("Stopped before its end.")).to_be_visible()
    expect(page.locator(".message.user")).to_have_count(1)


def test_settings_and_model_wait_for_their_conversation(page: Page, model: ScriptedModel) -> None:
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("System prompt").fill("Of a new one.")
    page.get_by_role("button", name="Save").click()
    made = begun(page, title="Mine", system="Be brief.", settings={"top_k": 7})
    gate = Gate(page, SESSION)
    opening(page, made, gate)
    page.get_by_role("button", name="Model: scripted").click()
    page.get_by_role("menuitemradio", name="other").click()
    page.get_by_role("button", name="Settings of this conversation").click()
    expect(page.get_by_role("dialog")).to_have_count(0)
    gate.open()
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    expect(page.get_by_label("Top k")).to_have_value("7")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()
    assert api(page, f"v1/sessions/{made}")["model"] == "other"
    page.get_by_role("button", name="New chat").click()
    page.get_by_role("button", name="Settings of this conversation").click()
    expect(page.get_by_label("System prompt")).to_have_value("Of a new one.")


def test_a_message_waits_for_what_was_set(page: Page, model: ScriptedModel) -> None:
    say(page, "first")
    held: list[Route] = []
    page.route(SESSION, lambda r: held.append(r) if r.request.method == "PATCH" else r.continue_())
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_role("button", name="Save").click()
    box(page).fill("second")
    box(page).press("Enter")
    for _ in range(1200):
        if held:
            break
        page.wait_for_timeout(50)
    page.wait_for_timeout(300)
    assert len(held) == 1 and len(model.asked) == 1
    held[0].continue_()
    expect(page.locator(".message.assistant")).to_have_count(2)
    ended(page)
    assert model.asked[-1].sampling.temperature == 0.25


def test_one_that_could_not_be_loaded_is_loaded_again(page: Page, model: ScriptedModel) -> None:
    made = begun(page, title="Mine", settings={"temperature": 0.25})
    gate = Gate(page, SESSION)
    opening(page, made, gate)
    box(page).fill("hello")
    box(page).press("Enter")
    gate.waiting.pop().fulfill(status=200, body="no json")
    asked_for(page, gate)  # again, for the message
    gate.waiting.pop().fulfill(status=200, body="no json")
    expect(page.locator("#note.error")).to_be_visible()
    expect(page.locator("#messages .hint")).to_be_visible()
    expect(box(page)).to_have_value("hello")
    assert titles(page) == ["Mine"] and model.asked == []
    gate.open()
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message.assistant")).to_have_count(1)
    ended(page)
    assert titles(page) == ["Mine"] and model.asked[-1].sampling.temperature == 0.25


def test_what_is_written_for_one_that_is_gone_goes_into_a_new_one(
    quiet: Page, model: ScriptedModel
) -> None:
    page = quiet
    box(page).fill("older words")
    gate = Gate(page, "**/v1/sessions/sess_*/**")
    page.route(SESSION, lambda route: None)  # is never answered
    opening(page, "sess_" + "0" * 24, gate)
    box(page).fill("precious words")
    box(page).press("Enter")
    gate.open()
    expect(page.get_by_text("This conversation is not here any more.").first).to_be_visible()
    expect(page.locator("#welcome")).to_be_visible()
    expect(box(page)).to_have_value("older words\n\nprecious words")
    assert "#" not in page.url and model.asked == []
    box(page).press("Enter")
    expect(page.locator(".message.assistant")).to_have_count(1)
    ended(page)
    assert titles(page) == ["older words"]


def test_a_turn_that_runs_already_goes_first(
    page: Page, browser: Browser, served: ServedModels, model: ScriptedModel
) -> None:
    model.script, model.token_s = lambda said: LONG, 0.01
    say(page, "Count", ends=False)
    other = browser.new_page()
    gate = Gate(other, SESSION)
    other.goto(page.url)
    asked_for(other, gate)
    box(other).fill("me too")
    box(other).press("Enter")
    gate.open()
    expect(other.locator("#note")).to_have_text("An answer is being written: stop it first.")
    expect(other.locator(".streaming .prose")).to_contain_text("bottles")
    expect(box(other)).to_have_value("me too")
    model.token_s = 0
    ended(other)
    other.get_by_role("button", name="Send").click()
    expect(other.locator(".message.assistant")).to_have_count(2)
    ended(other)
    other.close()
    assert [m.text for m in model.asked[-1].messages or () if m.role == "user"] == [
        "Count", "me too"
    ]  # fmt: skip


def test_one_that_is_left_keeps_what_is_written(
    page: Page, model: ScriptedModel, tmp_path: Path
) -> None:
    (tmp_path / "f.txt").write_text("attached\n")
    first, second = begun(page, title="First"), begun(page, title="Second")
    gate = Gate(page, SESSION)
    opening(page, first, gate)
    box(page).fill("for the first " * 20000)
    page.locator("#file").set_input_files(tmp_path / "f.txt")
    expect(page.locator("#files li")).to_have_count(1)
    box(page).press("Enter")
    page.evaluate("id => { location.hash = id; }", second)
    gate.open()
    expect(page).to_have_title("Second · llmkit")
    expect(box(page)).to_have_value("")
    expect(page.locator("#files li")).to_have_count(0)
    page.go_back()
    expect(page).to_have_title("First · llmkit")
    expect(box(page)).to_have_value("for the first " * 20000)
    expect(page.locator("#files li")).to_have_count(1)
    assert model.asked == [] and contents(page, first) == contents(page, second) == []


def test_a_file_that_is_still_read_is_for_the_conversation_that_was_shown(
    page: Page, tmp_path: Path
) -> None:
    (tmp_path / "f.txt").write_text("attached\n")
    first, second = begun(page, title="First"), begun(page, title="Second")
    page.evaluate("id => { location.hash = id; }", first)
    expect(page).to_have_title("First · llmkit")
    page.evaluate(
        "() => { const {text} = Blob.prototype; const opened = new Promise(open => { "
        "window.open_ = open; }); Blob.prototype.text = async function () { await opened; "
        "return text.call(this); }; }"
    )
    page.locator("#file").set_input_files(tmp_path / "f.txt")
    page.evaluate("id => { location.hash = id; }", second)
    expect(page).to_have_title("Second · llmkit")
    page.evaluate("window.open_()")
    page.wait_for_timeout(200)
    expect(page.locator("#files li")).to_have_count(0)
    page.go_back()
    expect(page).to_have_title("First · llmkit")
    expect(page.locator("#files li")).to_have_count(1)


def test_one_that_begins_is_left(page: Page, model: ScriptedModel) -> None:
    """What was said begins it all the same, and nothing of it comes into another."""
    other = begun(page, title="Other")
    gate = Gate(page, BEGIN)
    box(page).fill("a new thing")
    box(page).press("Enter")
    asked_for(page, gate)
    page.evaluate("id => { location.hash = id; }", other)
    expect(page).to_have_title("Other · llmkit")
    gate.open()
    row = page.locator("#sessions li[data-id]", has_text="a new thing")
    expect(row).to_be_visible()
    expect(page).to_have_title("Other · llmkit")
    assert page.url.endswith(other) and contents(page, other) == []
    expect(page.locator(".message")).to_have_count(0)
    row.get_by_role("link").click()
    expect(page.locator(".message.assistant .prose")).to_have_text("You said: a new thing")


def test_a_new_chat_while_another_begins(page: Page, model: ScriptedModel) -> None:
    gate = Gate(page, BEGIN)
    box(page).fill("a new thing")
    box(page).press("Enter")
    asked_for(page, gate)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    gate.open()
    expect(page.locator("#sessions li[data-id]")).to_have_count(1)
    expect(page.locator("#welcome")).to_be_visible()
    assert "#" not in page.url
    say(page, "another")
    assert sorted(titles(page)) == ["a new thing", "another"]


def test_the_model_of_one_that_begins(page: Page, model: ScriptedModel) -> None:
    gate = Gate(page, BEGIN)
    box(page).fill("hello")
    box(page).press("Enter")
    asked_for(page, gate)
    page.get_by_role("button", name="Model: scripted").click()
    page.get_by_role("menuitemradio", name="other").click()
    gate.open()
    expect(page.locator(".message.assistant")).to_have_count(1)
    ended(page)
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()
    page.reload()
    expect(page.locator(".message.assistant")).to_have_count(1)
    expect(page.get_by_role("button", name="Model: other, ready")).to_be_visible()


def test_a_message_that_fails_after_another_was_begun(quiet: Page, model: ScriptedModel) -> None:
    page, refused = quiet, Gate(quiet, BEGIN)
    box(page).fill("precious words")
    box(page).press("Enter")
    asked_for(page, refused)
    page.keyboard.type("more of them")
    refused.waiting.pop().fulfill(status=503, body="{}")
    expect(page.locator("#note.error")).to_be_visible()
    expect(box(page)).to_have_value("precious words\n\nmore of them")
    expect(page.locator(".message.user")).to_have_count(0)


def test_settings_that_could_not_be_saved_are_not_lost(quiet: Page) -> None:
    page = quiet
    say(page, "first")
    page.route(
        SESSION,
        lambda r: (
            r.fulfill(status=503, body="{}") if r.request.method == "PATCH" else r.continue_()
        ),
    )
    page.get_by_role("button", name="Settings of this conversation").click()
    page.get_by_label("System prompt").fill("Long and precious.")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#note.error")).to_be_visible()
    expect(page.get_by_label("System prompt")).to_have_value("Long and precious.")
    page.unroute(SESSION)
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".message.system")).to_contain_text("Long and precious.")


def test_an_edit_that_is_refused_is_not_lost(page: Page, model: ScriptedModel) -> None:
    say(page, "first")
    model.script, model.token_s = lambda said: LONG, 0.01
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    page.keyboard.type(" precious")
    say(page, "second", ends=False)
    page.get_by_label("Edit the message").press("Enter")
    expect(page.locator("#note")).to_have_text("An answer is being written: stop it first.")
    expect(page.get_by_label("Edit the message")).to_have_value("first precious")
    page.get_by_role("button", name="Stop").click()
    ended(page)
    page.get_by_label("Edit the message").press("Enter")
    expect(page.locator(".message.user .branches")).to_have_text("2/2")
