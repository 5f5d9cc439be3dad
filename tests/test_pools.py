"""Which engines are replicas of each other, and where a gateway finds them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClient, ask, wait_for
from fleet_parts import ENGINE, Joined, said_to
from mortal import Mortal

from llmkit.bridge import curve, line
from llmkit.bridge.connection import Connection, make_connection
from llmkit.cluster.announcing import announcement, model_hash
from llmkit.cluster.fleet import Fleet
from llmkit.cluster.pool import ReplicaPool
from llmkit.errors import EngineGoneError
from llmkit.gateway import sources
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.pools import Pooled
from llmkit.gateway.sources import WorkerFiles
from llmkit.protocol import EngineState, Inquiry, ListSlots, ModelDescription, Tokenize
from llmkit.protocol.client import EngineClient

pytest_plugins = ["fleet_fixtures"]


class Given:
    """A source of what a test puts there."""

    def __init__(self, ending: ExitStack) -> None:
        self.there: dict[Hashable, EngineClient] = {}
        self._ending = ending

    def put(self, key: str, **description: Any) -> Mortal:
        made = Mortal(key)
        self._ending.callback(FakeClient.close, made)
        made.description = replace(made.description, **description)
        self.there[key] = made
        return made

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        return {key: (lambda client=client: client) for key, client in self.there.items()}  # type: ignore[misc]


def pools(pooled: Pooled) -> list[ReplicaPool]:
    found = [reach() for reach in pooled.find().values()]
    assert all(isinstance(each, ReplicaPool) for each in found)
    return found  # type: ignore[return-value]


def test_only_what_answers_the_same_is_pooled(ending: ExitStack) -> None:
    given = Given(ending)
    pooled = Pooled([given])
    for i, adapters in enumerate(
        [
            (("/here/law.gguf", 1.0),),
            (("/there/law.gguf", 1.0),),
            (("/here/law.gguf", 0.5),),
            (("/here/poetry.gguf", 1.0),),
        ]
    ):
        given.put(f"e{i}", adapters=adapters)
    given.put("other", n_ctx=77)
    found = pools(pooled)
    assert sorted(len(pool.members) for pool in found) == [1, 1, 1, 2]
    [two] = [pool for pool in found if len(pool.members) == 2]
    assert {m.client.origin.host for m in two.members} == {"e0", "e1"}
    for pool in found:
        pool.close()


def test_engines_of_other_weights_or_options_are_not_pooled(
    ending: ExitStack, fleet: Fleet, tmp_path: Path
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF one")
    model = ModelDescription("m", str(file))
    plain = model_hash(model, {"n_slots": 4, "kv_type": "f16", "deterministic": None})
    assert plain == model_hash(model, {}) != model_hash(model, {"deterministic": True})
    client = FakeClient()
    ending.callback(client.close)
    for digest in (plain, plain, model_hash(model, {"kv_type": "q8_0"})):
        joined = Joined(client, [fleet.address], model_hash=digest)
        ending.callback(joined.close)
    wait_for(lambda: len(fleet.find()) == 3)
    found = pools(Pooled([fleet]))
    assert sorted(len(pool.members) for pool in found) == [1, 2]
    for pool in found:
        pool.close()


def test_an_upgrade_takes_requests_once_most_slots_are_new(ending: ExitStack) -> None:
    given = Given(ending)
    given.put("another", name="another")
    new = [given.put("n0", n_ctx=700)]
    old = [given.put(f"o{i}") for i in range(2)]
    directory = EngineDirectory([Pooled([given])])
    ending.callback(directory.close)

    def serves() -> set[str]:
        directory.look_again()
        pool = directory.lookup("fake")
        assert isinstance(pool, ReplicaPool)
        return {str(m.client.origin.host) for m in pool.members}

    assert serves() == {"o0", "o1"}, "the first of the new ones does not get everything"
    assert directory.lookup("default").description.name == "another", "the newest name"
    old[0].drain()
    assert serves() == {"n0"}, "as many slots, and newer"
    new[0].phase = EngineState("loading", "it has not answered yet")
    assert serves() == {"o0", "o1"}


def test_the_default_is_no_engine_that_has_not_answered_yet(ending: ExitStack) -> None:
    given = Given(ending)
    newest = given.put("n0", name="newest")
    given.put("e0")
    newest.phase = EngineState("loading", "it has not answered yet")
    directory = EngineDirectory([Pooled([given])])
    ending.callback(directory.close)
    assert directory.lookup("default").description.name == "fake"
    assert directory.lookup("newest").state.phase == "loading", "but it is known"
    newest.phase = EngineState()
    directory.look_again()
    assert directory.lookup("default").description.name == "newest"


def test_an_engine_that_announces_itself_and_does_not_answer_gets_nothing(
    ending: ExitStack, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in ((curve, "HANDSHAKE_MS"), (line, "WELCOME_S")):
        monkeypatch.setattr(module, name, 60_000)
    silent = ending.enter_context(socket.create_server(("127.0.0.1", 0)))
    client = FakeClient()
    ending.callback(client.close)
    address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
    said = announcement(model=client.description, address=address)
    assert said_to(fleet.address, ENGINE, said)
    pooled = Pooled([fleet])
    [pool] = pools(pooled)
    ending.callback(pool.close)
    assert pool.state.phase == "loading" and pool.num_ready_slots == 0
    for ask_it in (
        lambda: pool.submit(ask("a")),
        lambda: pool.inquire(Inquiry("q", Tokenize("a"))),
    ):
        with pytest.raises(EngineGoneError):
            ask_it()
    joined = Joined(client, [fleet.address])
    ending.callback(joined.close)
    wait_for(lambda: len(fleet.find()) == 2)
    pooled.find()
    wait_for(lambda: pool.state.phase == "ready")
    for i in range(20):
        assert pool.submit(ask(f"{i}", max_tokens=2)).result(30)
    assert pool.inquire(Inquiry("q", ListSlots())).result(30) == ()
    assert sorted(m.client.state.phase for m in pool.members) == ["loading", "ready"]


async def test_an_engine_is_connected_to_before_anybody_asks_for_it(
    ending: ExitStack, fleet: Fleet
) -> None:
    pooled = Pooled([fleet])
    assert pools(pooled) == []  # as a gateway looks when it starts
    client = FakeClient()
    ending.callback(client.close)
    ending.callback(Joined(client, [fleet.address]).close)
    while not pooled._pools:
        await asyncio.sleep(0.01)
    [pool] = pooled._pools.values()
    ending.callback(pool.close)
    await asyncio.to_thread(wait_for, lambda: pool.state.phase == "ready")


def test_adapters_projectors_and_all_parts_of_a_model_tell_engines_apart(tmp_path: Path) -> None:
    def written(name: str, text: str = "") -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"GGUF {text or name}")
        return str(file)

    def hashed(path: str, *adapters: tuple[str, float], **options: str) -> str:
        inputs = ("image",) if options else ()
        model = ModelDescription("m", path, adapters=adapters, inputs=inputs)
        return model_hash(model, options)

    alone = written("alone/m.gguf", "m")
    law, again, other = (
        written(f"{folder}/law.gguf", text)
        for folder, text in (("here", "law"), ("there", "law"), ("elsewhere", "laws of old"))
    )
    eyes, better = written("eyes.gguf"), written("better.gguf")
    distinct = [
        hashed(alone),
        hashed(alone, (law, 1.0)),
        hashed(alone, (law, 0.5)),
        hashed(alone, (other, 1.0)),
        hashed(alone, (law, 1.0), (eyes, 1.0)),
        hashed(alone, (eyes, 1.0), (law, 1.0)),
        hashed(alone, projector=eyes),
        hashed(alone, projector=better),
    ]
    assert len(set(distinct)) == len(distinct) and all(distinct)
    assert hashed(alone, (again, 1.0)) == hashed(alone, (law, 1.0)), "wherever it lies"
    assert hashed(alone, projector="none") == hashed(alone)
    assert hashed(alone, (str(tmp_path / "none"), 1.0)) == ""
    written("alone/mmproj-m.gguf")
    seen = ModelDescription("m", alone, inputs=("image",))
    assert model_hash(seen, {}) not in ("", hashed(alone)), "that beside it"
    first, second = (written(f"split/s-0000{i}-of-00002.gguf") for i in (1, 2))
    whole = hashed(first)
    written("split/s-00002-of-00002.gguf", "finetuned")
    assert whole and second and hashed(first) not in ("", whole)


def test_what_nobody_waits_for_is_forgotten(ending: ExitStack) -> None:
    given = Given(ending)
    pooled = Pooled([given])
    only = given.put("e0")
    [pool] = pools(pooled)
    assert pool.state.phase == "ready" and len(pooled._quarantines) == 1
    only.end()
    given.there.clear()
    assert pools(pooled) == []
    assert "e0 has ended" in str(pool.state.reason), "not that its connection was closed"
    assert not pooled._pools and not pooled._quarantines and not pooled._clients


def test_the_files_of_workers_are_read_once(
    ending: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans, asked = [], []
    fakes = [FakeClient(name) for name in ("alone", "many", "foreign")]
    files = {
        replace(make_connection(f.description, None, 1.0, tcp=True), pid=i): f
        for i, f in enumerate(fakes)
    }
    for fake in fakes:
        ending.callback(fake.close)

    def scan() -> list[Any]:
        scans.append(1)
        return list(files)

    def pids(*, replicated: bool) -> frozenset[int]:
        asked.append(replicated)
        return frozenset({1} if replicated else {0})

    monkeypatch.setattr(sources, "find_connections", scan)

    def reach(connection: Connection, again: str) -> Callable[[], Any]:
        assert "Send the request again" in again, "callers of a server cannot load its models"
        return lambda: files[connection]

    monkeypatch.setattr(sources, "_reach", reach)
    found = WorkerFiles(pids)
    pool, alone = (reach() for reach in Pooled([found], pools=found.is_replica).find().values())
    assert scans == [1] and sorted(asked) == [False, True]
    assert alone is fakes[0] and isinstance(pool, ReplicaPool)
    assert [m.client for m in pool.members] == [fakes[1]]
    pool.close()


def test_each_source_says_what_is_absent() -> None:
    class Nothing:
        def find(self) -> dict[Hashable, Callable[[], EngineClient]]:
            return {}

    directory = EngineDirectory([Nothing()], absent={"here": "It is loaded here."}.get)
    directory.add(Nothing(), {"there": "It is loaded elsewhere.", "here": "no"}.get)
    for name, why in (("here", "loaded here"), ("there", "loaded elsewhere")):
        with pytest.raises(EngineGoneError, match=why):
            directory.lookup(name)
