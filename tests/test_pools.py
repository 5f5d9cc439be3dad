"""Which engines are replicas of each other, and where a gateway finds them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeClient, wait_for
from fleet_parts import Joined
from mortal import Mortal

from llmkit.bridge.connection import Connection, make_connection
from llmkit.cluster.announcing import model_hash
from llmkit.cluster.fleet import Fleet
from llmkit.cluster.pool import ReplicaPool
from llmkit.errors import EngineGoneError
from llmkit.gateway import sources
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.pools import Pooled
from llmkit.gateway.sources import WorkerFiles
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
    plain = model_hash(file, {"n_slots": 4, "kv_type": "f16", "deterministic": None})
    assert plain == model_hash(file, {}) != model_hash(file, {"deterministic": True})
    client = FakeClient()
    ending.callback(client.close)
    for digest in (plain, plain, model_hash(file, {"kv_type": "q8_0"})):
        joined = Joined(client, [fleet.address], model_hash=digest)
        ending.callback(joined.close)
    wait_for(lambda: len(fleet.find()) == 3)
    found = pools(Pooled([fleet]))
    assert sorted(len(pool.members) for pool in found) == [1, 2]
    for pool in found:
        pool.close()


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
