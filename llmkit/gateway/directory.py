"""Maps model names to running engines. Tornado loop only."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmkit.errors import EngineGoneError, ModelNotFoundError
from llmkit.gateway.access.permission import may_use
from llmkit.gateway.sources import ConnectionFiles, EngineSource
from llmkit.protocol.client import EngineClient
from llmkit.protocol.description import ModelDescription, Use

__all__ = ["DEFAULT", "EngineDirectory", "Entry", "Use"]

DEFAULT = "default"
REFRESH_S = 0.25
MAX_GONE = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """A listed model. The newest engine of a name has the plain name, others ``name@kernel``."""

    model_id: str
    client: EngineClient


class EngineDirectory:
    """All engines of some sources, those of the first source first.

    ``default`` is the model behind the name "default"; None means the newest. ``names`` gives the
    name of a model for an alias. ``absent`` says why a model that is offered is not here, because
    it is being loaded say, and ``offered`` lists such models; ``finds``: there may be more, that
    nobody has asked for yet. Models that a request's caller may not use are not there for it, see
    `llmkit.gateway.access.permission`.
    """

    def __init__(
        self,
        sources: Sequence[EngineSource] | None = None,
        *,
        default: str | Callable[[], str | None] | None = None,
        names: Callable[[str], str | None] = lambda _: None,
        absent: Callable[[str], str | None] = lambda _: None,
        offered: Callable[[], Sequence[str]] = tuple,
        finds: bool = False,
    ) -> None:
        self._sources: list[EngineSource] = [ConnectionFiles()] if sources is None else [*sources]
        self._default = default if callable(default) else lambda: default
        self._names, self._absent, self._offered = names, absent, offered
        self._finds = finds
        self._known: dict[str, ModelDescription | None] = {}  # of those that are offered
        self._clients: dict[Hashable, EngineClient] = {}
        self._gone: dict[str, str] = {}
        self._refreshed = 0.0

    def add(self, source: EngineSource, absent: Callable[[str], str | None]) -> None:
        """Look there too, after all others; ``absent`` is as at the start."""
        self._sources.append(source)
        first = self._absent
        self._absent = lambda model: first(model) or absent(model)

    def entries(self) -> list[Entry]:
        self._refresh()
        seen: set[str] = set()
        found = []
        for client, exact in zip(
            self._clients.values(), _exact_names(list(self._clients.values())), strict=True
        ):
            name = client.description.name
            if may_use(name):
                found.append(Entry(exact if name in seen else name, client))
            seen.add(name)
        return found

    def clients(self) -> list[EngineClient]:
        """All engines, whoever asks."""
        self._refresh()
        return list(self._clients.values())

    def any_may(self, can: Callable[[ModelDescription], object]) -> bool:
        """Whether a model may be able to do something, whoever asks: one that is here can, or one
        that is offered could when it was last here, or was never here, so that nobody knows."""
        if self._finds:
            return True
        here = [client.description for client in self.clients()]
        newest = {each.name: each for each in reversed(here)}
        self._known = {n: newest.get(n) or self._known.get(n) for n in self._offered()}
        if any(each is None for each in self._known.values()):
            return True
        return any(can(each) for each in (*here, *self._known.values()) if each is not None)

    def engine_of(self, name: str) -> EngineClient | None:
        """The engine that has this very name now. Any thread."""
        clients = list(self._clients.values())
        return next((c for c in clients if c.description.name == name), None)

    def files(self) -> frozenset[Path]:
        """The files of all engines, whoever asks."""
        self._refresh()
        return frozenset(Path(c.description.path).resolve() for c in self._clients.values())

    @property
    def unloaded(self) -> list[str]:
        """Models that are offered but not loaded now."""
        here = {entry.client.description.name for entry in self.entries()}
        return [name for name in self._offered() if name not in here and may_use(name)]

    @property
    def gone(self) -> dict[str, str]:
        """Models that are gone: names and reasons."""
        self._refresh()
        return {name: reason for name, reason in self._gone.items() if may_use(name)}

    def look_again(self) -> None:
        """Look for engines with the next question, however lately that was."""
        self._refreshed = 0.0

    def lookup(self, model: str, use: Use | None = None) -> EngineClient:
        """The engine for a model name.

        That is a plain name (the newest wins), ``name@kernel`` (exact), or "default": the newest
        that is fit for ``use``. Raises `ModelNotFoundError` for an unknown name, `EngineGoneError`
        when nothing is loaded or the engine is gone.
        """
        model = self._names(model) or model
        wanted = self._default() if model == DEFAULT else model
        if wanted is not None and not may_use(wanted):
            raise ModelNotFoundError(f"There is no model {model!r} here.{self._loaded()}")
        found = self._find(model, use)
        if found is None:
            self._refreshed = 0.0  # find a model loaded just now
            found = self._find(model, use)
        if found is not None:
            return found
        reason = self._absent(model)
        if reason:
            raise EngineGoneError(reason)
        gone = self.gone
        if model in gone:
            raise EngineGoneError(gone[model])
        here = self.entries()
        if model == DEFAULT or not here:
            if model != DEFAULT and gone:
                raise ModelNotFoundError(f"There is no model {model!r} here.")
            if use is not None and here:
                raise ModelNotFoundError(
                    f"No loaded model can {use}. "
                    + (
                        'Load one: llmkit.load("minilm").'
                        if use == "embed"
                        else "Load one: llmkit.load(...)."
                    )
                )
            reason = next(reversed(gone.values()), None) if model == DEFAULT else None
            raise EngineGoneError(
                reason or "No model is loaded. Load one in a notebook: llm = llmkit.load(...)"
            )
        raise ModelNotFoundError(f"There is no model {model!r} here.{self._loaded()}")

    def _loaded(self) -> str:
        names = ", ".join(repr(e.model_id) for e in self.entries()[:20])
        return f" Loaded: {names}." if names else ""

    def _find(self, model: str, use: Use | None) -> EngineClient | None:
        self._refresh()
        wanted = self._default() or DEFAULT if model == DEFAULT else model
        clients = list(self._clients.values())
        loading: EngineClient | None = None  # better than none
        for client, exact in zip(clients, _exact_names(clients), strict=True):
            name = client.description.name
            if not may_use(name):
                continue
            if wanted == DEFAULT and use is not None and client.description.use != use:
                continue
            if wanted not in (DEFAULT, name, exact):
                continue
            if client.state.phase != "loading":
                return client
            loading = loading or client
        return loading

    def _refresh(self) -> None:
        now = time.monotonic()
        stale = any(c.state.is_gone for c in self._clients.values())
        if now - self._refreshed < REFRESH_S and not stale:
            return
        self._refreshed = now
        try:
            found = {key: reach for s in self._sources for key, reach in s.find().items()}
        except OSError:  # no descriptor is free, which says nothing about the engines
            return
        for key, client in list(self._clients.items()):
            if client.state.is_gone or key not in found:
                self._remember(client, client.state.reason)
                client.close()
                del self._clients[key]
                found.pop(key, None)
        known = self._clients
        # At once: another thread may look.
        self._clients = {key: known.get(key) or reach() for key, reach in found.items()}
        for client in self._clients.values():
            for name in _names(client):
                self._gone.pop(name, None)

    def _remember(self, client: EngineClient, reason: str | None) -> None:
        name = client.description.name
        for key in _names(client):
            self._gone[key] = (
                reason
                or f"the process with the model {name!r} has ended or unloaded it. "
                "Load the model again."
            )
        while len(self._gone) > MAX_GONE:
            self._gone.pop(next(iter(self._gone)))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()


def _exact_names(clients: list[EngineClient]) -> list[str]:
    """``name@kernel`` of each, newest first; older namesakes in the same kernel are numbered."""
    names = [_names(client)[1] for client in clients]
    return [
        name if name not in names[:i] else f"{name}-{names[i:].count(name)}"
        for i, name in enumerate(names)
    ]


def _names(client: EngineClient) -> tuple[str, str]:
    name = client.description.name
    return name, f"{name}@{client.origin.label}"
