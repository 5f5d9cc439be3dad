"""The routes of sessions: kept conversations, listed, changed, forked. Tornado loop only.

The routes of their messages are in `history`, those of turns in `turn_routes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from llmkit.errors import InvalidRequestError
from llmkit.gateway.conversations.history import MAX_PAGE, number_of
from llmkit.gateway.conversations.objects import encoded, session_object
from llmkit.gateway.conversations.schemas import ChangeBody, ForkBody, ImportBody, SessionBody
from llmkit.gateway.conversations.settings import check_settings
from llmkit.gateway.conversations.turns import Turns
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.store.conversation_records import UNSET, StoredConversation

if TYPE_CHECKING:
    from llmkit.store.conversations import ConversationStore

__all__ = ["SessionRoutes"]

TAG = "Sessions"
LISTED = 50  # sessions, unless a request says how many
T = TypeVar("T")


class SessionRoutes:
    """`/v1/sessions`: each caller's own."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def routes(self) -> list[Route]:
        one = "/v1/sessions/{session_id}"
        return [
            Route("POST", "/v1/sessions", self.create, "A new session", TAG, SessionBody),
            Route(
                "GET",
                "/v1/sessions",
                self.list,
                "The sessions",
                TAG,
                also=("/sessions",),
                query=(
                    Query("query", "Words in titles or messages."),
                    Query("q", "The same."),
                    Query.number("limit", "The most that are listed.", MAX_PAGE, LISTED),
                    Query("after", "The id of the last one that is known."),
                ),
            ),
            Route("DELETE", "/v1/sessions", self.delete_all, "Delete all sessions", TAG),
            Route("POST", "/v1/sessions/import", self.import_, "Import one", TAG, ImportBody),
            Route("GET", one, self.get, "A session", TAG),
            Route("PATCH", one, self.change, "Rename or change a session", TAG, ChangeBody),
            Route("DELETE", one, self.delete, "Delete a session", TAG),
            Route("POST", f"{one}/fork", self.fork, "A copy of a branch", TAG, ForkBody),
        ]

    async def _call(self, exchange: Exchange, run: Callable[[ConversationStore], T]) -> T:
        """A call of the store for the caller, off the loop."""
        session_id = exchange.args[0] if exchange.args else ""
        return await self._turns.shelf.call(exchange.identity.name, run, session_id)

    def _shown(self, exchange: Exchange, session: StoredConversation) -> dict[str, Any]:
        running = self._turns.running(exchange.identity, session.id)
        return session_object(session, [turn.id for turn in running])

    async def create(self, exchange: Exchange) -> None:
        body, owner = await exchange.read(SessionBody), exchange.identity.name
        settings = {} if body.settings is None else body.settings.kept()
        ttl_s = UNSET if body.ttl_s is None else body.ttl_s or None
        attached = Attached(None)
        body.new(attached)  # to see what is attached
        await attached.read(exchange)
        new = body.new(attached)
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
        owner, limit = exchange.identity.name, number_of(exchange, "limit", LISTED)
        query = exchange.query("query") or exchange.query("q") or ""
        after = exchange.query("after")
        running: dict[str, list[str]] = {}
        for turn in self._turns.running(exchange.identity):
            running.setdefault(turn.session_id, []).append(turn.id)

        def read(store: ConversationStore) -> bytes:
            found, has_more = store.listed(owner, query=query, limit=limit, after=after)
            data = [session_object(session, running.get(session.id, ())) for session in found]
            return encoded({"object": "list", "data": data, "has_more": has_more})

        exchange.send_bytes(await self._turns.shelf.look(owner, read))

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
            raise InvalidRequestError(
                "The body changes nothing: give title, model, settings, pruning, head or ttl_s."
            )
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

    async def fork(self, exchange: Exchange) -> None:
        body = await exchange.read(ForkBody) if exchange.body else ForkBody()
        owner, session_id = _ids(exchange)
        session = await self._call(
            exchange, lambda store: store.fork(owner, session_id, body.message)
        )
        exchange.send_json(self._shown(exchange, session))

    async def import_(self, exchange: Exchange) -> None:
        body, owner = await exchange.read(ImportBody), exchange.identity.name
        given = body.model_extra or {}

        def read(store: ConversationStore) -> StoredConversation:
            from llmkit.sessions.exchange_formats import from_markdown

            data = given if body.markdown is None else from_markdown(body.markdown)
            return store.import_(owner, data, check_settings)

        session = await self._call(exchange, read)
        exchange.send_json(self._shown(exchange, session))


def _ids(exchange: Exchange) -> tuple[str, str]:
    """The caller, and the session that the path names."""
    return exchange.identity.name, exchange.args[0]
