"""The routes of sessions: kept conversations, listed, changed, forked. Tornado loop only.

The routes of turns are in `turn_routes`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import InvalidRequestError
from llmkit.gateway.conversations.objects import message_object, session_object, with_relatives
from llmkit.gateway.conversations.schemas import ChangeBody, ForkBody, ImportBody, SessionBody
from llmkit.gateway.conversations.turns import Turns
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.openapi import Route
from llmkit.store.conversation_records import UNSET, StoredConversation, StoredMessage

if TYPE_CHECKING:
    from llmkit.store.conversations import ConversationStore

__all__ = ["SessionRoutes"]

MAX_PAGE = 1000
TAG = "Sessions"
T = TypeVar("T")


class SessionRoutes:
    """`/v1/sessions`: each caller's own."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def routes(self) -> list[Route]:
        one = "/v1/sessions/{session_id}"
        return [
            Route("POST", "/v1/sessions", self.create, "A new session", TAG, SessionBody),
            Route("GET", "/v1/sessions", self.list, "The sessions", TAG, also=("/sessions",)),
            Route("DELETE", "/v1/sessions", self.delete_all, "Delete all sessions", TAG),
            Route("POST", "/v1/sessions/import", self.import_, "Import one", TAG, ImportBody),
            Route("GET", one, self.get, "A session", TAG),
            Route("PATCH", one, self.change, "Rename or change a session", TAG, ChangeBody),
            Route("DELETE", one, self.delete, "Delete a session", TAG),
            Route("GET", f"{one}/messages", self.messages, "Its messages", TAG),
            Route("POST", f"{one}/fork", self.fork, "A copy of a branch", TAG, ForkBody),
            Route("GET", f"{one}/export", self.export, "All of it, as a file", TAG),
        ]

    async def _call(self, exchange: Exchange, run: Callable[[ConversationStore], T]) -> T:
        """A call of the store for the caller, off the loop."""
        return await self._turns.shelf.call(exchange.identity.name, run)

    def _shown(self, exchange: Exchange, session: StoredConversation) -> dict[str, Any]:
        running = self._turns.running(exchange.identity, session.id)
        return session_object(session, [turn.id for turn in running])

    async def create(self, exchange: Exchange) -> None:
        body, owner = await exchange.read(SessionBody), exchange.identity.name
        settings = {} if body.settings is None else body.settings.kept()
        ttl_s = UNSET if body.ttl_s is None else body.ttl_s or None
        new = body.new()
        session = await self._call(
            exchange,
            lambda store: store.create(
                owner,
                title=body.title,
                model=body.model,
                settings=settings,
                pruning=body.pruning,
                messages=new,
                ttl_s=ttl_s,
            ),
        )
        exchange.send_json(self._shown(exchange, session))

    async def list(self, exchange: Exchange) -> None:
        owner, limit = exchange.identity.name, _number(exchange, "limit", 50)
        query = exchange.query("query") or exchange.query("q") or ""
        after = exchange.query("after")
        found = await self._call(
            exchange,
            lambda store: store.list(owner, query=query, limit=limit + 1, after=after),
        )
        data = [self._shown(exchange, session) for session in found[:limit]]
        exchange.send_json({"object": "list", "data": data, "has_more": len(found) > limit})

    async def get(self, exchange: Exchange) -> None:
        owner, session_id = _ids(exchange)
        session = await self._call(exchange, lambda store: store.get(owner, session_id))
        exchange.send_json(self._shown(exchange, session))

    async def change(self, exchange: Exchange) -> None:
        body = await exchange.read(ChangeBody)
        given = exchange.given - {"version"}
        fields = {name: getattr(body, name) for name in given if name in ChangeBody.model_fields}
        if body.settings is not None:
            fields["settings"] = body.settings.kept()
        if body.ttl_s is not None:
            fields["ttl_s"] = body.ttl_s or None
        if not fields:
            raise InvalidRequestError("There is nothing to change in the body.")
        owner, session_id = _ids(exchange)
        session = await self._call(
            exchange,
            lambda store: store.change(owner, session_id, version=body.version, **fields),
        )
        exchange.send_json(self._shown(exchange, session))

    async def delete(self, exchange: Exchange) -> None:
        owner, session_id = _ids(exchange)
        await self._turns.stop(exchange.identity, session_id)
        await self._call(exchange, lambda store: store.delete(owner, session_id))
        exchange.send_json({"id": session_id, "object": "session", "deleted": True})

    async def delete_all(self, exchange: Exchange) -> None:
        owner = exchange.identity.name
        await self._turns.stop(exchange.identity)
        count = await self._call(exchange, lambda store: store.delete_all(owner))
        exchange.send_json({"object": "list", "deleted": count})

    async def messages(self, exchange: Exchange) -> None:
        """The branch that is shown; with ``tree`` all, with ``render=html`` as HTML too."""
        owner, session_id = _ids(exchange)
        is_tree, leaf = _flag(exchange, "tree"), exchange.query("leaf")
        renders = exchange.query("render")
        if renders not in (None, "html"):
            raise InvalidRequestError("render can only be html.", "render")

        def read(store: ConversationStore) -> bytes:
            """As JSON, which of a long conversation takes too long for the event loop."""
            store.get(owner, session_id)
            if is_tree:
                found = store.messages(owner, session_id)
                objects = with_relatives(found)
            else:
                found = store.path(owner, session_id, leaf)
                objects = [message_object(m) for m in found]
            data = _rendered(found, objects) if renders else objects
            return json.dumps({"object": "list", "data": data, "has_more": False}).encode()

        exchange.send_bytes(await self._call(exchange, read))

    async def fork(self, exchange: Exchange) -> None:
        body = await exchange.read(ForkBody) if exchange.body else ForkBody()
        owner, session_id = _ids(exchange)
        session = await self._call(
            exchange, lambda store: store.fork(owner, session_id, body.message)
        )
        exchange.send_json(self._shown(exchange, session))

    async def export(self, exchange: Exchange) -> None:
        owner, session_id = _ids(exchange)
        form = exchange.query("format") or "json"
        if form not in EXPORTS:
            raise InvalidRequestError("format must be json or markdown.", "format")
        write, kind, end = EXPORTS[form]
        data = await self._call(exchange, lambda store: write(store, owner, session_id))
        headers = {"Content-Disposition": f'attachment; filename="{session_id:.60}.{end}"'}
        exchange.send_bytes(data, headers=headers, content_type=kind)

    async def import_(self, exchange: Exchange) -> None:
        body, owner = await exchange.read(ImportBody), exchange.identity.name
        given = body.model_extra or {}

        def read(store: ConversationStore) -> StoredConversation:
            from llmkit.sessions.exchange_formats import from_markdown

            data = given if body.markdown is None else from_markdown(body.markdown)
            return store.import_(owner, data)

        session = await self._call(exchange, read)
        exchange.send_json(self._shown(exchange, session))


