"""A connection to one engine among many: turns, the reasons of its end, and who is to blame."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import replace
from typing import Any

import pytest
import zmq
from fakes import wait_for
from tracing import traced

from llmkit.bridge import line as lines
from llmkit.bridge import wire
from llmkit.bridge.connection import Connection, make_connection
from llmkit.bridge.curve import CurveKeys
from llmkit.bridge.line import MAX_MESSAGES, EngineLine
from llmkit.protocol import ModelDescription
from llmkit.system.process import process_start_time


class Socket:
    """Has some messages, and takes any."""

    def __init__(self, waiting: int) -> None:
        self.waiting, self.sent = waiting, 0

    def recv_multipart(self, _: int) -> list[bytes]:
        if not self.waiting:
            raise zmq.Again
        self.waiting -= 1
        return [wire.PONG, b""]

    def send_multipart(self, *_: Any) -> None:
        self.sent += 1

    def close(self) -> None: ...


class Heard:
    """The client and the loop of a line."""

    def __init__(self) -> None:
        self.count = self.posted = 0
        self.is_gone = False
        self.ends: list[tuple[str, bool]] = []

    def receive(self, *_: bytes) -> None:
        self.count += 1

    def lose(self, reason: str, *, blameless: bool = False) -> None:
        if not self.is_gone:
            self.ends.append((reason, blameless))
        self.is_gone = True

    def post(self, _: object) -> None:
        self.posted += 1


def made(
    waiting: int = 0, keys: CurveKeys | None = None, **facts: Any
) -> tuple[EngineLine, Heard, Socket]:
    connection: Connection = make_connection(ModelDescription("m", ""), None, 1.0, tcp=True)
    heard, socket = Heard(), Socket(waiting)
    line = EngineLine(replace(connection, **facts), heard, keys=keys)
    line._loop, line._sock = heard, socket  # type: ignore[assignment]
    return line, heard, socket


def test_one_that_says_much_lets_others_have_their_turn() -> None:
    line, heard, _ = made(2 * MAX_MESSAGES + 44)
    for count in (MAX_MESSAGES, 2 * MAX_MESSAGES):
        assert line.work() and heard.count == count
    assert heard.posted == 2
    assert line.work() and heard.count == 2 * MAX_MESSAGES + 44 and heard.posted == 2


def test_last_words_are_all_read() -> None:
    line, heard, _ = made(3 * MAX_MESSAGES, start_time=12.0)
    assert line.tick()
    assert heard.count == 3 * MAX_MESSAGES
    [(reason, blameless)] = heard.ends
    assert "has ended: killed or restarted" in reason and not blameless


@pytest.mark.parametrize("is_dead", [True, False])
def test_closing_tells_a_dead_process_from_a_living_one(is_dead: bool) -> None:
    line, heard, _ = made(**({"start_time": 12.0} if is_dead else {}))
    line.shut(None)
    [(reason, blameless)] = heard.ends
    assert ("has ended: killed" in reason) is is_dead and blameless is not is_dead


@pytest.mark.parametrize("goes_on", [False, True])
def test_whoever_ends_a_stopped_process_blames_no_request(goes_on: bool) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        line, heard, _ = made(pid=process.pid, start_time=process_start_time(process.pid))
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: line._connection.life == "stopped")
        assert line.tick() and not heard.is_gone
        if goes_on:
            process.send_signal(signal.SIGCONT)
            wait_for(lambda: line._connection.life == "alive")
            line.tick()
        process.kill()
    line.tick()
    [(reason, blameless)] = heard.ends
    assert "has ended: killed" in reason and blameless is not goes_on


def test_whoever_ends_a_process_under_a_debugger_blames_no_request() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        line, heard, _ = made(pid=process.pid, start_time=process_start_time(process.pid))
        with traced(process.pid):
            assert line._connection.life == "traced" and line._connection.is_alive
            assert line.tick() and not heard.is_gone
            process.kill()
        process.wait(30)
    line.tick()
    [(reason, blameless)] = heard.ends
    assert "has ended: killed" in reason and blameless


@pytest.mark.parametrize("silent_s", [0.2, 120.0])
def test_a_connection_lost_in_a_silence_is_nobodys_fault(
    silent_s: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    line, heard, _ = made(keys=CurveKeys(*zmq.curve_keypair(), b""))
    events = [zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED]

    def recv(*_: Any) -> dict[str, int]:
        if not events:
            raise zmq.Again
        return {"event": events.pop(0)}

    monkeypatch.setattr(lines, "recv_monitor_message", recv)
    monkeypatch.setattr(lines, "SILENT_S", 60.0)
    line._heard = time.monotonic() - silent_s
    line._watch(None)  # type: ignore[arg-type]
    [(reason, blameless)] = heard.ends
    assert "was lost" in reason and blameless is (silent_s > lines.SILENT_S)
    address = line._connection.address
    assert address not in reason and address in caplog.text, "the log alone says where"
    caplog.clear()
    events.append(zmq.EVENT_DISCONNECTED)
    line._watch(None)  # type: ignore[arg-type]
    assert not caplog.text, "of one that is gone already"


def test_a_second_greeting_has_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    line, heard, _ = made(keys=CurveKeys(*zmq.curve_keypair(), b""))
    line.greet()
    now = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: now)
    line.greet()
    line.tick()
    assert not heard.is_gone
    now += lines.WELCOME_S + 1
    line.tick()
    reason = heard.ends[0][0]
    assert "does not answer" in reason and line._connection.address not in reason
