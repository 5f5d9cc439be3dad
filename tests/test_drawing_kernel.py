"""Drawing in a real kernel: what a notebook shows, the stop button, and the gateway in Jupyter."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import pytest
from drawing import image
from jupyter_client_http import JupyterServer, Kernel
from toy_models import write_checkpoint, write_decoder

from llmkit.diffusion.extra import INSTALL, is_installed

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(
        not is_installed(), reason=f"STABLE-DIFFUSION.CPP IS NOT TESTED: {INSTALL} is missing"
    ),
]


def test_a_notebook_draws(server: JupyterServer, kernel: Kernel, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "small.safetensors")
    write_decoder(tmp_path / "taesd.safetensors")
    file = str(tmp_path / "small.safetensors")
    kernel.run(f"import llmkit, psutil; sd = llmkit.load({file!r}, threads=1)")
    waiting = kernel.start("sd.generate('a cat', seed=5, steps=3, size='64x64')")
    heard: list[tuple[str, Any]] = [(m["msg_type"], m["content"]) for m in kernel.messages(waiting)]
    live = [c["data"] for kind, c in heard if kind in ("display_data", "update_display_data")]
    assert any('src="data:image/jpeg;base64,' in data["text/html"] for data in live)
    assert live[-1]["text/plain"].startswith("small: drawn in ")
    assert live[-1]["text/plain"].endswith(" s, seed 5")
    result = next(content for kind, content in heard if kind == "execute_result")
    assert image(base64.b64decode(result["data"]["image/png"])).size == (64, 64)

    waiting = kernel.start("print('go', flush=True); sd.generate('a cat', steps=150, size='64x64')")
    errors, is_interrupted = [], False
    for message in kernel.messages(waiting):
        is_shown = message["msg_type"] in ("display_data", "update_display_data")
        if is_shown and not is_interrupted:
            kernel.interrupt()
            is_interrupted = True
        elif message["msg_type"] == "error":
            errors.append(message["content"]["ename"])
    assert errors == ["Interrupted"]
    idle = kernel.run(
        "import time\n"
        "end = time.time() + 30\n"
        "while psutil.Process().children() and time.time() < end:\n"
        "    time.sleep(0.05)\n"
        "print(len(psutil.Process().children()), sd.stats.num_running)"
    )
    assert idle == "0 0\n"

    head = {"Authorization": f"token {server.token}"}
    body = {"prompt": "a cat", "size": "64x64", "seed": 5, "steps": 3}
    url = f"{server.url}/llmkit/v1/images/generations"
    reply = httpx.post(url, json=body, headers=head, timeout=120).json()
    made = image(base64.b64decode(reply["data"][0]["b64_json"]))
    shown = image(base64.b64decode(result["data"]["image/png"]))
    assert made.tobytes() == shown.tobytes()