def _ids(exchange: Exchange) -> tuple[str, str]:
    """The caller, and the session that the path names."""
    return exchange.identity.name, exchange.args[0]


def _rendered(
    messages: Sequence[StoredMessage], objects: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The objects with their text as blocks of sanitised HTML. Any thread."""
    from llmkit.gateway.web.markdown import render

    return [{**o, "html": render(m.text)} for m, o in zip(messages, objects, strict=True)]


def _json(store: ConversationStore, owner: str, session_id: str) -> bytes:
    return json.dumps(store.export(owner, session_id), ensure_ascii=False).encode()


def _markdown(store: ConversationStore, owner: str, session_id: str) -> bytes:
    from llmkit.sessions.exchange_formats import to_markdown

    return to_markdown(store.get(owner, session_id), store.path(owner, session_id)).encode()


EXPORTS = {
    "json": (_json, "application/json", "json"),
    "markdown": (_markdown, "text/markdown; charset=utf-8", "md"),
}


def _flag(exchange: Exchange, name: str) -> bool:
    value = exchange.query(name) or "0"
    if value not in ("0", "1", "true", "false"):
        raise InvalidRequestError(f"{name} must be 0 or 1.", name)
    return value in ("1", "true")


def _number(exchange: Exchange, name: str, default: int) -> int:
    text = exchange.query(name) or str(default)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_PAGE):
        raise InvalidRequestError(f"{name} must be a number from 1 to {MAX_PAGE}.", name)
    return int(text)
