"""The main use in a terminal: load a model in a real kernel, stream a reply and profile it.

Then call the same model from another process, through Jupyter. Run by `make demo`; exits 0 only if
every step succeeded.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from jupyter_client.blocking.client import BlockingKernelClient

OUTSIDE = """
import sys
from openai import OpenAI
client = OpenAI()
for model in client.models.list():
    print("  model:", model.id)
print("  reply: ", end="")
count = 0
for chunk in client.chat.completions.create(
    model="smollm2",
    messages=[{"role": "user", "content": "Name three fruits."}],
    max_tokens=32,
    temperature=0,
    stream=True,
):
    print((chunk.choices[0].delta.content or "").replace("\\n", "\\n         "), end="", flush=True)
    count += bool(chunk.choices[0].delta.content)
print()
sys.exit(0 if count else 1)
"""


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="llmkit-demo-") as folder:
        server, url, token, runtime = start_server(Path(folder))
        try:
            print(f"A Jupyter server runs at {url}\n")
            kernel_id = call(url, token, "/api/kernels", {"name": "python3"})["id"]
            kernel = BlockingKernelClient(connection_file=str(runtime / f"kernel-{kernel_id}.json"))
            kernel.load_connection_file()
            kernel.start_channels()
            kernel.wait_for_ready(timeout=60)
            step(
                kernel,
                "Load the model in a kernel",
                "import llmkit\nllm = llmkit.load('smollm2')\nprint(llm)",
            )
            step(
                kernel,
                "Stream a reply",
                "reply = llm.chat('What is a notebook?', stream=True, max_tokens=48, seed=3)\n"
                "for piece in reply:\n    print(piece, end='', flush=True)",
            )
            step(
                kernel,
                "Profile it",
                "print(llm.profile(prompt_tokens=(32, 128), batch_sizes=(1, 4), max_tokens=16))",
            )
            before = int(evaluate(kernel, "print(llm.stats.requests_total)"))
            print(
                "# Use the same model from another process: "
                "the stock openai client through the Jupyter server"
            )
            environment = {
                **os.environ,
                "OPENAI_BASE_URL": f"{url}/llmkit/v1",
                "OPENAI_API_KEY": token,
            }
            subprocess.run(
                [sys.executable, "-c", OUTSIDE], env=environment, check=True, timeout=120
            )
            after = int(evaluate(kernel, "print(llm.stats.requests_total)"))
            if after != before + 1:
                raise RuntimeError("the reply did not come from the model in the kernel")
            print(
                f"\nThat reply came from the model in the kernel: it has served {after} requests, "
                f"{after - before} of them from outside."
            )
            kernel.stop_channels()
        finally:
            server.terminate()
            server.wait(20)
    return 0


def start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str, str, Path]:
    """A Jupyter server on a free loopback port, with a token and a runtime directory of its own."""
    token, runtime = secrets.token_hex(16), folder / "runtime"
    runtime.mkdir(mode=0o700)
    environment = {**os.environ, "JUPYTER_TOKEN": token, "JUPYTER_RUNTIME_DIR": str(runtime)}
    os.environ["JUPYTER_RUNTIME_DIR"] = str(runtime)
    command = [
        sys.executable,
        "-m",
        "jupyter_server",
        "--no-browser",
        "--ip=127.0.0.1",
        "--port=0",
        "--allow-root",
        f"--ServerApp.root_dir={folder}",
    ]
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    for _ in range(600):
        files = list(runtime.glob("jpserver-*.json"))
        if files and files[0].stat().st_size:
            url = json.loads(files[0].read_text())["url"].rstrip("/")
            try:
                call(url, token, "/api/kernels")
                return server, url, token, runtime
            except OSError:
                pass
        if server.poll() is not None:
            break
        time.sleep(0.1)
    server.kill()
    raise RuntimeError(f"the Jupyter server did not start:\n{log.read_text()}")


def call(url: str, token: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def evaluate(kernel: BlockingKernelClient, code: str, echo: bool = False) -> str:
    """What the cell prints. Raises RuntimeError with its traceback."""
    parts: list[str] = []

    def output(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            parts.append(message["content"]["text"])
            if echo:
                print(message["content"]["text"], end="", flush=True)

    reply = kernel.execute_interactive(code, output_hook=output, timeout=180)
    if reply["content"]["status"] != "ok":
        raise RuntimeError("\n".join(reply["content"].get("traceback", [])))
    return "".join(parts)


def step(kernel: BlockingKernelClient, title: str, code: str) -> None:
    print(f"# {title}")
    for line in code.splitlines():
        print(f">>> {line}")
    if not evaluate(kernel, code, echo=True).strip():
        raise RuntimeError(f"nothing came of: {title}")
    print("\n")


if __name__ == "__main__":
    sys.exit(main())
