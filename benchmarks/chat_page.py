"""How soon the chat page is there, and how many frames a second it shows while an answer of 4,000
tokens is streamed: `python benchmarks/chat_page.py`, with Debian's chromium."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from browser_page import ARGUMENTS
from scripted_model import ScriptedModel, ServedModels

NUM_CHARS, TOKEN_S = 16_000, 0.005
PARAGRAPH = "Some **words** of `code`, with $x^2$, and more of them to fill a line or two. " * 3
ANSWERS = {
    "mixed": f"{PARAGRAPH}\n\n- one\n\n```python\nx = f(2)  # why\n```\n\n|a|b|\n|-|-|\n|1|2|\n\n",
    "code": "def f(x):\n    return x + 1  # comment\n",
    "list": "- item number one with *text*\n",
    "paragraph": "word and more ",
}
COUNT = """() => { window.gaps = []; let last = performance.now();
  const tick = now => { gaps.push(now - last); last = now; requestAnimationFrame(tick); };
  requestAnimationFrame(tick); }"""


def main() -> None:
    model = ScriptedModel()
    model.token_s = TOKEN_S
    served = ServedModels(Path(tempfile.mkdtemp()), model)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS
        )
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        for visit in ("cold", "warm"):
            page.goto(served.url)
            page.wait_for_selector("html.ready")
            paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
            print(f"first paint, {visit}: {page.evaluate(paint):.0f} ms")
        for name, unit in ANSWERS.items():
            begin = "```python\n" if name == "code" else ""
            answer = begin + (unit * (NUM_CHARS // len(unit) + 1))[:NUM_CHARS]
            model.script = lambda _, answer=answer: answer
            print(f"{name}: {frames(page):.0f} frames/s")
        browser.close()
    served.stop()


def frames(page: Page) -> float:
    """Mean frames a second while an answer is streamed."""
    page.get_by_role("button", name="New chat").click()
    page.get_by_label("Message", exact=True).fill("Go")
    page.keyboard.press("Enter")
    page.wait_for_selector(".streaming")
    page.evaluate(COUNT)
    page.wait_for_selector(".message.assistant:not(.streaming)", timeout=120_000)
    gaps = page.evaluate("gaps")
    return float(1000 * len(gaps) / sum(gaps))


if __name__ == "__main__":
    main()
