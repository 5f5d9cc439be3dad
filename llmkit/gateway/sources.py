"""Where a gateway finds engines. Tornado loop only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import Connection, find_connections
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient

__all__ = ["ConnectionFiles", "EngineSource"]

# Those are started again, or loaded by the next request.
SENT_AGAIN = "Send the request again in a moment."


class EngineSource(Protocol):
    """Finds engines, by whatever means."""

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        """The engines there are now, newest first: what tells each from the others, and how to
        reach it. Does not block. Raises `OSError` when it cannot tell."""
        ...


class ConnectionFiles:
    """This user's engines on this host, by their connection files: those that ``accept`` lets in
    (this server's kernels, say). Runs no code in a kernel."""

    def __init__(self, accept: Callable[[Origin], bool] = lambda _: True) -> None:
        self._accept = accept

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        return {c: _reach(c) for c in find_connections() if self._accept(c.origin)}


class Pids(Protocol):
    """Gives process ids of workers: those that are replicas, or those that are none."""

    def __call__(self, *, replicated: bool) -> frozenset[int]: ...


class WorkerFiles:
    """The engines of this gateway's own workers, found in one look at the connection files."""

    def __init__(self, pids: Pids) -> None:
        self._pids = pids
        self._replicas: frozenset[int] = frozenset()

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        self._replicas = self._pids(replicated=True)
        own = self._replicas | self._pids(replicated=False)
        return {c: _reach(c, SENT_AGAIN) for c in find_connections() if c.pid in own}

    def is_replica(self, key: Hashable) -> bool:
        """Whether what `find` has under this key is one of several."""
        return isinstance(key, Connection) and key.pid in self._replicas


def _reach(connection: Connection, again: str = "Load it again.") -> Callable[[], EngineClient]:
    return lambda: BridgeClient(connection, weighs=True, again=again)
