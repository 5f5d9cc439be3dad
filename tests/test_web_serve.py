"""The page of `llmkit serve` with the embedded model: its key, and what administrators do."""

from __future__ import annotations

import pytest
from browser_page import ask_for_little, browser, faults, listen, shot
from fakes import wait_for
from playwright.sync_api import Browser, expect
from test_cli import Served
from test_web_chat import ended, say

__all__ = ["browser"]  # a fixture

pytestmark = [pytest.mark.browser, pytest.mark.model]


def test_the_page_of_a_gateway_with_a_key(browser: Browser) -> None:
    served = Served(
        "smollm2", "--port", "0", "--n-ctx", "512", "--n-slots", "2", LLMKIT_API_KEY="sesame"
    )
    other = browser.new_page(viewport={"width": 1280, "height": 500})
    try:
        errors = listen(other, console=False)
        wait_for(lambda: served.health() == 200, 60)
        other.goto(served.url.removesuffix("v1"))
        assert "smollm2" not in other.content() and faults(other, "body") == []
        other.get_by_label("Key").fill("wrong")
        other.keyboard.press("Enter")
        expect(other.get_by_text("This is not the key.")).to_be_visible()
        other.get_by_label("Key").fill("sesame")
        other.keyboard.press("Enter")
        model = other.get_by_role("button", name="Model: smollm2")
        expect(model).to_be_visible()
        assert not other.get_by_label("Key").is_visible() and "sesame" not in other.url
        other.reload()
        expect(model).to_be_visible()
        other.get_by_role("link", name="Models").click()
        other.get_by_role("link", name="Its routes").click()
        expect(other.get_by_text("/v1/chat/completions", exact=True).first).to_be_visible()
        assert not errors, errors
    finally:
        other.close()
        served.stop()


def test_administrators_load_and_unload(browser: Browser) -> None:
    served = Served("smollm2", "--port", "0", "--n-ctx", "512", "--n-slots", "2", "--admin")
    page = browser.new_page(viewport={"width": 1280, "height": 860}, reduced_motion="reduce")
    try:
        wait_for(lambda: served.health() == 200, 60)
        page.goto(served.url.removesuffix("v1"))
        ask_for_little(page)
        say(page, "What is the capital of France?", ends=False)
        ended(page)
        expect(page.locator(".message.assistant .prose")).not_to_be_empty()
        page.get_by_role("link", name="Models").click()
        page.get_by_role("button", name="Unload smollm2").click()
        page.get_by_role("dialog").get_by_role("button", name="Unload").click()
        row = page.locator("#admin-rows tr")
        expect(row).to_contain_text("unloaded")
        expect(page.get_by_text("Download a model")).to_be_visible()
        shot(page, "models-admin")
        assert faults(page, "body") == []
        page.get_by_role("button", name="Load smollm2", exact=True).click()
        expect(row).to_contain_text("ready")
    finally:
        page.close()
        served.stop()
