"""The routes of OpenAI's responses, and what is kept of them. Tornado loop only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmkit.client import EngineClient
from llmkit.errors import EngineGoneError, InvalidRequestError
from llmkit.gateway.answers import Answer
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.responses import EventStream, Item, ResponsesBody, finished, input_items, opened, output_items
from llmkit.gateway.schemas import new_id, parse
from llmkit.types import Completion

__all__ = ["ResponsesRoutes"]

MAX_KEPT = 1000


@dataclass(slots=True)
class Kept:
    """A response that can be looked up and continued; ``before`` are the items of those that it continues."""

    response: dict[str, Any]
    before: list[Item]
    given: list[Item]
    answer: Answer | None = None  # while it runs

    @property
    def history(self) -> list[Item]:
        return [*self.before, *self.given, *self.response["output"]]


class ResponsesRoutes:
    """`/v1/responses` over the engines of a directory. The newest thousand stored responses are kept, in memory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    async def create(self, exchange: Exchange) -> None:
        body = parse(ResponsesBody, exchange.body)
        before = self._find(body.previous_response_id, "previous_response_id").history if body.previous_response_id is not None else []
        engine = self._directory.lookup(body.model, "generate")
        response_id = new_id("resp").replace("-", "_")
        answer = Answer(engine, body.request(before), response_id, exchange.caller, self._on_use)
        kept = Kept(opened(body, response_id, engine.description.name), before, input_items(body), answer)
        if body.store is not False:
            self._keep(response_id, kept)
        try:
            if body.stream:
                await self._stream(exchange, answer, kept)
                return
            events, completion = await answer.whole()
            kept.response = finished(kept.response, output_items(events), completion)
            exchange.send_json(kept.response)
        except BaseException:
            if kept.response["status"] == "in_progress":
                kept.response = {**kept.response, "status": "failed", "error": {"code": "server_error", "message": "The request ended early."}}
            raise
        finally:
            kept.answer = None
            answer.close()

    @staticmethod
    async def _stream(exchange: Exchange, answer: Answer, kept: Kept) -> None:
        number = 0

        async def send(event: dict[str, Any]) -> None:
            nonlocal number
            await exchange.send_named_event({**event, "sequence_number": number})
            number += 1

        news = answer.news()
        entry = await anext(news)  # an error before the first byte still has its real status
        await exchange.start_events()
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
        except EngineGoneError:
            if kept.response["status"] != "cancelled":
                raise
            stream.close()
            kept.response = {**kept.response, "output": stream.items}
            await send({"type": "response.incomplete", "response": kept.response})
            exchange.end_events("")
            return
        for event in stream.close():
            await send(event)
        kept.response = finished(kept.response, stream.items, entry)
        await send({"type": f"response.{kept.response['status']}", "response": kept.response})
        exchange.end_events("")

    def _keep(self, response_id: str, kept: Kept) -> None:
        self._kept[response_id] = kept
        while len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)

    def _find(self, response_id: str, param: str | None = None) -> Kept:
        kept = self._kept.get(response_id)
        if kept is None and param is not None:
            raise ApiError(400, f"There is no response {response_id!r:.100} to continue.", param=param, code="previous_response_not_found")
        if kept is None:
            raise ApiError(404, f"There is no response {response_id!r:.100}: it was not stored, was deleted, or the server was restarted.", code="not_found")
        return kept

    async def get(self, exchange: Exchange) -> None:
        exchange.send_json(self._find(exchange.args[0]).response)

    async def delete(self, exchange: Exchange) -> None:
        self._find(exchange.args[0])
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
        ids = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
        exchange.send_json({"object": "list", "data": items[::-1], **ids, "has_more": False})
