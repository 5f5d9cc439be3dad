"""What of an editor's files goes before a gap in the text, and how much. Tornado loop only."""

from __future__ import annotations

import asyncio

from llmkit.gateway.compat.llama_schemas import InfillBody
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.protocol import Inquiry, Tokenize
from llmkit.protocol.client import EngineClient

__all__ = ["SNIPPET", "infill_prompt"]

MOST = 2048  # tokens next to the gap, as in llama-server: three quarters of them before it
SNIPPET = "\n\n--- snippet ---\n\n"  # what llama-server puts between chunks


async def infill_prompt(
    exchange: Exchange, engine: EngineClient, body: InfillBody
) -> tuple[str, str]:
    """The text before and after the gap, shortened to what fits: nearest and newest first."""
    n_ctx = engine.description.n_ctx
    most = min(MOST, n_ctx // 2)
    prefix = await _last(exchange, engine, body.input_prefix + body.prompt, 3 * (most // 4))
    suffix = await _first(exchange, engine, body.input_suffix, most // 4)
    extra = "".join(f"{SNIPPET}{chunk.text}" for chunk in body.input_extra)
    if not extra:
        return prefix, suffix
    room = n_ctx - most - 2 * max(body.max_tokens, 0) - 16
    return await _last(exchange, engine, f"{extra}{SNIPPET}", max(room, 0)) + prefix, suffix


async def _last(exchange: Exchange, engine: EngineClient, text: str, most: int) -> str:
    """The end of a text, of at most so many tokens."""
    if len(text) <= most:  # a token has at least a character
        return text
    pieces = await _pieces(exchange, engine, text)
    return b"".join(pieces[-most:]).decode("utf-8", "ignore") if most else ""


async def _first(exchange: Exchange, engine: EngineClient, text: str, most: int) -> str:
    if len(text) <= most:
        return text
    pieces = await _pieces(exchange, engine, text)
    return b"".join(pieces[:most]).decode("utf-8", "ignore")


async def _pieces(exchange: Exchange, engine: EngineClient, text: str) -> tuple[bytes, ...]:
    question = Tokenize(text, add_special=False, parse_special=False, with_pieces=True)
    inquiry = Inquiry(new_id("ask"), question, exchange.caller)
    return (await asyncio.wrap_future(engine.inquire(inquiry))).pieces or ()
