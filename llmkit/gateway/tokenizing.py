"""Tokenize, detokenize, apply the chat template: the routes of llama-server and of vLLM, told apart by their fields. Tornado loop only."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.chat import ChatMessage, ToolBody
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.objects import new_id
from llmkit.gateway.schemas import Ignored
from llmkit.types import Inquiry

__all__ = ["DetokenizeBody", "TemplateBody", "TokenizeBody", "TokenizerRoutes"]


class TokenizeBody(Ignored):
    """POST /tokenize: ``content`` (llama-server's) or ``prompt`` or ``messages`` (vLLM's)."""

    model: str = "default"
    content: str | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Ignored):
    """POST /detokenize"""

    model: str = "default"
    tokens: list[int]


class TemplateBody(Ignored):
    """POST /apply-template"""

    model: str = "default"
    messages: list[ChatMessage]
    add_generation_prompt: bool = True
    tools: list[ToolBody] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class TokenizerRoutes:
    """Routes over what a model knows without computing."""

    def __init__(self, directory: EngineDirectory) -> None:
        self._directory = directory

    async def tokenize(self, exchange: Exchange) -> None:
        body = await exchange.read(TokenizeBody)
        given = [name for name in ("content", "prompt", "messages") if getattr(body, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError("give one of content (llama-server's form), prompt or messages (vLLM's form).", "prompt")
        if body.content is not None:
            options = {"add_special": body.add_special, "parse_special": body.parse_special, "with_pieces": body.with_pieces}
            found = await self._ask(exchange, body.model, "tokenize", {"text": body.content, **options})
            exchange.send_json(
                {"tokens": [_with_piece(*pair) for pair in zip(found["tokens"], found["pieces"], strict=True)] if body.with_pieces else found["tokens"]}
            )
            return
        if body.messages is not None:
            messages = {"messages": _messages(body.messages), "add_generation_prompt": body.add_generation_prompt}
            found = await self._ask(exchange, body.model, "tokenize_chat", {**messages, "with_pieces": body.return_token_strs})
        else:
            options = {"add_special": body.add_special_tokens, "parse_special": True, "with_pieces": body.return_token_strs}
            found = await self._ask(exchange, body.model, "tokenize", {"text": body.prompt, **options})
        pieces = found["pieces"]
        strings = None if pieces is None else [p.encode("latin-1").decode("utf-8", "replace") for p in pieces]
        n_ctx = self._directory.lookup(body.model).description.n_ctx
        exchange.send_json({"count": len(found["tokens"]), "max_model_len": n_ctx, "tokens": found["tokens"], "token_strs": strings})

    async def detokenize(self, exchange: Exchange) -> None:
        body = await exchange.read(DetokenizeBody)
        text = (await self._ask(exchange, body.model, "detokenize", {"tokens": body.tokens}))["text"]
        exchange.send_json({"content": text, "prompt": text})

    async def apply_template(self, exchange: Exchange) -> None:
        body = await exchange.read(TemplateBody)
        tools = [asdict(tool.tool()) for tool in body.tools or ()]
        data = {"messages": _messages(body.messages), "add_generation_prompt": body.add_generation_prompt, "tools": tools}
        data["template_options"] = body.chat_template_kwargs or {}
        exchange.send_json({"prompt": (await self._ask(exchange, body.model, "render", data))["text"]})

    async def tokenizer_info(self, exchange: Exchange) -> None:
        found = await self._ask(exchange, "default", "info", {})
        adds_bos = found.pop("adds_bos")
        n_ctx = self._directory.lookup("default").description.n_ctx
        exchange.send_json({"tokenizer_class": "llama.cpp", **found, "pad_token": found["eos_token"], "add_bos_token": adds_bos, "model_max_length": n_ctx})

    async def _ask(self, exchange: Exchange, model: str, kind: Any, data: dict[str, Any]) -> dict[str, Any]:
        engine = self._directory.lookup(model)
        return await asyncio.wrap_future(engine.inquire(Inquiry(new_id("ask"), kind, data, exchange.caller)))


def _messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    return [m.message().as_json() for m in messages]


def _with_piece(token: int, piece: str) -> dict[str, Any]:
    """llama-server's form: bytes that are no text by themselves come as numbers."""
    data = piece.encode("latin-1")
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}
