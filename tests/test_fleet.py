"""Engines of other hosts over TCP: who is seen to join, live, drain and die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from fakes import FakeClient, ask, wait_for
from fleet_parts import ENGINE, GATEWAY, Joined, engine_process, said_to

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import find_connections
from llmkit.cluster.announcing import announcement
from llmkit.cluster.fleet import Fleet, FleetEngine
from llmkit.errors import DrainingError, EngineGoneError, InvalidRequestError
from llmkit.protocol import ModelDescription
from llmkit.protocol.client import EngineClient

pytest_plugins = ["fleet_fixtures"]


def only(fleet: Fleet) -> EngineClient:
    """The one engine that a fleet has."""
    wait_for(fleet.find)
    (reach,) = fleet.find().values()
    return reach()


def test_an_engine_joins_answers_and_leaves(
    slow: FakeClient, fleet: Fleet, ending: ExitStack
) -> None:
    assert not fleet.find()
    joined = Joined(slow, [fleet.address])
    ending.callback(joined.close)
    client = only(fleet)
    ending.callback(client.close)
    assert "".join(client.submit(ask("hello", max_tokens=30))).encode() == slow.runner.reference(
        b"hello", 30
    )
    assert client.description == slow.description and client.state.phase == "ready"
    assert client.origin.kind == "host" and client.origin.pid is None
    assert find_connections() == [], "its file would offer it to this host twice"
    joined.close()
    wait_for(lambda: client.state.is_gone)
    assert client.state.blameless and "unloaded" in str(client.state.reason)
    assert not fleet.find()


def test_last_words_are_heard_by_who_is_late(slow: FakeClient, ending: ExitStack) -> None:
    """Goodbye and the end of the connection are both there when somebody looks."""
    joined = Joined(slow, [])
    client = BridgeClient(joined.server.connection, keys=GATEWAY)
    ending.callback(client.close)
    stream = client.submit(ask("a", max_tokens=100_000))
    wait_for(lambda: stream.text)
    looked = threading.Event()

    def look() -> None:  # on the loop's thread
        if not looked.is_set():
            looked.set()
            time.sleep(1)

    stream.listen(look)
    assert looked.wait(30)
    joined.close()
    wait_for(lambda: client.state.is_gone)
    assert client.state.blameless
    with pytest.raises(EngineGoneError, match="unloaded"):
        stream.result(30)


def test_a_gateway_that_comes_later(slow: FakeClient, ending: ExitStack) -> None:
    first = Fleet("tcp://127.0.0.1:0", GATEWAY)
    address = first.address
    joined = Joined(slow, [address])
    ending.callback(joined.close)
    wait_for(first.find)
    first.close()
    again = Fleet(address, GATEWAY)
    ending.callback(again.close)
    client = only(again)
    assert client.submit(ask("a")).result(30)
    client.close()


def test_the_port_is_taken(fleet: Fleet, slow: FakeClient) -> None:
    with pytest.raises(InvalidRequestError, match="fleet_listen: nobody can listen at"):
        Fleet(fleet.address, GATEWAY)


def test_an_address_that_leads_nowhere_is_tried_ever_more_seldom(ending: ExitStack) -> None:
    now = [100.0]
    fleet = Fleet("tcp://127.0.0.1:0", GATEWAY, clock=lambda: now[0])
    ending.callback(fleet.close)
    said = announcement(model=ModelDescription("m", ""), address="tcp://127.0.0.1:1")
    waits: list[float] = []
    keys = []
    for _ in range(4):
        before = now[0]
        while not fleet.find():
            now[0] += 0.25
            said_to(fleet.address, ENGINE, said)
        waits.append(now[0] - before)
        ((key, reach),) = fleet.find().items()
        keys.append(key)
        client = reach()
        wait_for(lambda client=client: client.state.is_gone)
        assert "cannot be reached" in str(client.state.reason)
    assert waits[1] < waits[2] < waits[3] and len(set(keys)) == 4


def test_a_killed_engine_is_seen_at_once(fleet: Fleet) -> None:
    with engine_process("killed", fleet.address) as process:
        client = only(fleet)
        stream = client.submit(ask("a", max_tokens=100_000))
        wait_for(lambda: stream.text)
        process.kill()
        with pytest.raises(EngineGoneError, match="was lost"):
            stream.result(30)
        assert client.state.is_gone and not client.state.blameless, "its end was seen, not silence"
        assert not fleet.find()
        client.close()


def test_a_stopped_engine_is_lost_and_comes_back(fleet: Fleet) -> None:
    with engine_process("stopped", fleet.address) as process:
        client = only(fleet)
        stream = client.submit(ask("a", max_tokens=100_000))
        wait_for(lambda: stream.text)
        start = time.monotonic()
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(EngineGoneError, match="was lost"):
            stream.result(30)
        assert time.monotonic() - start > 2
        assert client.state.blameless, "it was silent: no request can have ended it"
        assert not fleet.find()
        os.kill(process.pid, signal.SIGCONT)
        again = only(fleet)
        assert again is not client
        # What it was doing for us has been aborted there.
        wait_for(lambda: again.stats().requests_total and not again.stats().num_running)
        assert again.submit(ask("b")).result(30)
        again.close()
        client.close()


def test_an_engine_that_holds_its_gil_is_not_dead(fleet: Fleet) -> None:
    with engine_process("busy", fleet.address) as process:
        client = only(fleet)
        assert client.submit(ask("a")).result(30)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"hold\n")
        process.stdin.flush()
        stream = client.submit(ask("b", max_tokens=4))
        assert process.stdout.readline() == b"held\n"
        assert stream.result(30) and not client.state.is_gone
        ((_, reach),) = fleet.find().items()
        assert reach() is client, "silent for longer than an announcement lasts, and still there"
        client.close()


def test_draining_is_seen_and_what_runs_finishes(
    slow: FakeClient, fleet: Fleet, ending: ExitStack
) -> None:
    joined = Joined(slow, [fleet.address])
    ending.callback(joined.close)
    client = only(fleet)
    ending.callback(client.close)
    stream = client.submit(ask("a", max_tokens=200))
    wait_for(lambda: stream.text)
    joined.server.drain(30)
    joined.announcer.poke()
    wait_for(lambda: client.state.phase == "draining")
    with pytest.raises(DrainingError):
        client.submit(ask("b"))
    assert stream.result(30).usage.completion_tokens == 200
    wait_for(lambda: joined.server.is_drained)
    other = Fleet("tcp://127.0.0.1:0", GATEWAY)  # a gateway that comes now does not use it
    ending.callback(other.close)
    late = Joined(slow, [])
    ending.callback(late.close)
    said = announcement(model=slow.description, address="tcp://127.0.0.1:9", phase="draining")
    said_to(other.address, ENGINE, said)
    assert not other.find()


GATEWAY_PROCESS = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from fakes import ask
from fleet_parts import GATEWAY
from llmkit.cluster.fleet import Fleet
fleet = Fleet("tcp://127.0.0.1:0", GATEWAY)
print(fleet.address, flush=True)
while not fleet.find(): time.sleep(0.01)
(reach,) = fleet.find().values()
client = reach()
streams = [client.submit(ask("a", max_tokens=100_000)) for _ in range(2)]
pieces = [iter(s) for s in streams]
for each in pieces: next(each)
print("on", flush=True)
for line in sys.stdin:
    import ctypes
    ctypes.PyDLL(None).sleep(4)
    print("held", all(next(each) for each in pieces), flush=True)
"""


