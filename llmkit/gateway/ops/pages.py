"""The page of people: chat and status as its two tabs, and its files. Tornado loop only."""

from __future__ import annotations

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Route
from llmkit.gateway.ops.status import StatusRoutes
from llmkit.gateway.web import View, page
from llmkit.gateway.web.assets import asset

__all__ = ["PAGES", "PageRoutes", "send_locked_page"]

PAGES = ("/", "/chat")
YEAR_S = 31_536_000


class PageRoutes:
    """The page at the gateway's root, whose tab in front is ``home``, and at ``/chat``."""

    def __init__(self, status: StatusRoutes, home: View = "chat") -> None:
        self._status, self._home = status, home

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/", self.root, "Chat, models and requests, as a page"),
            Route("GET", "/chat", self.chat, "Chat, as a page"),
            Route("GET", "/assets/{name+}", self.asset, "Scripts and styles of the page"),
        ]

    async def root(self, exchange: Exchange) -> None:
        # Without JavaScript it shows the state at least.
        state = await self._status.state(exchange) if self._home == "status" else None
        text = page(self._home, self._home, base=_base(exchange), state=state)
        exchange.send_page(text, headers={"Cache-Control": "no-cache"}, has_assets=True)

    async def chat(self, exchange: Exchange) -> None:
        text = page("chat", self._home, base=_base(exchange))
        exchange.send_page(text, headers={"Cache-Control": "no-cache"}, has_assets=True)

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


def send_locked_page(exchange: Exchange) -> None:
    """A 401 whose page asks for the key, and then goes on with it."""
    headers = {"WWW-Authenticate": "Bearer", "Cache-Control": "no-cache"}
    text = page("chat", "chat", base=_base(exchange), locked=True)
    exchange.send_page(text, 401, headers, has_assets=True)


def _base(exchange: Exchange) -> str:
    """The way from the page's address to the gateway's root."""
    if exchange.path == "/":
        return "" if exchange.path_ends_with_slash else "llmkit/"
    return "../" if exchange.path_ends_with_slash else ""
