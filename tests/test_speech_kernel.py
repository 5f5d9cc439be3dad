"""Speech in a real kernel: what a notebook shows, the stop button, and the gateway in Jupyter over
the models of a notebook."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from jupyter_client_http import JupyterServer, Kernel
from speech import SENTENCES, folded

pytestmark = pytest.mark.model
LOAD = """
import llmkit
voice, whisper = llmkit.load("hibari"), llmkit.load("whisper-tiny.en")
said = voice.say(TEXT, seed=1)
"""
TEXT = " ".join(SENTENCES)


def test_a_notebook_hears_and_speaks(server: JupyterServer, kernel: Kernel) -> None:
    kernel.run(f"TEXT = {TEXT!r}{LOAD}")
    shown = [m for m in messages(kernel, "display(said)") if m[0] == "display_data"]
    assert shown[0][1]["data"]["text/html"].startswith("<audio controls aria-label=")
    heard = messages(kernel, "whisper.transcribe(said)")
    live = [m for m in heard if m[0] in ("display_data", "update_display_data")]
    assert "The quick brown fox" in live[0][1]["data"]["text/html"]
    assert "transcribed in" in live[-1][1]["data"]["text/plain"]
    result = next(content for kind, content in heard if kind == "execute_result")
    assert "apples at the market" in result["data"]["text/html"]

    head = {"Authorization": f"token {server.token}"}
    url = f"{server.url}/llmkit/v1"
    names = {m["id"] for m in httpx.get(f"{url}/models", headers=head, timeout=60).json()["data"]}
    assert {"hibari", "whisper-tiny.en"} <= names
    body = {"input": SENTENCES[0], "response_format": "flac", "seed": 1}
    sound = httpx.post(f"{url}/audio/speech", json=body, headers=head, timeout=60)
    assert sound.status_code == 200 and sound.headers["content-type"] == "audio/flac"
    reply = httpx.post(
        f"{url}/audio/transcriptions",
        files={"file": ("a.flac", sound.content)},
        data={"response_format": "text"},
        headers=head,
        timeout=60,
    )
    assert folded(reply.text) == folded(SENTENCES[0])


def test_the_stop_button_ends_both(kernel: Kernel) -> None:
    kernel.run(f"TEXT = {TEXT!r}{LOAD}")
    kernel.run("long = voice.say(' '.join([TEXT] * 8), seed=1)")
    for code in ("whisper.transcribe(long)", "[voice.say(TEXT * 8) for _ in range(100)]"):
        waiting = kernel.start(f"print('go', flush=True); {code}")
        errors = []
        for message in kernel.messages(waiting):
            if message["msg_type"] == "stream" and "go" in message["content"]["text"]:
                time.sleep(0.5)
                kernel.interrupt()
            elif message["msg_type"] == "error":
                errors.append(message["content"]["ename"])
        assert errors == ["Interrupted"]
    idle = kernel.run(
        "import time\n"
        "end = time.time() + 20\n"
        "while (whisper.stats.num_running or voice.stats.num_running) and time.time() < end:\n"
        "    time.sleep(0.05)\n"
        "print(whisper.stats.num_running + voice.stats.num_running)\n"
        "print(whisper.transcribe(voice.say('Good morning.', seed=1)))"
    )
    assert idle == "0\nGood morning.\n"


def messages(kernel: Kernel, code: str) -> list[tuple[str, dict[str, Any]]]:
    waiting = kernel.start(code)
    return [(m["msg_type"], m["content"]) for m in kernel.messages(waiting)]
