"""The routes of OpenAI's responses, and what is kept of them. Tornado loop only."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError, LLMKitError
from llmkit.gateway.answers import Answer
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.objects import new_id
from llmkit.gateway.responses import EventStream, Item, ResponsesBody, finished, input_items, opened, output_items
from llmkit.gateway.schemas import parse
from llmkit.types import Completion

__all__ = ["ResponsesRoutes"]

MAX_KEPT, MAX_KEPT_BYTES = 1000, 64 << 20


@dataclass(slots=True)
class Kept:
    """A response that can be looked up and continued; ``before`` are the items of those that it continues."""

    response: dict[str, Any]
    before: list[Item]
    given: list[Item]
    answer: Answer | None = None  # while it runs
    size: int = 0  # bytes of what was given, about

    def __post_init__(self) -> None:
        self.size = len(json.dumps([self.response, self.before, self.given]))

    @property
    def history(self) -> list[Item]:
        return [*self.before, *self.given, *self.response["output"]]


class ResponsesRoutes:
    """`/v1/responses` over the engines of a directory. The newest thousand stored responses are kept, in memory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._num_bytes = 0

    async def create(self, exchange: Exchange) -> None:
        body = parse(ResponsesBody, exchange.body)
        before = self._history(body.previous_response_id) if body.previous_response_id is not None else []
        engine = self._directory.lookup(body.model, "generate")
        response_id = new_id("resp").replace("-", "_")
        answer = Answer(engine, body.request(before), response_id, exchange.caller, self._on_use)
        kept = Kept(opened(body, response_id, engine.description.name), before, input_items(body), answer)
        try:
            if body.stream:
                await self._stream(exchange, answer, kept, body.store is not False)
                return
            events, completion = await answer.whole()
            kept.response = finished(kept.response, output_items(events), completion)
            if body.store is not False:
                self._keep(kept)
            exchange.send_json(kept.response)
        finally:
            if kept.response["status"] == "in_progress":
                kept.response = {**kept.response, "status": "failed", "error": {"code": "server_error", "message": "The request ended early."}}
            kept.answer = None
            answer.close()

    async def _stream(self, exchange: Exchange, answer: Answer, kept: Kept, store: bool) -> None:
        number = 0

        async def send(event: dict[str, Any]) -> None:
            nonlocal number
            await exchange.send_named_event({**event, "sequence_number": number})
            number += 1

        news = answer.news()
        entry = await anext(news)  # an error before the first byte still has its real status
        await exchange.start_events()
        if store:
            self._keep(kept)  # what the kernel refused is not kept
        await send({"type": "response.created", "response": kept.response})
        await send({"type": "response.in_progress", "response": kept.response})
        stream = EventStream()
        try:
            while not isinstance(entry, Completion):
                if entry is None:
                    await exchange.send_text(": ping\n\n")
                for event in stream.take(entry or []):
                    await send(event)
                entry = await anext(news)
        except LLMKitError as error:
            for event in stream.close("incomplete"):
                await send(event)
            kept.response = {**kept.response, "output": stream.items}
            if kept.response["status"] == "cancelled":
                await send({"type": "response.incomplete", "response": kept.response})
            else:
                kept.response = {**kept.response, "status": "failed", "error": {"code": "server_error", "message": str(error)}}
                await send({"type": "response.failed", "response": kept.response})
            exchange.end_events("")
            return
        for event in stream.close():
            await send(event)
        kept.response = finished(kept.response, stream.items, entry)
        await send({"type": f"response.{kept.response['status']}", "response": kept.response})
        exchange.end_events("")

    def _keep(self, kept: Kept) -> None:
        self._kept[kept.response["id"]] = kept
        self._num_bytes += kept.size
        while len(self._kept) > MAX_KEPT or (self._num_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
            self._num_bytes -= self._kept.popitem(last=False)[1].size

    def _history(self, response_id: str) -> list[Item]:
        kept = self._find(response_id, "previous_response_id")
        if kept.response["status"] not in ("completed", "incomplete"):
            raise ApiError(400, f"The response {response_id!r} has no end to continue from: it is {kept.response['status']}.", param="previous_response_id")
        return kept.history

    def _find(self, response_id: str, param: str | None = None) -> Kept:
        kept = self._kept.get(response_id)
        if kept is None and param is not None:
            raise ApiError(400, f"There is no response {response_id!r:.100} to continue.", param=param, code="previous_response_not_found")
        if kept is None:
            raise ApiError(404, f"There is no response {response_id!r:.100}: it was not stored, was deleted, or the server was restarted.", code="not_found")
        return kept

    async def get(self, exchange: Exchange) -> None:
        for name in ("stream", "starting_after", "include"):
            if exchange.query(name):
                raise InvalidRequestError(f"{name}: a stored response is given whole.", name)
        exchange.send_json(self._find(exchange.args[0]).response)

    async def delete(self, exchange: Exchange) -> None:
        self._num_bytes -= self._find(exchange.args[0]).size
        del self._kept[exchange.args[0]]
        exchange.send_json({"id": exchange.args[0], "object": "response", "deleted": True})

    async def cancel(self, exchange: Exchange) -> None:
        kept = self._find(exchange.args[0])
        if kept.answer is None:
            raise InvalidRequestError("This response has ended already; it cannot be cancelled.")
        kept.response = {**kept.response, "status": "cancelled"}
        kept.answer.close()
        exchange.send_json(kept.response)

    async def input_items(self, exchange: Exchange) -> None:
        items = self._find(exchange.args[0]).given
        order, after, limit = exchange.query("order") or "desc", exchange.query("after"), exchange.query("limit") or "20"
        if order not in ("asc", "desc") or not limit.isdecimal() or not 1 <= int(limit) <= 100:
            raise InvalidRequestError("order must be asc or desc, limit a number from 1 to 100.", "order" if order not in ("asc", "desc") else "limit")
        if order == "desc":
            items = items[::-1]
        if after:
            items = items[next((i + 1 for i, item in enumerate(items) if item["id"] == after), len(items)) :]
        data = items[: int(limit)]
        ids = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        exchange.send_json({"object": "list", "data": data, **ids, "has_more": len(items) > len(data)})
