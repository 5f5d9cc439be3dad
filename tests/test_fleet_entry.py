"""Who gets into a fleet, and what may be announced there."""

from __future__ import annotations

import itertools
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import zmq
from fakes import FakeClient, ask, wait_for
from fleet_parts import ENGINE, GATEWAY, KEY, Joined, said_to, speak

from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.curve import CurveKeys
from llmkit.cluster import announcements as words
from llmkit.cluster import announcing
from llmkit.cluster.announcements import Place
from llmkit.cluster.announcing import Announcer, announcement
from llmkit.cluster.fleet import Fleet
from llmkit.cluster.fleet_key import engine_keys, make_key, read_key
from llmkit.errors import EngineGoneError, InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.protocol import ModelDescription

STRANGE = CurveKeys(*zmq.curve_keypair(), other=GATEWAY.public)


pytest_plugins = ["fleet_fixtures"]


@pytest.mark.parametrize("keys", [None, STRANGE, CurveKeys(*zmq.curve_keypair(), STRANGE.public)])
def test_without_the_key_nothing_is_announced_or_submitted(
    keys: CurveKeys | None, slow: FakeClient, fleet: Fleet, ending: ExitStack
) -> None:
    """No CURVE at all; the right server's key and an unknown one of its own; a wrong server's."""
    joined = Joined(slow, [])
    ending.callback(joined.close)
    connection = joined.server.connection
    announced = announcement(model=slow.description, address=connection.address, key=connection.key)
    assert said_to(fleet.address, keys, announced, 0.5) == []
    hello = wire.encode(wire.Hello(connection.key, version=wire.VERSION, weighs=True))
    about, body = wire.encode(wire.About("x")), wire.encode_request(ask("x"))
    to_engine = keys and CurveKeys(
        keys.public, keys.secret, GATEWAY.other if keys is STRANGE else keys.other
    )
    messages = [[wire.HELLO, hello], [wire.SUBMIT, body, about]]
    assert speak(connection.address, to_engine, *messages, wait_s=0.5) == []
    assert not fleet.find() and joined.server.num_peers == slow.stats().requests_total == 0
    # An engine's key opens gateways and no engines, a gateway's the other way round.
    assert said_to(fleet.address, CurveKeys(GATEWAY.public, GATEWAY.secret, GATEWAY.public),
                   announced, 0.5) == []  # fmt: skip
    assert said_to(fleet.address, ENGINE, announced) == [[words.HEARD, b""]]


def test_a_client_with_a_wrong_key_is_told(slow: FakeClient, ending: ExitStack) -> None:
    joined = Joined(slow, [])
    ending.callback(joined.close)
    stranger = BridgeClient(
        joined.server.connection, keys=CurveKeys(STRANGE.public, STRANGE.secret, ENGINE.public)
    )
    with pytest.raises(EngineGoneError, match="does not know our fleet key"):
        stranger.submit(ask("a")).result(30)
    stranger.close()


def test_garbage_and_too_much_are_dropped(
    slow: FakeClient, fleet: Fleet, ending: ExitStack
) -> None:
    good = announcement(model=slow.description, address="tcp://127.0.0.1:9", key="k")
    plain = msgspec.to_builtins(good)

    def changed(**facts: object) -> bytes:
        return msgspec.msgpack.encode({**plain, **facts})

    model = plain["model"]
    for body in (
        b"",
        b"\xff" * 100,
        msgspec.msgpack.encode([1, 2]),
        changed(instance="x" * 300),
        changed(instance=""),
        changed(phase="dancing"),
        changed(address="ipc:///run/engine.sock"),
        changed(address="tcp://0.0.0.0:7"),
        changed(address="tcp://host"),
        changed(model={**model, "name": ""}),
        changed(model={**model, "name": "a\nb"}),
        changed(model={**model, "name": "n" * 2000}),
        changed(stats={"num_running": "many"}),
    ):
        ((kind, reason),) = speak(fleet.address, ENGINE, [words.ANNOUNCE, body])
        assert kind == words.REFUSED and words.unpack_refused(reason).reason
    for frames in ([b"x"], [b"x", b"y"], [b"", b"", b""]):
        ((kind, _),) = speak(fleet.address, ENGINE, frames)
        assert kind == words.REFUSED
    huge = changed(model={**model, "path": "p" * words.MAX_BYTES})
    assert speak(fleet.address, ENGINE, [words.ANNOUNCE, huge], wait_s=0.5) == []
    ((kind, reason),) = speak(fleet.address, ENGINE, [words.ANNOUNCE, changed(version=1)])
    assert kind == words.REFUSED and "cannot talk to" in words.unpack_refused(reason).reason
    assert not fleet.find()
    assert speak(fleet.address, ENGINE, [words.ANNOUNCE, changed(colour="blue")]) == [
        [words.HEARD, b""]
    ]
    assert fleet.find()