@pytest.fixture
def other_gateway() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", GATEWAY_PROCESS, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGSTOP])
def test_two_gateways_and_one_dies(
    death: signal.Signals,
    slow: FakeClient,
    fleet: Fleet,
    ending: ExitStack,
    other_gateway: subprocess.Popen[bytes],
) -> None:
    assert other_gateway.stdout is not None and other_gateway.stdin is not None
    other = other_gateway.stdout.readline().decode().strip()
    joined = Joined(slow, [fleet.address, other])
    ending.callback(joined.close)
    client = only(fleet)
    ending.callback(client.close)
    mine = client.submit(ask("a", max_tokens=100_000))
    assert other_gateway.stdout.readline() == b"on\n"
    wait_for(lambda: slow.stats().num_running == 3)
    if death == signal.SIGSTOP:  # before that, Python's absence is no death
        other_gateway.stdin.write(b"hold\n")
        other_gateway.stdin.flush()
        assert other_gateway.stdout.readline() == b"held True\n"
        assert slow.stats().num_running == 3
    os.kill(other_gateway.pid, death)
    wait_for(lambda: slow.stats().num_running == 1)
    seen = mine.text
    wait_for(lambda: len(mine.text) > len(seen))
    mine.close()


def test_an_idle_gateway_that_dies_is_forgotten(slow: FakeClient, ending: ExitStack) -> None:
    joined = Joined(slow, [])
    ending.callback(joined.close)
    connection = joined.server.connection
    client = BridgeClient(connection, keys=GATEWAY)
    wait_for(lambda: joined.server.num_peers == 1)
    client.close()
    wait_for(lambda: joined.server.num_peers == 0)


def test_an_engine_at_an_old_address_is_another(slow: FakeClient, ending: ExitStack) -> None:
    """The port of one that ended may be another's now; its key is not."""
    joined = Joined(slow, [])
    ending.callback(joined.close)
    old = announcement(
        model=slow.description, address=joined.server.connection.address, key="0" * 64
    )
    client = FleetEngine(old, GATEWAY)
    ending.callback(client.close)
    wait_for(lambda: client.state.is_gone)
    assert slow.stats().requests_total == joined.server.num_peers == 0


def test_one_thread_for_all(slow: FakeClient, ending: ExitStack) -> None:
    joined = [Joined(slow, []) for _ in range(5)]
    for each in joined:
        ending.callback(each.close)
    clients = [BridgeClient(j.server.connection, keys=GATEWAY) for j in joined]
    streams = [c.submit(ask("a", max_tokens=20)) for c in clients]
    assert all(s.result(30) for s in streams)

    def threads() -> list[threading.Thread]:
        return [t for t in threading.enumerate() if t.name == "llmkit-bridge-client"]

    wait_for(lambda: len(threads()) == 1)  # one of another test may be about to end
    named = threads()
    # One that fails fails alone, and the thread ends with the last one.
    joined[0].server.close("enough")
    wait_for(lambda: clients[0].state.is_gone)
    assert all(c.submit(ask("b")).result(30) for c in clients[1:])
    for client in clients:
        client.close()
    wait_for(lambda: not named[0].is_alive())
