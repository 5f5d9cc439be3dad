"""Model names to running engines. Tornado loop only; found by connection files, so no code runs in a kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import Connection, find_connections
from llmkit.client import EngineClient
from llmkit.errors import EngineGoneError, ModelNotFoundError

__all__ = ["DEFAULT", "EngineDirectory", "Entry"]

DEFAULT = "default"
Use = Literal["generate", "embed"]
REFRESH_S = 0.25
MAX_GONE = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """A model as it is listed: the newest engine of a name has the plain name, others ``name@kernel``."""

    model_id: str
    client: BridgeClient


class EngineDirectory:
    """All engines that ``accept`` lets in (this server's kernels, say), newest first.

    ``default`` is the model behind the name "default"; None means the newest. ``loading`` gives a reason while a model is on its way.
    """

    def __init__(
        self,
        accept: Callable[[Connection], bool] = lambda _: True,
        *,
        default: str | None = None,
        loading: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._accept = accept
        self._default = default
        self._loading = loading
        self._clients: dict[Connection, BridgeClient] = {}
        self._gone: dict[str, str] = {}
        self._refreshed = 0.0

    def entries(self) -> list[Entry]:
        self._refresh()
        seen: set[str] = set()
        found = []
        for client, exact in zip(self._clients.values(), _exact_names(list(self._clients.values())), strict=True):
            name = client.description.name
            found.append(Entry(exact if name in seen else name, client))
            seen.add(name)
        return found

    @property
    def gone(self) -> dict[str, str]:
        """Models that were here, and why they are not: names and reasons."""
        self._refresh()
        return dict(self._gone)

    def lookup(self, model: str, use: Use | None = None) -> EngineClient:
        """The engine for a model name: plain (the newest wins), ``name@kernel`` (exact), or "default": the newest that can do what it is for.

        Raises `ModelNotFoundError` for a name never seen, `EngineGoneError` when nothing is loaded, or the engine was there and is gone.
        """
        found = self._find(model, use)
        if found is None:
            self._refreshed = 0.0  # a model loaded a moment ago must be found
            found = self._find(model, use)
        if found is not None:
            return found
        loading = self._loading()
        if loading:
            raise EngineGoneError(loading)
        if model in self._gone:
            raise EngineGoneError(self._gone[model])
        if model == DEFAULT or not self._clients:
            if model != DEFAULT and self._gone:
                raise ModelNotFoundError(f"There is no model {model!r} here.")
            if use is not None and self._clients:
                raise ModelNotFoundError(
                    f"No loaded model can {use}. " + ('Load one: llmkit.load("minilm").' if use == "embed" else "Load one: llmkit.load(...).")
                )
            reason = next(reversed(self._gone.values()), None) if model == DEFAULT else None
            raise EngineGoneError(reason or "No model is loaded. Load one in a notebook: llm = llmkit.load(...)")
        names = ", ".join(repr(e.model_id) for e in self.entries()[:20])
        raise ModelNotFoundError(f"There is no model {model!r} here. Loaded: {names}.")

    def _find(self, model: str, use: Use | None) -> BridgeClient | None:
        self._refresh()
        wanted = self._default or DEFAULT if model == DEFAULT else model
        clients = list(self._clients.values())
        for client, exact in zip(clients, _exact_names(clients), strict=True):
            name = client.description.name
            embeds = bool(client.description.embedding_size or client.description.ranks)
            if wanted == DEFAULT and use is not None and embeds != (use == "embed"):
                continue
            if wanted in (DEFAULT, name, exact):
                return client
        return None

    def _refresh(self) -> None:
        now = time.monotonic()
        stale = any(c.gone is not None for c in self._clients.values())
        if now - self._refreshed < REFRESH_S and not stale:
            return
        self._refreshed = now
        try:
            found = [c for c in find_connections() if self._accept(c)]
        except OSError:  # no descriptor is free: that says nothing of the engines
            found = list(self._clients)
        for connection, client in list(self._clients.items()):
            if client.gone is not None or connection not in found:
                self._remember(client, client.gone)
                client.close()
                del self._clients[connection]
                found = [c for c in found if c != connection]
        self._clients = {c: self._clients.get(c) or BridgeClient(c) for c in found}
        for client in self._clients.values():
            for name in _names(client):
                self._gone.pop(name, None)

    def _remember(self, client: BridgeClient, reason: str | None) -> None:
        name = client.description.name
        for key in _names(client):
            self._gone[key] = reason or f"the process that held the model {name!r} has ended or let it go. Load the model again."
        while len(self._gone) > MAX_GONE:
            self._gone.pop(next(iter(self._gone)))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()


def _exact_names(clients: list[BridgeClient]) -> list[str]:
    """``name@kernel`` of each (newest first); of several of one name in one kernel the older ones are counted, from the first."""
    names = [_names(client)[1] for client in clients]
    return [name if name not in names[:i] else f"{name}-{names[i:].count(name)}" for i, name in enumerate(names)]


def _names(client: BridgeClient) -> tuple[str, str]:
    name = client.description.name
    return name, f"{name}@{client.connection.kernel_name}"