def test_so_many_engines_and_no_more(ending: ExitStack) -> None:
    now = [100.0]
    fleet = Fleet("tcp://127.0.0.1:0", GATEWAY, clock=lambda: now[0], max_engines=2)
    ending.callback(fleet.close)

    def one(name: str) -> bytes:
        return words.pack(
            announcement(
                model=ModelDescription(name, ""), address="tcp://127.0.0.1:9", instance=name
            )
        )

    answers = speak(fleet.address, ENGINE, *([words.ANNOUNCE, one(name)] for name in "abcab"))
    assert [kind for kind, _ in answers] == [words.HEARD] * 2 + [words.REFUSED] + [words.HEARD] * 2
    now[0] += words.TTL_S + 0.1
    assert speak(fleet.address, ENGINE, [words.ANNOUNCE, one("c")])[0][0] == words.HEARD
    assert list(fleet.find()) == [("c", 0)]
    left = words.pack(words.Leave("c"))
    assert speak(fleet.address, ENGINE, [words.LEAVE, left]) == [[words.HEARD, b""]]
    assert not fleet.find()


def test_a_model_that_is_loading(fleet: Fleet) -> None:
    said = announcement(model=ModelDescription("large", ""), phase="loading", host="gpu-7")
    assert said_to(fleet.address, ENGINE, said) == [[words.HEARD, b""]]
    directory = EngineDirectory([fleet], absent=fleet.absent)
    with pytest.raises(EngineGoneError, match="'large' is being loaded") as refused:
        directory.lookup("large")
    assert "gpu-7" not in str(refused.value), "hosts are not for whoever asks"


def test_the_key_file(tmp_path: Path) -> None:
    file = tmp_path / "fleet.key"
    with pytest.raises(InvalidRequestError, match=r"cannot be read.*llmkit keys fleet"):
        read_key(file)
    make_key(file)
    assert file.stat().st_mode & 0o777 == 0o600
    key = read_key(file)
    assert len(key) == 64 and engine_keys(key) == engine_keys(key) != engine_keys(KEY)
    assert engine_keys(key).public not in (key, engine_keys(key).other)
    with pytest.raises(FileExistsError):
        make_key(file)
    for mode in (0o640, 0o604, 0o602, 0o620):
        file.chmod(mode)
        with pytest.raises(InvalidRequestError, match=f"chmod 600 {file}"):
            read_key(file)
    file.chmod(0o600)
    for text in ("", "short", "x" * 5000):
        file.write_text(text)
        with pytest.raises(InvalidRequestError, match="32 to 4096 are wanted"):
            read_key(file)
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_key(tmp_path)
    if os.geteuid() == 0:  # as Kubernetes mounts secrets: of another owner, for our group
        file.write_text("k" * 40)
        os.chown(file, 12345, 0)
        file.chmod(0o440)
        assert read_key(file) == b"k" * 40
        file.chmod(0o444)
        with pytest.raises(InvalidRequestError, match="not secret"):
            read_key(file)


@pytest.mark.parametrize(
    "address", ["", "node", "http://node:1", "tcp://", "tcp://node:99999", "tcp://a b:1", "tcp://n"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="join takes an address such as"):
        Place.read(address, "join", port=True)


def test_addresses() -> None:
    def read(text: str) -> Place:
        return Place.read(text, "listen")

    assert read("tcp://[::1]:7").is_loopback and read("tcp://localhost:7").is_loopback
    assert read("tcp://0.0.0.0:7").is_wild and read("tcp://*").address == "tcp://*:*"
    assert not read("tcp://10.0.0.5").is_loopback and read("tcp://a-b.c:7").host == "a-b.c"


def test_a_gateway_that_does_not_answer_is_said_once(
    monkeypatch: pytest.MonkeyPatch, ending: ExitStack
) -> None:
    said: list[str] = []
    monkeypatch.setattr(announcing, "report", said.append)
    monkeypatch.setattr(announcing, "MISSED_S", 0.3)
    monkeypatch.setattr(words, "EVERY_S", 0.1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = Place("127.0.0.1", probe.getsockname()[1])

    def tell() -> words.Announcement:
        return announcement(model=ModelDescription("m", ""), address="tcp://127.0.0.1:9")

    announcer = Announcer([place], ENGINE, tell)
    ending.callback(announcer.close)
    wait_for(lambda: said)
    time.sleep(1)
    trying = f"the gateway at {place.address} does not answer; trying again"
    hears = f"the gateway at {place.address} hears this engine"
    assert said == [trying]
    fleet = Fleet(place.address, GATEWAY)
    wait_for(fleet.find)
    wait_for(lambda: said[-1] == hears)
    fleet.close()  # it is started again, and the engine stays
    wait_for(lambda: said[-1] == trying)
    fleet = Fleet(place.address, GATEWAY)
    ending.callback(fleet.close)
    wait_for(fleet.find)
    wait_for(lambda: said[-1] == hears)
    assert all(line != next_line for line, next_line in itertools.pairwise(said))
    stranger = Announcer([place], STRANGE, tell)
    ending.callback(stranger.close)
    unknown = f"the gateway at {place.address} does not know our fleet key, or is no gateway"
    wait_for(lambda: unknown in said)
    time.sleep(1)
    assert said.count(unknown) == 1
