"""Tokenize, detokenize and apply the chat template, in the forms of llama-server and of vLLM.

The fields of a request tell the two apart. Tornado loop only; the engine answers without computing.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from llmkit.errors import InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.openai.chat import ChatMessage, ToolBody
from llmkit.gateway.openai.objects import new_id
from llmkit.gateway.openai.schemas import Ignored
from llmkit.protocol import Inquiry

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
    """Routes over the tokenizer and the chat template of a model."""

    def __init__(self, directory: EngineDirectory) -> None:
        self._directory = directory

    async def tokenize(self, exchange: Exchange) -> None:
        body = await exchange.read(TokenizeBody)
        forms = ("content", "prompt", "messages")
        if sum(getattr(body, name) is not None for name in forms) != 1:
            raise InvalidRequestError(
                "Give exactly one of content (as for llama-server), prompt and messages "
                "(as for vLLM).",
                "prompt",
            )
        if body.content is not None:
            options = {
                "add_special": body.add_special,
                "parse_special": body.parse_special,
                "with_pieces": body.with_pieces,
            }
            reply = await self._inquire(
                exchange, body.model, "tokenize", {"text": body.content, **options}
            )
            exchange.send_json(
                {
                    "tokens": [
                        _with_piece(*pair)
                        for pair in zip(reply["tokens"], reply["pieces"], strict=True)
                    ]
                    if body.with_pieces
                    else reply["tokens"]
                }
            )
            return
        if body.messages is not None:
            messages = {
                "messages": _messages(body.messages),
                "add_generation_prompt": body.add_generation_prompt,
            }
            reply = await self._inquire(
                exchange,
                body.model,
                "tokenize_chat",
                {**messages, "with_pieces": body.return_token_strs},
            )
        else:
            options = {
                "add_special": body.add_special_tokens,
                "parse_special": True,
                "with_pieces": body.return_token_strs,
            }
            reply = await self._inquire(
                exchange, body.model, "tokenize", {"text": body.prompt, **options}
            )
        pieces = reply["pieces"]
        strings = (
            None
            if pieces is None
            else [p.encode("latin-1").decode("utf-8", "replace") for p in pieces]
        )
        n_ctx = self._directory.lookup(body.model).description.n_ctx
        exchange.send_json(
            {
                "count": len(reply["tokens"]),
                "max_model_len": n_ctx,
                "tokens": reply["tokens"],
                "token_strs": strings,
            }
        )

    async def detokenize(self, exchange: Exchange) -> None:
        body = await exchange.read(DetokenizeBody)
        reply = await self._inquire(exchange, body.model, "detokenize", {"tokens": body.tokens})
        exchange.send_json({"content": reply["text"], "prompt": reply["text"]})

    async def apply_template(self, exchange: Exchange) -> None:
        body = await exchange.read(TemplateBody)
        data = {
            "messages": _messages(body.messages),
            "add_generation_prompt": body.add_generation_prompt,
            "tools": [asdict(tool.tool()) for tool in body.tools or ()],
            "template_options": body.chat_template_kwargs or {},
        }
        reply = await self._inquire(exchange, body.model, "render", data)
        exchange.send_json({"prompt": reply["text"]})

    async def tokenizer_info(self, exchange: Exchange) -> None:
        info = await self._inquire(exchange, "default", "info", {})
        adds_bos = info.pop("adds_bos")
        n_ctx = self._directory.lookup("default").description.n_ctx
        exchange.send_json(
            {
                "tokenizer_class": "llama.cpp",
                **info,
                "pad_token": info["eos_token"],
                "add_bos_token": adds_bos,
                "model_max_length": n_ctx,
            }
        )

    async def _inquire(
        self, exchange: Exchange, model: str, kind: Any, data: dict[str, Any]
    ) -> dict[str, Any]:
        engine = self._directory.lookup(model)
        return await asyncio.wrap_future(
            engine.inquire(Inquiry(new_id("ask"), kind, data, exchange.caller))
        )


def _messages(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    return [m.message().as_json() for m in messages]


def _with_piece(token: int, piece: str) -> dict[str, Any]:
    """As llama-server does it: bytes that are not valid UTF-8 become numbers."""
    data = piece.encode("latin-1")
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}
