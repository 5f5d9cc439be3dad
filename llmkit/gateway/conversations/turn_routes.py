"""The routes of turns: say, edit, regenerate, follow, cancel. Tornado loop only.

A client that leaves ends no turn; it may come back for the rest. What begins one only relays: its
turn is an exchange of its own, see `Turns`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from llmkit.errors import InvalidRequestError
from llmkit.gateway.access.held import SMALL_BYTES
from llmkit.gateway.conversations.answering import Answering
from llmkit.gateway.conversations.detached import PASSED, TurnExchange, Wish
from llmkit.gateway.conversations.objects import encoded
from llmkit.gateway.conversations.schemas import EditBody, RegenerateBody, SendBody
from llmkit.gateway.conversations.turns import NEW, Turn, Turns
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.gateway.streams import PING_S
from llmkit.protocol.client import EngineClient

__all__ = ["TurnRoutes"]

TAG = "Sessions"
AFTER = Query(
    "after",
    "The number of the last event that is known; so is the header Last-Event-ID.",
    {"type": "integer", "minimum": 0, "default": 0},
)


class TurnRoutes:
    """`/v1/sessions/{session_id}/messages` and what belongs to it."""

    def __init__(
        self, turns: Turns, directory: EngineDirectory, on_use: Callable[[EngineClient], None]
    ) -> None:
        self._turns = turns
        self._answering = Answering(lambda: turns.shelf, directory, on_use)

    def routes(self) -> list[Route]:
        messages = "/v1/sessions/{session_id}/messages"
        turn = "/v1/sessions/{session_id}/turns/{turn_id}"
        begins: dict[str, Any] = {"tag": TAG, "relays": True}
        return [
            Route("POST", messages, self.send, "Say something", body=SendBody, **begins),
            Route(
                "PATCH",
                messages + "/{message_id}",
                self.edit,
                "Say it otherwise, in a branch",
                body=EditBody,
                **begins,
            ),
            Route(
                "POST",
                messages + "/{message_id}/regenerate",
                self.regenerate,
                "Another answer, in a branch",
                body=RegenerateBody,
                **begins,
            ),
            Route("GET", "/v1/sessions/{session_id}/turns", self.list, "Turns under way", TAG),
            Route(
                "GET",
                f"{turn}/events",
                self.events,
                "Follow a turn",
                TAG,
                query=(AFTER,),
            ),
            Route("POST", f"{turn}/cancel", self.cancel, "End an answer here", TAG),
        ]

    async def send(self, exchange: Exchange) -> None:
        if isinstance(exchange, TurnExchange):  # within the stages
            await self._answering.answer(exchange)
            return
        session_id = exchange.args[0]
        await self._relay(exchange, Wish("send", None if session_id == NEW else session_id))

    async def edit(self, exchange: Exchange) -> None:
        await self._relay(exchange, Wish("edit", *exchange.args))

    async def regenerate(self, exchange: Exchange) -> None:
        await self._relay(exchange, Wish("regenerate", *exchange.args))

    async def _relay(self, exchange: Exchange, wish: Wish) -> None:
        """Begin a turn, and pass on what comes of it."""
        sent = {name: exchange.header(name) for name in PASSED}
        headers = {name: value for name, value in sent.items() if value is not None}
        headers["x-request-id"] = exchange.request_id
        turn = await self._turns.start(
            exchange.identity, exchange.address, wish, exchange.body or b"{}", headers
        )
        for name, value in turn.headers.items():
            exchange.set_header(name, value)
        if turn.keeping is None:
            found = {"object": "list", "data": turn.appended, "has_more": False}
            await self._send(exchange, found, [turn])
        elif turn.is_streamed:
            await _stream(exchange, turn, 0)
        else:
            await turn.over.wait()
            if turn.failure is not None:
                raise turn.failure
            await self._send(exchange, turn_object(turn), [turn])

    async def _send(self, exchange: Exchange, value: dict[str, Any], turns: Sequence[Turn]) -> None:
        """What is said of turns, as JSON: made on a thread where their messages are long."""
        who, size = exchange.counted_as, sum(turn.num_bytes for turn in turns)
        exchange.send_bytes(
            encoded(value)
            if size <= SMALL_BYTES
            else await self._turns.rendering.run(who, lambda _: encoded(value))
        )

    def _find(self, exchange: Exchange) -> Turn:
        session_id, turn_id = exchange.args
        turn = self._turns.find(exchange.identity, turn_id)
        if turn.session_id != session_id:
            raise ApiError(404, f"The session has no turn {turn_id!r:.60}.", code="not_found")
        return turn

    async def list(self, exchange: Exchange) -> None:
        running = self._turns.running(exchange.identity, exchange.args[0])
        data = [turn_object(turn) for turn in running]
        await self._send(exchange, {"object": "list", "data": data, "has_more": False}, running)

    async def events(self, exchange: Exchange) -> None:
        """The events after ``after``, or after the last one that the client has."""
        turn = self._find(exchange)
        after = exchange.query("after") or exchange.header("Last-Event-ID") or "0"
        if not (after.isascii() and after.isdecimal() and len(after) <= 12):
            raise InvalidRequestError("after must be the number of an event.", "after")
        await _stream(exchange, turn, int(after))

    async def cancel(self, exchange: Exchange) -> None:
        turn = self._find(exchange)
        turn.cancel()
        await turn.over.wait()
        await self._send(exchange, turn_object(turn), [turn])


async def _stream(exchange: Exchange, turn: Turn, after: int) -> None:
    await exchange.start_events()
    async for event in turn.log.follow(after, PING_S):
        if event is None:
            await exchange.send_text(": ping\n\n")
            continue
        data = msgspec.json.encode({"turn": turn.id, **msgspec.to_builtins(event)}).decode()
        await exchange.send_text(f"id: {event.seq}\nevent: {event.type}\ndata: {data}\n\n")
    exchange.end_events("")


def turn_object(turn: Turn) -> dict[str, Any]:
    """A turn; ``message`` is its reply as it is stored, or so far."""
    assert turn.keeping is not None
    return {
        "id": turn.id,
        "object": "session.turn",
        "session": turn.session_id,
        "status": "completed" if turn.is_over else "running",
        "last_event": turn.log.last,
        "messages": turn.appended[:-1],
        "message": turn.keeping.shown,
        "usage": turn.keeping.shown["usage"],
    }
