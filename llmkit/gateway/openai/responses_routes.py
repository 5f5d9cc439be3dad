"""The routes of OpenAI's responses: create, stream, retrieve, cancel, delete. Tornado loop only."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llmkit.errors import InvalidRequestError, LLMKitError
from llmkit.gateway.answers import Answer
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ids import new_id
from llmkit.gateway.openai.event_stream import EventStream, output_items
from llmkit.gateway.openai.responses import ResponsesBody, finished, input_items, opened
from llmkit.gateway.openai.stored import Kept, Store
from llmkit.protocol import Completion
from llmkit.protocol.client import EngineClient

__all__ = ["ResponsesRoutes"]


class Run:
    """A response in progress. Of finishing and being cancelled, whichever comes first counts."""

    def __init__(self, answer: Answer, response: dict[str, Any], owner: str) -> None:
        self.answer, self.response, self.owner = answer, response, owner
        self.is_deleted = False

    @property
    def is_over(self) -> bool:
        return bool(self.response["status"] != "in_progress")

    def become(self, response: dict[str, Any]) -> None:
        if not self.is_over:
            self.response = response


class ResponsesRoutes:
    """`/v1/responses` over the engines of a directory.

    Recent responses are kept in memory; only their callers can see them.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        on_use: Callable[[EngineClient], None],
        store: Store | None = None,
    ) -> None:
        self._directory = directory
        self._on_use = on_use
        self.store = store or Store()
        self._running: dict[str, Run] = {}

    async def create(self, exchange: Exchange) -> None:
        body = await exchange.read(ResponsesBody)
        owner = exchange.identity.name
        previous = (
            None
            if body.previous_response_id is None
            else self._previous(owner, body.previous_response_id)
        )
        own_items = input_items(body, self.store.finder(owner))
        engine = self._directory.lookup(body.model, "generate")
        response_id = new_id("resp", "_")
        before = previous.history if previous is not None else []
        chat = body.chat([*before, *own_items], engine.description, exchange.ignore)
        answer = Answer(engine, chat, response_id, exchange, self._on_use)
        run = Run(answer, opened(body, response_id, engine.description.name), owner)
        kept = (
            self.store.begin(owner, response_id, own_items, previous)
            if body.store is not False
            else None
        )
        self._running[response_id] = run
        try:
            if body.stream:
                await self._stream(exchange, run, kept)
            else:
                events, completion = await answer.whole()
                run.become(finished(run.response, output_items(events, completion), completion))
                self._keep(run, kept)
                exchange.send_json(run.response)
        except BaseException:
            run.become(
                {
                    **run.response,
                    "status": "failed",
                    "error": {"code": "server_error", "message": "The request ended early."},
                }
            )
            if body.stream and exchange.streaming:
                self._keep(run, kept)
            raise
        finally:
            del self._running[response_id]
            answer.close()

    async def _stream(self, exchange: Exchange, run: Run, kept: Kept | None) -> None:
        number = 0

        async def send(kind: str, **fields: Any) -> None:
            nonlocal number
            await exchange.send_named_event({"type": kind, **fields, "sequence_number": number})
            number += 1

        updates = run.answer.updates()
        update = await anext(updates)  # an error before the first byte keeps its HTTP status
        await exchange.start_events()
        self._keep(run, kept)  # only now: a request that the engine refused is not kept
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
        self._keep(run, kept)
        status = run.response["status"]
        await send(
            f"response.{'incomplete' if status == 'cancelled' else status}", response=run.response
        )
        exchange.end_events("")

    def _keep(self, run: Run, kept: Kept | None) -> None:
        """Store the response; one that is too large says that it was not stored."""
        if kept is not None and not run.is_deleted and not self.store.add(kept, run.response):
            run.response = {**run.response, "store": False}

    def _previous(self, owner: str, response_id: str) -> Kept:
        kept = self.store.find(owner, response_id, "previous_response_id")
        if kept.status not in ("completed", "incomplete"):
            raise ApiError(
                400,
                f"The response {response_id!r} cannot be continued: its status is {kept.status}.",
                param="previous_response_id",
            )
        return kept

    async def get(self, exchange: Exchange) -> None:
        for name in ("stream", "starting_after", "include"):
            if exchange.query(name):
                raise InvalidRequestError(f"{name} is not supported for a stored response.", name)
        exchange.send_bytes(self.store.find(exchange.identity.name, exchange.args[0]).response)

    async def delete(self, exchange: Exchange) -> None:
        self.store.remove(self.store.find(exchange.identity.name, exchange.args[0]))
        if (run := self._running.get(exchange.args[0])) is not None:
            run.is_deleted = True
        exchange.send_json({"id": exchange.args[0], "object": "response", "deleted": True})

    async def cancel(self, exchange: Exchange) -> None:
        run = self._running.get(exchange.args[0])
        if run is None or run.owner != exchange.identity.name or run.is_over:
            self.store.find(exchange.identity.name, exchange.args[0])
            raise InvalidRequestError("The response has already ended; it cannot be cancelled.")
        run.become({**run.response, "status": "cancelled"})
        run.answer.close()
        exchange.send_json(run.response)

    async def input_items(self, exchange: Exchange) -> None:
        items = json.loads(self.store.find(exchange.identity.name, exchange.args[0]).input.data)
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
