"""The page of people: chat and status as its two tabs, and its files. Tornado loop only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.ops.status import StatusRoutes
from llmkit.gateway.web import View, page
from llmkit.gateway.web.assets import asset

__all__ = ["PAGES", "Locked", "PageRoutes", "Visitors"]

PAGES = ("/", "/chat", "/usage")
YEAR_S = 31_536_000


class PageRoutes:
    """The page at the gateway's root, whose tab in front is ``home``, and at ``/chat``.

    With ``has_usage`` it leads to `/usage`.
    """

    def __init__(
        self, status: StatusRoutes, home: View = "chat", *, has_usage: bool = False
    ) -> None:
        self._status, self._home, self._has_usage = status, home, has_usage

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/", self.root, "Chat, models and requests, as a page"),
            Route("GET", "/chat", self.chat, "Chat, as a page"),
            Route("GET", "/assets/{name+}", self.asset, "Scripts and styles of the page"),
        ]

    async def root(self, exchange: Exchange) -> None:
        # Without JavaScript it shows the state at least.
        state = await self._status.state(exchange) if self._home == "status" else None
        self._send(exchange, page(self._home, self._home, state=state, **self._facts(exchange)))

    async def chat(self, exchange: Exchange) -> None:
        self._send(exchange, page("chat", self._home, **self._facts(exchange)))

    @staticmethod
    def _send(exchange: Exchange, text: str) -> None:
        # Other pages of this origin could read a proof in a browser's cache.
        kept = "no-store" if exchange.proof else "no-cache"
        exchange.send_page(text, headers={"Cache-Control": kept}, has_assets=True)

    def _facts(self, exchange: Exchange) -> dict[str, Any]:
        return {
            "base": _base(exchange),
            "has_usage": self._has_usage,
            "has_login": exchange.has_login,
            "proof": exchange.proof,
        }

    async def asset(self, exchange: Exchange) -> None:
        found = asset(exchange.args[0])
        if found is None:
            raise ApiError(404, "The page has no such file.", code="not_found")
        age = f"max-age={YEAR_S}, immutable" if found.is_current else "no-cache"
        headers = {"ETag": found.etag, "Cache-Control": f"private, {age}"}
        if found.etag in (exchange.header("If-None-Match") or ""):
            exchange.send_bytes(b"", 304, headers, found.content_type)
            return
        exchange.send_bytes(found.data, 200, headers, found.content_type)


class Visitors(Protocol):
    """Browsers that ask for a page, once it is known whether somebody is logged in."""

    def welcome(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        """Somebody is, and gets the page."""
        ...

    def turn_away(self, exchange: Exchange) -> None:
        """Nobody is: answer in the page's place."""
        ...


class Locked:
    """Who has no key gets a page that asks for it, and then goes on with it."""

    def welcome(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        """There is nothing to add."""

    def turn_away(self, exchange: Exchange) -> None:
        """A 401."""
        headers = {"WWW-Authenticate": "Bearer", "Cache-Control": "no-cache"}
        text = page("chat", "chat", base=_base(exchange), locked=True)
        exchange.send_page(text, 401, headers, has_assets=True)


def _base(exchange: Exchange) -> str:
    """The way from the page's address to the gateway's root."""
    if exchange.path == "/":
        return "" if exchange.path_ends_with_slash else "llmkit/"
    return "../" if exchange.path_ends_with_slash else ""
