"""A gateway in front of an echo: any name is its name, and every answer says so. Tornado loop only.

For people who develop clients: `llmkit serve echo`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping

from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway.access.permission import may_use
from llmkit.gateway.directory import EngineDirectory, Entry, Use
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.pipeline import Observer
from llmkit.protocol.client import EngineClient

__all__ = ["ECHO_HEADER", "EchoDirectory", "saying_so"]

ECHO_HEADER = "x-llmkit-echo"


class EchoDirectory(EngineDirectory):
    """One engine for every name that the caller may use."""

    def __init__(self, engine: EngineClient) -> None:
        super().__init__([_Only(engine)])
        self._engine = engine

    def close(self) -> None:
        super().close()
        self._engine.close()

    def entries(self) -> list[Entry]:
        return [Entry(self._engine.description.name, self._engine)]

    def lookup(self, model: str, use: Use | None = None) -> EngineClient:
        if not (may_use(model) or may_use(self._engine.description.name)):
            raise ModelNotFoundError(f"There is no model {model!r:.200} here.")
        if self._engine.state.is_gone:
            raise EngineGoneError(self._engine.state.reason or "the echo has ended.")
        return self._engine


class _Only:
    """An `EngineSource` of one engine."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        return {"echo": lambda: self._engine}


def saying_so() -> Observer:
    """Marks every answer as an echo's."""

    @contextlib.contextmanager
    def observe(exchange: Exchange) -> Iterator[None]:
        exchange.set_header(ECHO_HEADER, "true")
        yield

    return observe
