"""The page for everybody: by keyboard alone, for screen readers, on a phone, in the dark, with
2,000 messages, and with a key."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_page import browser, faults, shot
from playwright.sync_api import Browser, Page, expect
from scripted_model import ScriptedModel, ServedModels
from test_web_chat import ANSWER, LONG, answers, ended, model, page, say, served

from llmkit.store.conversation_formats import FORMAT

__all__ = ["browser", "model", "page", "served"]  # fixtures

pytestmark = pytest.mark.browser


def tab_to(page: Page, condition: str, most: int = 40) -> None:
    for _ in range(most):
        if page.evaluate(f"(e => {condition})(document.activeElement)"):
            return
        page.keyboard.press("Tab")
    pytest.fail(f"Tab never comes to {condition}")


def focused(page: Page, condition: str) -> None:
    """Wait until what has the focus is this."""
    page.wait_for_function(f"() => (e => {condition})(document.activeElement)")


def test_by_keyboard_alone(page: Page, model: ScriptedModel) -> None:
    page.locator(".skip").focus()  # the first that Tab comes to
    page.keyboard.press("Enter")
    focused(page, "e.id === 'message'")
    tab_to(page, "e.id === 'theme'", 60)
    page.keyboard.press("/")
    focused(page, "e.id === 'message'")
    page.get_by_label("Message", exact=True).press("Control+a")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    assert answers(page) == ["You said: one\ntwo".replace("\n", " ")]
    page.keyboard.press("ArrowUp")
    focused(page, "e.ariaLabel === 'Edit the message'")
    page.keyboard.press("Escape")
    focused(page, "e.ariaLabel === 'Edit'")
    tab_to(page, "e.ariaLabel === 'Regenerate'")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant .branches")).to_have_text("2/2")
    ended(page)
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    focused(page, "e.id === 'message'")
    tab_to(page, "(e.ariaLabel || '').startsWith('More for')", 60)
    page.keyboard.press("Enter")
    focused(page, "e.textContent === 'Rename'")
    page.keyboard.press("End")
    focused(page, "e.textContent === 'Delete'")
    page.keyboard.press("Escape")
    focused(page, "(e.ariaLabel || '').startsWith('More for')")
    tab_to(page, "e.id === 'model'", 60)
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_be_focused()


def test_a_new_list_keeps_the_focus_and_the_menu(page: Page, model: ScriptedModel) -> None:
    model.script, model.token_s = lambda said: LONG, 0.01
    say(page, "Count", ends=False)
    expect(page.locator("#sessions [title=Answering]")).to_be_visible()
    tab_to(page, "e.ariaLabel === 'More for Count'", 60)
    page.keyboard.press("Enter")
    model.token_s = 0
    ended(page)
    expect(page.locator("#sessions [title=Answering]")).to_be_hidden()  # the list has come
    focused(page, "e.textContent === 'Rename'")
    page.keyboard.press("Escape")
    focused(page, "e.ariaLabel === 'More for Count'")


def test_one_polite_region_hears_the_answer_once(page: Page, model: ScriptedModel) -> None:
    assert page.locator("[aria-live], [role=status], [role=log], [role=alert]").count() == 2
    page.evaluate(
        "() => { window.heard = []; new MutationObserver(() => "
        "window.heard.push(document.getElementById('said').textContent))"
        ".observe(document.getElementById('said'), {childList: true}); }"
    )
    model.script = lambda said: LONG
    model.token_s = 0
    say(page, "Count")
    page.wait_for_function("() => window.heard.at(-1)?.startsWith('Answer: 0 bottles')")
    heard = [text for text in page.evaluate("window.heard") if text]
    assert len(heard) <= 2 and heard[-1].startswith("Answer: 0 bottles"), heard


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(browser: Browser, served: ServedModels, model: ScriptedModel,
                          scheme: str) -> None:  # fmt: skip
    page = browser.new_page(
        viewport={"width": 1280, "height": 860}, color_scheme=scheme, reduced_motion="reduce"  # type: ignore[arg-type]
    )  # fmt: skip
    page.goto(served.url)
    page.wait_for_selector("html.ready")
    assert faults(page, "body") == []
    model.script = lambda said: ANSWER + "\n\n> quote [a](http://a.example)\n\n1. one\n\n---\n"
    say(page, "Write")
    assert faults(page, "body") == []
    page.locator(".message.user").get_by_role("button", name="Edit").click()
    assert faults(page, "body") == []
    page.keyboard.press("Escape")
    for open_, shown in (
        ("Settings of this conversation", "dialog[open]"),
        ("Model: scripted", ".menu"),
        ("More for Write", ".menu"),
    ):
        page.locator("#sessions li[data-id]").first.hover()
        page.get_by_role("button", name=open_).click()
        page.wait_for_selector(shown)
        assert faults(page, "body") == [], open_
        page.keyboard.press("Escape")
    page.get_by_role("link", name="Models").click()
    page.wait_for_selector("#state table")
    assert faults(page, "body") == []
    shot(page, f"models-{scheme}")
    page.close()


def test_dark_follows_the_system_until_one_is_chosen(browser: Browser,
                                                     served: ServedModels) -> None:  # fmt: skip
    context = browser.new_context(color_scheme="dark", reduced_motion="reduce")
    page = context.new_page()
    page.goto(served.url)
    page.wait_for_selector("html.ready")

    def back() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = back()
    page.get_by_role("button", name="Light theme").click()
    light = back()
    assert dark != light
    page.reload()
    assert back() == light
    page.get_by_role("button", name="Dark theme").click()
    assert back() == dark
    style = "getComputedStyle(document.getElementById('composer')).transitionDuration"
    assert page.evaluate(style) == "0s"
    context.close()


def test_on_a_phone(browser: Browser, served: ServedModels, model: ScriptedModel) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 700}, has_touch=True)
    page = context.new_page()
    page.goto(served.url)
    model.script = lambda said: ANSWER + "| wide |\n|--|\n| " + "x" * 400 + " |\n\n`" + "y" * 300
    say(page, "A rather long question " * 10)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.getElementById('thread').scrollWidth") <= 360
    assert not page.get_by_role("button", name="New chat").is_visible()
    page.get_by_role("button", name="Conversations").click()
    expect(page.get_by_role("button", name="New chat")).to_be_visible()
    page.wait_for_timeout(300)
    shot(page, "phone-drawer")
    assert faults(page, "body") == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    page.wait_for_timeout(300)
    shot(page, "phone")
    page.get_by_role("button", name="Settings of this conversation").click()
    assert page.evaluate("document.querySelector('dialog[open]').scrollWidth") <= 360
    context.close()


def test_two_thousand_messages(page: Page, served: ServedModels) -> None:
    messages = [
        {
            "id": f"m{i}",
            "parent": f"m{i - 1}" if i else None,
            "role": ("user", "assistant")[i % 2],
            "content": f"Message **{i}** " + "of many words " * (i % 40),
        }
        for i in range(2000)
    ]
    data = {"format": FORMAT, "version": 1, "title": "Long", "head": "m1999", "messages": messages}
    made = page.evaluate(
        "async data => (await fetch('v1/sessions/import', {method: 'POST', "
        "headers: {'Content-Type': 'application/json'}, body: JSON.stringify(data)})).json()",
        data,
    )
    page.goto(f"{served.url}#{made['id']}")
    page.reload()
    expect(page.locator(".message").last).to_contain_text("Message 1999")
    page.wait_for_function("() => document.querySelectorAll('.message').length === 2000")
    box = "document.getElementById('thread')"
    # It stays at the end while the earlier ones come; then one can go to the first.
    page.wait_for_function(f"() => {box}.scrollHeight - {box}.scrollTop - {box}.clientHeight < 100")
    assert page.evaluate("document.querySelector('.message.assistant strong').textContent") == "1"
    page.evaluate(f"{box}.scrollTop = 0")
    expect(page.locator(".message").first).to_be_in_viewport()
    page.get_by_role("button", name="To the last message").click()
    expect(page.locator(".message").last).to_be_in_viewport()
    say(page, "One more")
    expect(page.locator(".message")).to_have_count(2002)
    expect(page.locator(".message").last).to_be_in_viewport()


@pytest.fixture
def locked(tmp_path: Path, model: ScriptedModel) -> Iterator[ServedModels]:
    served = ServedModels(tmp_path, model, key="sesame")
    yield served
    served.stop()


def test_the_key_stays_in_the_tab(browser: Browser, locked: ServedModels) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(locked.url)
    field = page.get_by_label("Key")
    assert "scripted" not in page.content() and faults(page, "body") == []
    for given in ("wrong", "w\u00f6rng"):
        field.fill(given)
        page.keyboard.press("Enter")
        expect(page.get_by_text("This is not the key.")).to_be_visible()
    field.fill("sesame")
    page.keyboard.press("Enter")
    expect(field).to_be_hidden()
    say(page, "hello")
    page.reload()
    expect(page.locator(".message.assistant")).to_contain_text("You said: hello")
    assert "sesame" not in page.url and page.evaluate("localStorage.length") == 0
    other = context.new_page()
    other.goto(page.url)
    expect(other.get_by_label("Key")).to_be_visible()
    context.close()
