"""What systemd hears of the service, over a real datagram socket; and the unit that starts it."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from llmkit.settings.gateway import GatewayOptions
from llmkit.system.notify import Notifier

UNIT = ROOT / "deploy" / "systemd" / "llmkit.service"


class Systemd:
    """The receiving end, at a path or a name in the abstract namespace."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(2)

    def hear(self) -> dict[str, str]:
        lines = self.socket.recv(65536).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def all(self) -> list[dict[str, str]]:
        self.socket.setblocking(False)
        heard = []
        try:
            while True:
                heard.append(self.hear())
        except BlockingIOError:
            return heard
        finally:
            self.socket.settimeout(2)


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("the abstract namespace is Linux's")
    name = str(tmp_path / "notify")
    receiver = Systemd(f"@llmkit-test-{os.getpid()}" if request.param == "abstract" else name)
    yield receiver
    receiver.socket.close()


@pytest.fixture
def notifier(systemd: Systemd) -> Iterator[Notifier]:
    notifier = Notifier({"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "200000"})
    yield notifier
    notifier.close()


def test_what_it_says(systemd: Systemd, notifier: Notifier) -> None:
    assert notifier.ready("serving smollm2")
    assert systemd.hear() == {"READY": "1", "STATUS": "serving smollm2"}
    assert notifier.status("3 models,\n2 loading") and systemd.hear() == {
        "STATUS": "3 models, 2 loading"
    }
    before = time.monotonic_ns() // 1000
    assert notifier.reloading()
    heard = systemd.hear()
    assert heard["RELOADING"] == "1"
    assert before <= int(heard["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
    assert notifier.stopping("finishing 2 requests")
    assert systemd.hear() == {"STOPPING": "1", "STATUS": "finishing 2 requests"}


def test_no_line_can_be_smuggled_in(systemd: Systemd, notifier: Notifier) -> None:
    """A status may hold the name of a model, and that comes from outside."""
    notifier.status("model \nREADY=1\x00\nMAINPID=1" + "x" * 10_000 + "\ud800")
    heard = systemd.hear()
    assert list(heard) == ["STATUS"] and len(heard["STATUS"]) <= 512


async def signs_of_life(systemd: Systemd, number: int) -> None:
    """Until there were so many; one is due every 0.1 s."""
    async with asyncio.timeout(30):
        while number > 0:
            number -= systemd.all().count({"WATCHDOG": "1"})
            await asyncio.sleep(0.02)


async def test_signs_of_life_only_while_the_loop_turns(
    systemd: Systemd, notifier: Notifier
) -> None:
    assert notifier.watchdog_s == 0.2
    watching = asyncio.create_task(notifier.watch())
    await signs_of_life(systemd, 4)
    systemd.all()  # one may have come since
    time.sleep(0.5)  # the loop is stuck
    assert systemd.all() == []
    await signs_of_life(systemd, 1)
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    systemd.all()
    await asyncio.sleep(0.25)
    assert systemd.all() == []


async def test_a_deaf_systemd_holds_nothing_up(tmp_path: Path) -> None:
    deaf = Systemd(str(tmp_path / "deaf"))
    notifier = Notifier({"NOTIFY_SOCKET": deaf.address, "WATCHDOG_USEC": "2000"})
    watching = asyncio.create_task(notifier.watch())
    await asyncio.sleep(0.5)  # some hundred datagrams that nobody reads
    assert not watching.done()
    watching.cancel()
    deaf.socket.close()
    os.unlink(deaf.address)
    assert notifier.ready() is False  # gone altogether
    notifier.close()


@pytest.mark.parametrize("address", ["", "relative", "/", "vsock:2:1234", "/nowhere/" + "x" * 200])
async def test_without_systemd_nothing_happens(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000"})
    assert not notifier.ready() and not notifier.status("x") and not notifier.stopping()
    if notifier.watchdog_s is None:
        await asyncio.wait_for(notifier.watch(), 30)
    notifier.close()


@pytest.mark.parametrize(
    "variables", [{}, {"WATCHDOG_USEC": "soon"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "-5"},
                  {"WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}],
)  # fmt: skip
def test_no_sign_of_life_unless_it_is_wanted_from_this_process(variables: dict[str, str]) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/run/x", **variables}).watchdog_s is None


def test_a_server_tells_systemd(tmp_path: Path) -> None:
    """From start to end: ready, signs of life, settings read again, stopping. Signs are seldom: ten
    that nobody has read yet fill the socket."""
    systemd = Systemd(str(tmp_path / "notify"))
    process = subprocess.Popen(
        [sys.executable, "-m", "llmkit", "serve", "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "2000000"},
    )
    systemd.socket.settimeout(60)

    def until(name: str) -> dict[str, str]:
        while name not in (heard := systemd.hear()):
            pass
        return heard

    try:
        assert until("READY")["STATUS"].startswith("http://127.0.0.1:")
        until("WATCHDOG")
        process.send_signal(signal.SIGHUP)
        until("RELOADING")
        until("READY")
        process.send_signal(signal.SIGTERM)
        until("STOPPING")
        assert process.wait(30) == 0
    finally:
        process.kill()
        _, errors = process.communicate()
        systemd.socket.close()
    assert "Traceback" not in errors


def settings() -> dict[str, str]:
    lines = (line.strip() for line in UNIT.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if "=" in line and line[0] not in "#[")


def test_the_unit_leaves_time_for_what_the_service_does() -> None:
    unit = settings()
    assert unit["Type"] == "notify" and unit["Restart"] == "on-failure"
    assert int(unit["TimeoutStopSec"]) > GatewayOptions().drain_s
    assert unit["KillMode"] == "mixed"  # workers end when the gateway tells them to


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        if os.environ.get("CI"):
            pytest.fail("systemd-analyze is missing, and CI may not skip")
        pytest.skip("no systemd-analyze here: apt-get install systemd")
    text = UNIT.read_text().replace("/opt/llmkit/bin/llmkit", sys.executable)
    (tmp_path / "llmkit.service").write_text(text)
    extra = tmp_path / "llmkit.service.d"
    extra.mkdir()
    shutil.copy(UNIT.with_name("gpu.conf"), extra)
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "llmkit.service")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert checked.returncode == 0 and not checked.stderr.strip(), checked.stderr
