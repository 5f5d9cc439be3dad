"""The images of `deploy/docker`, built and run: as nobody, healthy, on a read-only root, and with a
drain at the end. llama.cpp is not compiled again: pip finds the wheel that was made for this
machine."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import ROOT
from containers import Container, Store
from test_reverse_proxies import free_port

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]
KEY = "container-key"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    made = Store(tmp_path_factory.mktemp("containers"))
    try:
        made.build("Dockerfile", "llmkit", COMPILER="")
        yield made
    finally:
        made.close()


def safely() -> list[str]:
    """How compose.yaml and the chart run it."""
    text = (ROOT / "deploy" / "compose" / "compose.yaml").read_text()
    for line in ("read_only: true", "cap_drop: [ALL]", '"no-new-privileges:true"', '"/tmp:mode'):
        assert line in text
    return ["--read-only", "--cap-drop", "all", "--security-opt", "no-new-privileges",
            "--tmpfs", "/tmp:mode=1777"]  # fmt: skip


@pytest.fixture(scope="module")
def gateway(store: Store) -> Iterator[tuple[Container, str]]:
    port = free_port()
    environment = ["-e", f"LLMKIT_API_KEY={KEY}", "-e", f"LLMKIT_PORT={port}"]
    with store.running(
        "llmkit", "serve", "smollm2", "--n-ctx", "2048", "--n-slots", "2",
        options=[*safely(), *environment],
    ) as container:  # fmt: skip
        container.until_healthy()
        yield container, f"http://127.0.0.1:{port}"


def ask(url: str, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        url + path,
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    return urllib.request.urlopen(request, timeout=60)


CHAT = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Count to a hundred."}],
    "ignore_eos": True,  # the model may answer briefly
}


def test_it_answers_as_nobody_on_a_read_only_root(gateway: tuple[Container, str]) -> None:
    container, url = gateway
    with ask(url, "/v1/chat/completions", {**CHAT, "max_tokens": 5}) as reply:
        answer = json.load(reply)
    assert answer["usage"]["completion_tokens"] == 5
    assert container.run("id", "-u").strip() == "10001"
    assert "CapEff:\t0000000000000000" in container.run("cat", "/proc/self/status")
    for place in ("/opt/llmkit", "/usr/local/bin", "/etc"):
        tried = container.store.tried("exec", container.name, "touch", f"{place}/x")
        assert tried.returncode and "ead-only" in tried.stderr
    listed = container.run("llmkit", "models", "list")
    assert "smollm2" in listed
    # All that pip installed goes together, and nothing to build with is left.
    lacking = container.run("python", "-c", "import llmkit, llama_cpp, psycopg, redis, jupyterhub")
    assert lacking == ""
    for name in ("pip", "cc", "cmake", "git"):
        assert container.store.tried("exec", container.name, "which", name).returncode


def test_a_users_server_has_no_engine(store: Store, gateway: tuple[Container, str]) -> None:
    """And uses that of the gateway."""
    store.build("Dockerfile.user", "llmkit-user")
    code = (
        "import importlib.util as u, shutil, llmkit, os; "
        "print([n for n in ('llama_cpp', 'llguidance', 'gguf') if u.find_spec(n)], "
        "[n for n in ('cc', 'gcc', 'cmake') if shutil.which(n)], os.getuid(), llmkit.attach)"
    )
    limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096", "--network", "none"]
    printed = store.podman("run", "--rm", *limits, "localhost/llmkit-user", "python", "-c", code)
    assert printed.startswith("[] [] 1000 <function attach")
    use = (
        f"import llmkit; llm = llmkit.attach({gateway[1]!r}, key={KEY!r}); "
        "print(llm.generate('Once', max_tokens=4).usage.completion_tokens)"
    )
    shared = [*limits[:-1], "host"]
    assert (
        store.podman("run", "--rm", *shared, "localhost/llmkit-user", "python", "-c", use) == "4\n"
    )
    version = store.podman(
        "run", "--rm", *limits, "localhost/llmkit-user", "jupyterhub-singleuser", "--version"
    )
    assert re.match(r"\d+\.\d+", version)
    listed = store.podman(
        "run", "--rm", *limits, "localhost/llmkit-user", "jupyter", "server", "extension", "list"
    )
    assert "llmkit_jupyter" in listed


def test_sigterm_lets_a_stream_end(gateway: tuple[Container, str]) -> None:
    container, url = gateway
    text: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with ask(url, "/v1/chat/completions", {**CHAT, "max_tokens": 300, "stream": True}) as reply:
            for line in reply:
                text.append(line.decode())
                if "content" in text[-1]:
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    status = container.stop(45)
    reader.join(30)
    assert status == 0 and not reader.is_alive(), container.logs()[-2000:]
    assert "data: [DONE]\n" in text and len(text) > 20
    assert "Traceback" not in container.logs()


def test_without_a_key_it_does_not_start(store: Store) -> None:
    """It listens to everybody, so it needs one; the error says so."""
    done = store.tried(
        "run", "--rm", "--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit",
        "nproc=4096:4096", "localhost/llmkit", "serve", "echo",
    )  # fmt: skip
    assert done.returncode in (1, 2) and "key" in done.stderr and "Traceback" not in done.stderr


def test_what_is_in_the_image(store: Store) -> None:
    found = json.loads(store.podman("image", "inspect", "localhost/llmkit"))[0]
    config = found["Config"]
    assert config["User"] == "10001:10001" and config["StopSignal"] == "SIGTERM"
    assert set(config["Volumes"]) == {"/data", "/models"}
    assert found["Healthcheck"]["Test"] == ["CMD", "healthcheck"]
    secret = re.compile(r"token|password|secret|index.?url", re.I)
    assert not [each for each in config["Env"] if secret.search(each)]
    # 400 MB without Debian, its Python, and the embedded model.
    assert found["Size"] < 850e6, found["Size"]
