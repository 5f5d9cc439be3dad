"""Pictures on the chat page, in Debian's chromium: attached by the button, pasted and dropped,
shown before and after they are sent, and not offered where the model sees nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_page import browser, listen
from pictures import BLUE, RED, encoded, picture
from playwright.sync_api import Browser, Page, expect
from scripted_model import ScriptedModel, ServedModels
from test_media_dialects import told

__all__ = ["browser"]  # a fixture

pytestmark = pytest.mark.browser
KEY = "a-key-of-sixteen-characters"
PNG, OTHER = picture(RED, (40, 30)), picture(BLUE, (50, 20))
GIVE = """([selector, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
  const given = new DataTransfer();
  given.items.add(new File([bytes], 'given.png', {type: 'image/png'}));
  const event = kind === 'paste'
    ? new ClipboardEvent('paste', {clipboardData: given, bubbles: true, cancelable: true})
    : new DragEvent('drop', {dataTransfer: given, bubbles: true, cancelable: true});
  document.querySelector(selector).dispatchEvent(event);
}"""


@pytest.fixture
def model() -> ScriptedModel:
    return ScriptedModel("seer", inputs=("image",))


@pytest.fixture(params=[None, KEY], ids=["open", "with a key"])
def page(
    request: pytest.FixtureRequest, browser: Browser, tmp_path: Path, model: ScriptedModel
) -> Iterator[Page]:
    """The page; faults of scripts and of the policy fail the test."""
    served = ServedModels(tmp_path, model, ScriptedModel("blind"), key=request.param)
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    errors = listen(page)
    if request.param:
        page.add_init_script(f"sessionStorage.setItem('llmkit-key', '{KEY}')")
    page.goto(served.url)
    yield page
    page.close()
    served.stop()
    # With a key the page itself comes with a 401: it cannot be asked for with one.
    assert not [e for e in errors if not request.param or "401" not in e], errors


def choose(page: Page, name: str) -> None:
    page.locator("#model").click()
    page.get_by_role("menuitemradio", name=name).click()
    expect(page.locator("#model-name")).to_have_text(name)


def widths(page: Page, place: str) -> list[int]:
    """Of the pictures that are drawn there."""
    images = page.locator(f"{place} img")
    for i in range(images.count()):
        expect(images.nth(i)).to_have_js_property("complete", True)
    page.wait_for_function(
        "place => [...document.querySelectorAll(place)].every(i => i.naturalWidth)",
        arg=f"{place} img",
    )
    found: list[int] = images.evaluate_all("all => all.map(image => image.naturalWidth)")
    return found


def test_pictures_are_attached_sent_and_shown_again(page: Page, model: ScriptedModel) -> None:
    choose(page, "seer")
    expect(page.get_by_role("button", name="Attach pictures or text files")).to_be_visible()
    page.locator("#file").set_input_files(
        [
            {"name": "red.png", "mimeType": "image/png", "buffer": PNG},
            {"name": "note.txt", "mimeType": "text/plain", "buffer": b"a note"},
        ]
    )
    expect(page.locator("#files li")).to_have_count(2)
    page.evaluate(GIVE, ["#message", "paste", encoded(OTHER)])
    expect(page.locator("#files li")).to_have_count(3)
    assert widths(page, "#files") == [40, 50]
    page.get_by_role("button", name="Remove given.png").click()
    page.evaluate(GIVE, ["#chat", "drop", encoded(OTHER)])
    expect(page.locator("#files img")).to_have_count(2)
    page.get_by_label("Message", exact=True).fill("What is this?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant:not(.streaming)")).to_have_count(1)
    assert widths(page, ".message.user .pictures") == [40, 50]
    ((_, parts),) = told(model)
    assert parts[:2] == [PNG, OTHER] and "What is this?" in str(parts[2]) and "a note" in str(parts)
    page.get_by_label("Message", exact=True).fill("And now?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.assistant:not(.streaming)")).to_have_count(2)
    page.reload()
    expect(page.locator(".message.user")).to_have_count(2)
    assert widths(page, ".message.user .pictures") == [40, 50]
    # An edit keeps them.
    page.locator(".message.user").first.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Why?")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text(["Why?"])
    expect(page.locator(".message.assistant:not(.streaming)")).to_have_count(1)
    assert told(model) == [("user", [PNG, OTHER, "Why?"])]
    assert widths(page, ".message.user .pictures") == [40, 50]


def test_a_picture_alone_and_a_model_that_sees_nothing(page: Page, model: ScriptedModel) -> None:
    choose(page, "seer")
    page.locator("#file").set_input_files(
        {"name": "red.png", "mimeType": "image/png", "buffer": PNG}
    )
    expect(page.locator("#files img")).to_have_count(1)
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".message.assistant:not(.streaming)")).to_have_count(1)
    assert told(model) == [("user", [PNG])]
    page.locator("#file").set_input_files(
        {"name": "a.svg", "mimeType": "image/svg+xml", "buffer": b"<svg/>"}
    )
    expect(page.locator("#note")).to_contain_text("a.svg is no JPEG")
    page.locator("#new").click()
    choose(page, "blind")
    expect(page.get_by_role("button", name="Attach text files", exact=True)).to_be_visible()
    page.evaluate(GIVE, ["#chat", "drop", encoded(PNG)])
    expect(page.locator("#note")).to_contain_text("takes no pictures")
    expect(page.locator("#files li")).to_have_count(0)
