"""The routes of OpenAI's responses: create, stream, retrieve, cancel, delete. Tornado loop only."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from llmkit.errors import InvalidRequestError, LLMKitError, StoreError
from llmkit.gateway.answers import Answer
from llmkit.gateway.conversations.recall import recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai.event_stream import EventStream, output_items
from llmkit.gateway.openai.item_media import apart, digests_of
from llmkit.gateway.openai.responses import (
    ResponsesBody,
    finished,
    input_items,
    opened,
    referenced,
)
from llmkit.gateway.openai.stored import Kept, Stored
from llmkit.protocol import Completion
from llmkit.protocol.client import EngineClient

__all__ = ["ResponsesRoutes"]

logger = logging.getLogger("llmkit.gateway")


class Run:
    """A response in progress. Of finishing and being cancelled, whichever comes first counts."""

    def __init__(self, answer: Answer, response: dict[str, Any], owner: str) -> None:
        self.answer, self.response, self.owner = answer, response, owner
        self.is_stored = self.is_deleted = False

    @property
    def is_over(self) -> bool:
        return bool(self.response["status"] != "in_progress")

    def become(self, response: dict[str, Any]) -> None:
        if not self.is_over:
            self.response = response


class ResponsesRoutes:
    """`/v1/responses` over the engines of a directory.

    Recent responses are kept in the database; only their callers can see them.
    """

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use
        self._running: dict[str, Run] = {}

    async def create(self, exchange: Exchange) -> None:
        body = await exchange.read(ResponsesBody)
        owner, stored = exchange.identity.name, Stored(exchange)
        previous = body.previous_response_id
        if previous is not None and body.session_id is not None:
            raise InvalidRequestError(
                "session_id cannot be combined with previous_response_id.", "session_id"
            )
        before = [] if previous is None else await stored.history(previous)
        known = await stored.items(referenced(body))
        own_items = input_items(body, lambda item_id: dict(known[item_id]))
        engine = self._directory.lookup(body.model, "generate")
        response_id = new_id("resp", "_")
        kept_media = digests_of([*before, *known.values()])
        attached = Attached(engine.description, "input", kept_media)
        chat = body.chat([*before, *own_items], engine.description, attached, exchange.ignore)
        chat = await attached.taken(exchange, chat)
        chat = await recalled(exchange, engine, chat, body.session_id)
        answer = Answer(engine, chat, response_id, exchange, self._on_use)
        run = Run(answer, opened(body, response_id, engine.description.name), owner)
        kept = None
        if body.store is not False and stored.is_on:
            kept = Kept(response_id, apart(own_items, attached), previous, before, attached.files)
        elif body.store is not False:
            run.response["store"] = False
        self._running[response_id] = run
        try:
            if body.stream:
                await self._stream(exchange, run, kept, stored)
            else:
                events, completion = await answer.whole()
                run.become(finished(run.response, output_items(events, completion), completion))
                await self._keep(run, kept, stored)
                exchange.send_json(run.response)
        except BaseException:
            run.become(
                {
                    **run.response,
                    "status": "failed",
                    "error": {"code": "server_error", "message": "The request ended early."},
                }
            )
            if body.stream and exchange.streaming and exchange.turns is not None:
                exchange.turns.finish(self._keep(run, kept, stored))
            raise
        finally:
            del self._running[response_id]
            answer.close()

    async def _stream(
        self, exchange: Exchange, run: Run, kept: Kept | None, stored: Stored
    ) -> None:
        number = 0

        async def send(kind: str, **fields: Any) -> None:
            nonlocal number
            await exchange.send_named_event({"type": kind, **fields, "sequence_number": number})
            number += 1

        updates = run.answer.updates()
        update = await anext(updates)  # an error before the first byte keeps its HTTP status
        await exchange.start_events()
        # Only now: a request that the engine refused is not kept.
        await self._keep(run, kept, stored)
        await send("response.created", response=run.response)
        await send("response.in_progress", response=run.response)
        stream = EventStream()
        failure: LLMKitError | None = None
        try:
            while not isinstance(update, Completion):
                if update is None:
                    await exchange.send_text(": ping\n\n")
                for event in stream.take(update or []):
                    await send(**{"kind": event.pop("type"), **event})
                update = await anext(updates)
        except LLMKitError as error:
            failure = error
        is_cut = failure is not None or (isinstance(update, Completion) and update.is_cut)
        for event in stream.close("incomplete" if is_cut else "completed"):
            await send(**{"kind": event.pop("type"), **event})
        if failure is None and isinstance(update, Completion):
            run.become(finished(run.response, stream.items, update))
        elif not run.is_over:
            run.become(
                {
                    **run.response,
                    "output": stream.items,
                    "status": "failed",
                    "error": {"code": "server_error", "message": str(failure)},
                }
            )
        if run.response["status"] == "cancelled":
            run.response = {**run.response, "output": stream.items}
        await self._keep(run, kept, stored)
        status = run.response["status"]
        await send(
            f"response.{'incomplete' if status == 'cancelled' else status}", response=run.response
        )
        exchange.end_events("")

    @staticmethod
    async def _keep(run: Run, kept: Kept | None, stored: Stored) -> None:
        """Store the response; one that cannot be stored says so."""
        if kept is None or run.is_deleted:
            return
        response = run.response
        try:
            is_kept = await stored.put(kept, response)
        except StoreError as error:
            logger.warning("the response %s could not be stored: %s", kept.response_id, error)
            is_kept = False
            if run.is_stored and run.is_over:  # else it would be in progress for ever
                stored.postpone(kept, response)
        run.is_stored = is_kept
        if not is_kept:
            run.response = {**run.response, "store": False}

    async def get(self, exchange: Exchange) -> None:
        for name in ("stream", "starting_after", "include"):
            if exchange.query(name):
                raise InvalidRequestError(f"{name} is not supported for a stored response.", name)
        kept = await Stored(exchange).find(exchange.args[0])
        exchange.send_bytes(kept.body)

    async def delete(self, exchange: Exchange) -> None:
        response_id = exchange.args[0]
        run = self._running.get(response_id)
        if run is not None and run.owner == exchange.identity.name:
            run.is_deleted = True
        await Stored(exchange).delete(response_id)
        exchange.send_json({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, exchange: Exchange) -> None:
        run = self._running.get(exchange.args[0])
        if run is None or run.owner != exchange.identity.name or run.is_over:
            await Stored(exchange).find(exchange.args[0])
            raise InvalidRequestError("The response has already ended; it cannot be cancelled.")
        run.become({**run.response, "status": "cancelled"})
        run.answer.close()
        exchange.send_json(run.response)

    async def input_items(self, exchange: Exchange) -> None:
        items = await Stored(exchange).input_items(exchange.args[0])
        order, after, limit = (
            exchange.query("order") or "desc",
            exchange.query("after"),
            exchange.query("limit") or "20",
        )
        if order not in ("asc", "desc") or not (
            limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= 100
        ):
            raise InvalidRequestError(
                "order must be asc or desc, and limit between 1 and 100.",
                "order" if order not in ("asc", "desc") else "limit",
            )
        if order == "desc":
            items = items[::-1]
        if after:
            items = items[
                next((i + 1 for i, item in enumerate(items) if item["id"] == after), len(items)) :
            ]
        data = items[: int(limit)]
        ids = (
            {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
            if data
            else {"first_id": None, "last_id": None}
        )
        exchange.send_json(
            {"object": "list", "data": data, **ids, "has_more": len(items) > len(data)}
        )
