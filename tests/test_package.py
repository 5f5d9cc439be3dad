"""The package as a whole: what importing costs, what is public, what the demo does, doctests."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT
from fakes import FakeClient

import llmkit
from llmkit.bridge.server import BridgeServer


def test_importing_loads_nothing_heavy() -> None:
    heavy = [
        "llama_cpp",
        "numpy",
        "pandas",
        "matplotlib",
        "ipywidgets",
        "tornado",
        "zmq",
        "jinja2",
        "pydantic",
        "jupyter_core",
        "psutil",
    ]
    code = f"import sys, llmkit; print([m for m in {heavy!r} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_the_public_names() -> None:
    assert set(llmkit.__all__) == set(dir(llmkit)) and "load" in llmkit.__all__
    for name in llmkit.__all__:
        assert getattr(llmkit, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        llmkit.nonsense  # noqa: B018
    code = "import llmkit; print(llmkit.models(), llmkit.protocol.speech.Segment)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "Segment" in done.stdout, done.stderr


def test_errors_are_one_tree() -> None:
    from llmkit import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), errors.LLMKitError)


def test_the_examples_in_docstrings_work() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--doctest-modules",
        "llmkit",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout


def test_serving_alone_imports_nothing_that_it_can_do_without() -> None:
    """A client waits for all of it."""
    heavy = ("jupyter_server", "IPython", "ipywidgets", "llama_cpp", "pandas", "numpy", "PIL")
    heavy += ("sqlalchemy", "jinja2", "pygments", "opentelemetry", "huggingface_hub")
    code = (
        "import sys, llmkit.cli.app, llmkit.cli.offering, llmkit.gateway.running; "
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


@pytest.mark.model
def test_the_demo() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "notebooks" / "demo.py")],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "That reply came from the model in the kernel" in done.stdout
        and "prefill_tok_s" in done.stdout
    )


NOT_NEEDED = (
    "llama_cpp", "llguidance", "gguf", "safetensors", "huggingface_hub", "pandas", "matplotlib",
    "ipywidgets", "IPython", "jupyter_server",
)  # fmt: skip


def test_attaching_and_serving_need_no_llama_cpp(fake: FakeClient) -> None:
    """A process without it, or a compiler, uses the model of another one, and serves it."""
    bridge = BridgeServer(fake)
    code = f"""
import sys
for name in {NOT_NEEDED!r}:
    sys.modules[name] = None
import asyncio, json, threading, urllib.request
import llmkit
llm = llmkit.attach("fake")
print(llm.generate("hi", max_tokens=3, temperature=0).usage.completion_tokens)
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.access.keys import Keys
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway import standalone
from tornado.netutil import bind_sockets
async def main():
    server = make_server(make_app(Gateway(EngineDirectory()), Keys(None, "127.0.0.1")))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    url = f"http://127.0.0.1:{{sockets[0].getsockname()[1]}}/v1/completions"
    body = json.dumps({{"model": "fake", "prompt": "hi", "max_tokens": 3}}).encode()
    request = urllib.request.Request(url, body)
    print(await asyncio.to_thread(lambda: json.load(urllib.request.urlopen(request))["object"]))
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    bridge.close()
    assert done.stdout.split() == ["3", "text_completion"], done.stderr[-2000:]
