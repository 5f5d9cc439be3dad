"""Two hosts (network namespaces) with a wire between them: what an eavesdropper sees, and the real
commands over it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import wait_for
from hub_server import free_ports

from llmkit.cluster.fleet_key import make_key

LLMKIT = Path(sys.prefix) / "bin" / "llmkit"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
GATEWAY_HOST, ENGINE_HOST = "10.77.0.1", "10.77.0.2"
CHAT_URL = "http://127.0.0.1:3000/v1/chat/completions"
SECRET = "The passphrase of the vault is turquoise elephant"
NAME = "confidential-model-name"

# Writes all that passes an interface to a file, from inside the namespace.
EAVESDROPPER = """
import socket, sys
tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
tap.bind((sys.argv[1], 0))
print("on", flush=True)
with open(sys.argv[2], "wb", buffering=0) as file:
    while True:
        file.write(tap.recv(65536))
"""
# A chat with a gateway that listens in its own namespace only.
CHAT = """
import json, sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(),
    {"Content-Type": "application/json"})
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[list[str], list[str]]]:
    """How to run a command on the gateway's host, and on the engine's."""
    tools = shutil.which("ip")
    names = [f"llmkit-{side}-{os.getpid()}" for side in "ge"]
    try:
        if not tools or os.geteuid() != 0:
            raise OSError("root and ip are needed")
        for name in names:
            run("ip", "netns", "add", name)
        run("ip", "link", "add", "lkg", "netns", names[0], "type", "veth", "peer", "lke",
            "netns", names[1])  # fmt: skip
        for name, link, address in zip(
            names, ("lkg", "lke"), (GATEWAY_HOST, ENGINE_HOST), strict=True
        ):
            inside = ["ip", "-n", name]
            run(*inside, "addr", "add", f"{address}/24", "dev", link)
            run(*inside, "link", "set", link, "up")
            run(*inside, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        _remove(names)
        why = getattr(error, "stderr", b"") or error
        if os.environ.get("CI"):
            pytest.fail(f"no network namespaces, and CI may not skip: {why!r}")
        pytest.skip(f"NO NETWORK NAMESPACES, SO NOTHING IS CAPTURED: {why!r}")
    yield ["ip", "netns", "exec", names[0]], ["ip", "netns", "exec", names[1]]
    _remove(names)


def _remove(names: list[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def start(
    started: list[subprocess.Popen[bytes]], command: list[str], home: Path
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "HOME": str(home), "NO_PROXY": "*"},
    )
    started.append(process)
    return process


def line(process: subprocess.Popen[bytes], word: bytes) -> bytes:
    assert process.stdout is not None
    for found in process.stdout:
        if word in found:
            return found
    raise AssertionError(f"{process.args!r} ended without a word of {word!r}")


ENGINE = [str(LLMKIT), "engine", "smollm2", "--threads", "1", "--n-ctx", "1024", "--n-slots", "2"]


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="network namespaces")
def test_an_eavesdropper_reads_nothing(
    hosts: tuple[list[str], list[str]], started: list[subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    on_gateway, on_engine = hosts
    key, capture = tmp_path / "fleet.key", tmp_path / "capture"
    make_key(key)
    tap = start(
        started,
        [*on_gateway, sys.executable, "-c", EAVESDROPPER, "lkg", str(capture)],
        tmp_path,
    )
    line(tap, b"on")
    fleet = ["--fleet-key-file", str(key)]
    gateway = start(
        started,
        [*on_gateway, str(LLMKIT), "serve", "--port", "3000", *fleet,
         "--fleet-listen", f"tcp://{GATEWAY_HOST}:7100"],
        tmp_path,
    )  # fmt: skip
    line(gateway, b"llmkit gateway at")
    engine = start(
        started,
        [*on_engine, *ENGINE, "--name", NAME, *fleet, "--join", f"tcp://{GATEWAY_HOST}:7100"],
        tmp_path,
    )
    line(engine, b"is ready at")

    def ask(body: dict[str, Any]) -> Any:
        command = [sys.executable, "-c", CHAT, CHAT_URL, json.dumps(body)]
        made = subprocess.run(
            [*on_gateway, *command], capture_output=True, text=True, timeout=90,
            env={**os.environ, "NO_PROXY": "*"},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return json.loads(made.stdout)

    wait_for(lambda: _knows(on_gateway, NAME), 30)
    answer = ask(
        {
            "model": NAME,
            "messages": [{"role": "user", "content": f"Repeat after me: {SECRET}"}],
            "max_tokens": 40,
            "temperature": 0,
        }
    )
    text = answer["choices"][0]["message"]["content"]
    assert len(text) > 30
    time.sleep(1.5)  # an announcement or two, with the counters of this answer
    seen = capture.read_bytes()
    assert len(seen) > 10_000 and b"CURVE" in seen, "the capture works"
    long = [word for word in f"{SECRET} {text}".split() if len(word) > 5]  # others occur by chance
    assert len(long) > 4
    for word in [*long, NAME, "smollm2", "messages", "n_params", key.read_text().strip()]:
        assert word.encode() not in seen, word
    # The engine's host said by itself which of its addresses leads to the gateway.
    engine.send_signal(signal.SIGTERM)
    assert engine.wait(30) == 0
    wait_for(lambda: not _knows(on_gateway, NAME), 20)


def _knows(on_gateway: list[str], name: str) -> bool:
    code = (
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:3000/v1/models',"
        "timeout=20).read().decode())"
    )
    made = subprocess.run(
        [*on_gateway, sys.executable, "-c", code], capture_output=True, text=True, timeout=30,
        env={**os.environ, "NO_PROXY": "*"},
    )  # fmt: skip
    return any(model["id"] == name for model in json.loads(made.stdout)["data"])


@pytest.mark.model
@pytest.mark.skipif(sys.platform != "linux", reason="signals")
def test_the_commands_on_one_host(started: list[subprocess.Popen[bytes]], tmp_path: Path) -> None:
    """Join, chat, drain; the second SIGTERM does not wait."""
    key = tmp_path / "fleet.key"
    made = subprocess.run([str(LLMKIT), "keys", "fleet", str(key)], capture_output=True, text=True)
    assert made.returncode == 0 and key.stat().st_mode & 0o777 == 0o600
    again = subprocess.run([str(LLMKIT), "keys", "fleet", str(key)], capture_output=True, text=True)
    assert again.returncode == 1 and "exists already" in again.stderr
    http, port = free_ports(2)
    join = ["--fleet-key-file", str(key), "--join", f"tcp://127.0.0.1:{port}"]
    engine = start(started, [*ENGINE, *join, "--drain-s", "60"], tmp_path)
    ready = line(engine, b"is ready at").decode()
    assert "'smollm2' is ready at tcp://127.0.0.1:" in ready
    gateway = start(  # after its engine, which tries until somebody hears it
        started,
        [str(LLMKIT), "serve", "--port", str(http), "--fleet-listen", f"tcp://127.0.0.1:{port}",
         "--fleet-key-file", str(key)],
        tmp_path,
    )  # fmt: skip
    line(gateway, b"llmkit gateway at")
    url = f"http://127.0.0.1:{http}"

    def post(max_tokens: int, **more: Any) -> Any:
        body = {"model": "smollm2", "messages": [{"role": "user", "content": "Count."}],
                "max_tokens": max_tokens, **more}  # fmt: skip
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return OPENER.open(request, timeout=60)

    def is_there() -> bool:
        with OPENER.open(f"{url}/v1/models", timeout=10) as reply:
            return any(m["id"] == "smollm2" for m in json.load(reply)["data"])

    wait_for(is_there, 20)
    with post(8) as reply:
        assert json.load(reply)["choices"][0]["message"]["content"]
    with post(100, stream=True, ignore_eos=True) as reply:
        reply.readline()
        engine.send_signal(signal.SIGTERM)
        line(engine, b"takes nothing new")
        chunks = [json.loads(each[6:]) for each in reply if each.startswith(b"data: {")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length", "what ran was finished"
    assert engine.wait(30) == 0
    second = start(started, [*ENGINE, *join, "--drain-s", "600"], tmp_path)
    line(second, b"is ready at")
    wait_for(is_there, 20)
    with post(900, stream=True, ignore_eos=True) as reply:
        reply.readline()
        second.send_signal(signal.SIGTERM)
        line(second, b"takes nothing new")
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--join", "tcp://127.0.0.1:7100"], "join needs fleet_key_file as well"),
        (["--join", "127.0.0.1:7100"], "join takes an address such as"),
        (["--join", "tcp://0.0.0.0:7100"], "is no gateway's address"),
        (["--join", "tcp://gw"], "join takes an address such as"),
        (["--listen", "tcp://0.0.0.0:7101"], "are for engines that --join a gateway"),
        (["--join", "tcp://10.0.0.1:7", "--listen", "tcp://127.0.0.1"], "cannot reach"),
        (["--join", "tcp://h:7", "--advertise", "tcp://*:1"], "nobody can connect to"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(given: list[str], said: str) -> None:
    made = subprocess.run(
        [str(LLMKIT), "engine", "no-such-model", *given], capture_output=True, text=True
    )
    assert made.returncode == 1 and said in made.stderr and "Traceback" not in made.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    key = tmp_path / "fleet.key"
    make_key(key)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        address, fleet = f"tcp://127.0.0.1:{port}", ["--fleet-key-file", str(key)]
        engine = subprocess.run(
            [
                str(LLMKIT),
                "engine",
                "m",
                "--join",
                "tcp://127.0.0.1:1",
                "--listen",
                address,
                *fleet,
            ],
            capture_output=True,
            text=True,
        )
        assert engine.returncode == 1 and f"listen: {address}: Address already" in engine.stderr
        gateway = subprocess.run(
            [str(LLMKIT), "serve", "--port", "0", "--fleet-listen", address, *fleet],
            capture_output=True,
            text=True,
        )
        assert gateway.returncode == 1 and "fleet_listen: nobody can listen" in gateway.stderr
    key.chmod(0o644)
    for command in (
        ["serve", "--fleet-listen", "tcp://127.0.0.1:0", *fleet],
        ["engine", "m", "--join", "tcp://127.0.0.1:1", *fleet],
    ):
        made = subprocess.run([str(LLMKIT), *command], capture_output=True, text=True)
        assert made.returncode == 1 and f"chmod 600 {key}" in made.stderr
    made = subprocess.run(
        [str(LLMKIT), "serve", "--fleet-listen", "tcp://127.0.0.1:7100"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 1 and "fleet_listen needs fleet_key_file" in made.stderr
