"""Anthropic's routes: create a message, count the tokens of a prompt. Tornado loop only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmkit.chat.parsers.events import Call
from llmkit.gateway.answers import Answer, count_tokens
from llmkit.gateway.anthropic.blocks import BlockStream, content_blocks
from llmkit.gateway.anthropic.schemas import CountBody, MessagesBody
from llmkit.gateway.chats import Chat
from llmkit.gateway.conversations.recall import recalled
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.protocol import Completion
from llmkit.protocol.client import EngineClient

__all__ = ["AnthropicRoutes"]


class AnthropicRoutes:
    """`/v1/messages` over the engines of a directory."""

    def __init__(self, directory: EngineDirectory, on_use: Callable[[EngineClient], None]) -> None:
        self._directory = directory
        self._on_use = on_use

    async def count_tokens(self, exchange: Exchange) -> None:
        body = await exchange.read(CountBody)
        engine = self._directory.lookup(body.model, "generate")
        chat = await _chat(exchange, body, engine)
        count = await count_tokens(engine, chat, new_id("count"), exchange.caller)
        exchange.send_json({"input_tokens": count})

    async def messages(self, exchange: Exchange) -> None:
        body = await exchange.read(MessagesBody)
        engine = self._directory.lookup(body.model, "generate")
        chat = await _chat(exchange, body, engine)
        chat = await recalled(exchange, engine, chat, body.session_id)
        reply_id = new_id("msg", "_")
        head = {
            "id": reply_id,
            "type": "message",
            "role": "assistant",
            "model": engine.description.name,
        }
        answer = Answer(engine, chat, reply_id, exchange, self._on_use)
        try:
            if body.stream:  # its beginning says how long the prompt is, the engine only its end
                count_id = f"{reply_id}-count"
                num_prompt = await count_tokens(engine, chat, count_id, exchange.caller)
                await self._stream(exchange, answer, head, num_prompt)
                return
            events, completion = await answer.whole()
            exchange.send_json(
                {
                    **head,
                    "content": content_blocks(events),
                    **_end(completion, any(isinstance(e, Call) for e in events)),
                    "usage": _usage(completion),
                }
            )
        finally:
            answer.close()

    @staticmethod
    async def _stream(
        exchange: Exchange, answer: Answer, head: dict[str, Any], num_prompt: int
    ) -> None:
        updates = answer.updates()
        update = await anext(updates)  # an error before the first byte keeps its HTTP status
        await exchange.start_events()
        usage = {"input_tokens": num_prompt, "output_tokens": 0}
        message = {
            **head,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        await exchange.send_named_event({"type": "message_start", "message": message})
        blocks = BlockStream()
        has_calls = False
        while not isinstance(update, Completion):
            if update is None:
                await exchange.send_named_event({"type": "ping"})
            else:
                has_calls = has_calls or any(isinstance(e, Call) for e in update)
                for event in blocks.events(update):
                    await exchange.send_named_event(event)
            update = await anext(updates)
        for event in blocks.close():
            await exchange.send_named_event(event)
        await exchange.send_named_event(
            {"type": "message_delta", "delta": _end(update, has_calls), "usage": _usage(update)}
        )
        await exchange.send_named_event({"type": "message_stop"})
        exchange.end_events("")


async def _chat(exchange: Exchange, body: CountBody, engine: EngineClient) -> Chat:
    attached = Attached(engine.description)
    chat = body.chat(engine.description, attached, exchange.ignore)
    return await attached.taken(exchange, chat)


def _end(completion: Completion, has_calls: bool) -> dict[str, Any]:
    if completion.is_cut:
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if completion.stop is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop}
    return {"stop_reason": "tool_use" if has_calls else "end_turn", "stop_sequence": None}


def _usage(completion: Completion) -> dict[str, int]:
    usage = completion.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }
