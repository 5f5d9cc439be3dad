"""Where a gateway finds engines. Tornado loop only."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Protocol

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import Connection, find_connections
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient

__all__ = ["ConnectionFiles", "EngineSource"]


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


def _reach(connection: Connection) -> Callable[[], EngineClient]:
    return lambda: BridgeClient(connection, weighs=True)
