"""What stands between every dialect and the engines: guards, the queue's bound, stored answers.

`llmkit.gateway.streams` and `llmkit.gateway.vectors` ask ``current()``, which follows a request's
task, so that no dialect knows of it. Tornado loop only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from llmkit.gateway.access.overload import Overload
from llmkit.gateway.flights import computation
from llmkit.gateway.guards import Guards
from llmkit.gateway.response_cache import ResponseCache
from llmkit.protocol import EmbeddingRequest, Embeddings, GenerationRequest
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange

__all__ = ["Rules", "Visit", "current", "submitted"]


class Rules:
    """The rules of one gateway, each optional; ``guards`` may be replaced at any time."""

    def __init__(
        self,
        guards: Guards | None = None,
        overload: Overload | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        self.guards = guards or Guards()
        self.overload, self.cache = overload, cache

    @contextlib.contextmanager
    def stage(self, exchange: Exchange) -> Iterator[None]:
        """A stage within which requests to engines follow the rules."""
        token = _current.set(Visit(self, exchange))
        try:
            yield
        finally:
            _current.reset(token)


class Visit:
    """One exchange under the rules."""

    def __init__(self, rules: Rules, exchange: Exchange) -> None:
        self._rules, self._exchange = rules, exchange
        wishes = (exchange.header("Cache-Control") or "").lower()
        self._fresh, self._bypass = "no-cache" in wishes, "no-store" in wishes

    def checked(
        self, engine: EngineClient, requests: list[GenerationRequest]
    ) -> list[GenerationRequest]:
        """The requests within the guards' limits. Raises what they raise."""
        exchange = self._exchange
        name = engine.description.name
        checked, clamped = self._rules.guards.apply(name, requests, exchange.given)
        if clamped is not None:
            exchange.set_header("x-llmkit-clamped", f"max_tokens={clamped}")
        return checked

    def submit(self, engine: EngineClient, requests: list[GenerationRequest]) -> list[Stream]:
        """The streams of all requests, from the cache where it has them, or none.

        Raises `ApiError` when the server is busy, and what the engine raises.
        """
        cache, fresh = self._cache, self._fresh
        keys = [cache.key_of(engine, r) if cache is not None else None for r in requests]
        known = [
            cache is not None and key is not None and not fresh and cache.has(key, request)
            for key, request in zip(keys, requests, strict=True)
        ]
        new = (r.n for r, is_known in zip(requests, known, strict=True) if not is_known)
        self._admit(engine, sum(new))
        streams: list[Stream] = []
        hits = []
        try:
            for request, key in zip(requests, keys, strict=True):
                if cache is None or key is None:
                    streams += submitted(engine, request)
                    continue
                more, is_hit = cache.streams(key, engine, request, fresh=fresh)
                streams += more
                hits.append(is_hit)
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        self._submitted(streams)
        self._say_cache(hits, len(requests))
        return streams

    def embed(self, engine: EngineClient, request: EmbeddingRequest) -> Future[Embeddings]:
        """The vectors of a request, from the cache if it has them. Raises as ``submit`` does.

        Cancelling the future is enough to end a request that nobody else waits for.
        """
        exchange, cache = self._exchange, self._cache
        request = replace(request, weight=exchange.identity.allowance.weight)
        self._rules.guards.check_texts(request)
        key = cache.key_of(engine, request) if cache is not None else None
        if cache is None or key is None:
            self._admit(engine, 1)
            future = engine.embed(request)
        else:
            is_known = not self._fresh and cache.has(key, request)
            self._admit(engine, 0 if is_known else 1)
            future, is_hit = cache.embed(key, engine, request, fresh=self._fresh)
            self._say_cache([is_hit], 1)
        self._submitted([future])
        return future

    @property
    def _cache(self) -> ResponseCache | None:
        return None if self._bypass else self._rules.cache

    def _admit(self, engine: EngineClient, count: int) -> None:
        if self._rules.overload is not None:
            self._rules.overload.admit(self._exchange, engine, count)

    def _submitted(self, answers: Iterable[Stream | Future[Embeddings]]) -> None:
        if self._rules.overload is not None:
            works = [computation(answer) for answer in answers]
            self._rules.overload.submitted(self._exchange, works)

    def _say_cache(self, hits: list[bool], num_requests: int) -> None:
        """A hit is an answer for which nothing was computed."""
        if hits:
            said: Literal["hit", "miss"] = (
                "hit" if all(hits) and len(hits) == num_requests else "miss"
            )
            self._exchange.record.cache = said
            self._exchange.set_header("x-llmkit-cache", said)


def submitted(engine: EngineClient, request: GenerationRequest) -> list[Stream]:
    """The streams of all choices of a request."""
    return [engine.submit(request)] if request.n == 1 else engine.submit_choices(request)


_current: ContextVar[Visit | None] = ContextVar("visit", default=None)


def current() -> Visit | None:
    """The rules for this task's request; None outside a gateway."""
    return _current.get()
