"""Tokenize, detokenize and apply the chat template, in the forms of llama-server and of vLLM.

The fields of a request tell the two apart. Tornado loop only; the engine answers without computing.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from llmkit.errors import InvalidRequestError
from llmkit.gateway.chats import Chat
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.gateway.media.attached import Attached
from llmkit.gateway.openai.chat import ChatMessage, ToolBody
from llmkit.gateway.openai.schemas import Ignored
from llmkit.protocol import (
    DescribeVocabulary,
    Detokenize,
    Inquiry,
    Question,
    RenderChat,
    SamplingParams,
    Tokenize,
    TokenizeChat,
    Tokens,
)

__all__ = ["DetokenizeBody", "TemplateBody", "TokenizeBody", "TokenizerRoutes"]

Answer = TypeVar("Answer")


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
            question: Question[Tokens] = Tokenize(
                body.content, body.add_special, body.parse_special, body.with_pieces
            )
            tokens = await self._ask(exchange, body.model, question)
            pieces = zip(tokens.tokens, tokens.pieces or (), strict=True)
            exchange.send_json(
                {
                    "tokens": [_with_piece(*pair) for pair in pieces]
                    if body.with_pieces
                    else tokens.tokens
                }
            )
            return
        chat = await self._chat(exchange, body.model, body.messages or [])
        question = (
            TokenizeChat(
                chat.messages,
                media=chat.media,
                add_generation_prompt=body.add_generation_prompt,
                with_pieces=body.return_token_strs,
            )
            if body.messages is not None
            else Tokenize(
                body.prompt or "",
                body.add_special_tokens,
                with_pieces=body.return_token_strs,
            )
        )
        tokens = await self._ask(exchange, body.model, question)
        strings = tokens.pieces and [p.decode("utf-8", "replace") for p in tokens.pieces]
        n_ctx = self._directory.lookup(body.model).description.n_ctx
        exchange.send_json(
            {
                "count": len(tokens.tokens),
                "max_model_len": n_ctx,
                "tokens": tokens.tokens,
                "token_strs": strings,
            }
        )

    async def detokenize(self, exchange: Exchange) -> None:
        body = await exchange.read(DetokenizeBody)
        text = await self._ask(exchange, body.model, Detokenize(tuple(body.tokens)))
        exchange.send_json({"content": text, "prompt": text})

    async def apply_template(self, exchange: Exchange) -> None:
        body = await exchange.read(TemplateBody)
        question = RenderChat(
            (await self._chat(exchange, body.model, body.messages)).messages,
            tuple(tool.tool() for tool in body.tools or ()),
            body.chat_template_kwargs or {},
            body.add_generation_prompt,
        )
        exchange.send_json({"prompt": await self._ask(exchange, body.model, question)})

    async def tokenizer_info(self, exchange: Exchange) -> None:
        vocabulary = await self._ask(exchange, "default", DescribeVocabulary())
        n_ctx = self._directory.lookup("default").description.n_ctx
        exchange.send_json(
            {
                "tokenizer_class": "llama.cpp",
                "bos_token": vocabulary.bos_token,
                "eos_token": vocabulary.eos_token,
                "chat_template": vocabulary.chat_template,
                "pad_token": vocabulary.eos_token,
                "add_bos_token": vocabulary.adds_bos,
                "model_max_length": n_ctx,
            }
        )

    async def _chat(self, exchange: Exchange, model: str, messages: list[ChatMessage]) -> Chat:
        attached = Attached(self._directory.lookup(model).description)
        told = tuple(message.message(attached) for message in messages)
        return await attached.taken(exchange, Chat(messages=told, sampling=SamplingParams()))

    async def _ask(self, exchange: Exchange, model: str, question: Question[Answer]) -> Answer:
        engine = self._directory.lookup(model)
        return await asyncio.wrap_future(
            engine.inquire(Inquiry(new_id("ask"), question, exchange.caller))
        )


def _with_piece(token: int, piece: bytes) -> dict[str, Any]:
    """As llama-server does it: bytes that are not valid UTF-8 become numbers."""
    try:
        return {"id": token, "piece": piece.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(piece)}
