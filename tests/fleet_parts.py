"""Parts of a fleet for tests: keys, a joined fake engine in a process of its own, strangers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import zmq

from llmkit.bridge.curve import CurveKeys
from llmkit.bridge.server import BridgeServer
from llmkit.cluster.announcements import ANNOUNCE, Announcement, Place, pack
from llmkit.cluster.announcing import Announcer, announcement
from llmkit.cluster.fleet_key import engine_keys, gateway_keys
from llmkit.protocol.client import EngineClient

KEY = b"0123456789abcdef" * 2
GATEWAY, ENGINE = gateway_keys(KEY), engine_keys(KEY)
HERE = Path(__file__).parent

# An engine on the fake model: "on" when it serves, SIGSTOP and the rest are for the test.
FAKE_ENGINE = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from fake_runner import FakeRunner
from fakes import FakeClient
from fleet_parts import Joined
fake = FakeClient(sys.argv[2], FakeRunner(n_ctx=200_000, step_s=float(sys.argv[4])))
joined = Joined(fake, sys.argv[3].split())
print("on", flush=True)
for line in sys.stdin:
    if line == "hold\\n":  # the GIL, for eight seconds
        import ctypes
        ctypes.PyDLL(None).sleep(8)
        print("held", flush=True)
joined.close()
"""


class Joined:
    """An engine client that has joined gateways, in this process."""

    def __init__(self, client: EngineClient, gateways: list[str], **facts: Any) -> None:
        self.server = BridgeServer(client, listen="tcp://127.0.0.1:*", keys=ENGINE)
        said = announcement(
            model=client.description,
            address=self.server.connection.address,
            key=self.server.connection.key,
            **facts,
        )
        places = [Place.read(each, "join") for each in gateways]
        self.announcer = Announcer(
            places,
            ENGINE,
            lambda: msgspec.structs.replace(
                said, phase="draining" if self.server.is_draining else "ready"
            ),
        )

    def close(self) -> None:
        self.server.close()
        self.announcer.close()


@contextmanager
def engine_process(
    name: str, *gateways: str, step_s: float = 0.002
) -> Iterator[subprocess.Popen[bytes]]:
    """A fake engine in a process, joined to the gateways; its standard input ends it."""
    process = subprocess.Popen(
        [sys.executable, "-c", FAKE_ENGINE, str(HERE), name, " ".join(gateways), str(step_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"on\n"
        yield process
    finally:
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.kill()
        process.wait(30)
        process.stdout.close()


def speak(
    address: str, keys: CurveKeys | None, *messages: list[bytes], wait_s: float = 30
) -> list[list[bytes]]:
    """Say something to a socket, and what it answers: one thing to each message, if that comes
    within ``wait_s``."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.linger = 0
        if keys is not None:
            keys.connect(sock)
        sock.connect(address)
        for message in messages:
            sock.send_multipart(message)
        found: list[list[bytes]] = []
        while len(found) < len(messages) and sock.poll(int(1000 * wait_s)):
            found.append(sock.recv_multipart())
        return found


def said_to(
    address: str, keys: CurveKeys | None, announced: Announcement, wait_s: float = 30
) -> list[list[bytes]]:
    return speak(address, keys, [ANNOUNCE, pack(announced)], wait_s=wait_s)
