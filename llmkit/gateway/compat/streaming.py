"""Answers as events of text, as these services stream them. Tornado loop only."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llmkit.chat.parsers.events import Content
from llmkit.gateway.answers import Answer
from llmkit.gateway.exchange import Exchange
from llmkit.protocol import Completion

__all__ = ["json_event", "stream_text"]


async def stream_text(
    exchange: Exchange,
    answer: Answer,
    event: Callable[[str], str],
    last: Callable[[Completion], str] = lambda _: "",
) -> None:
    """Send an answer: ``event`` writes a piece of its text, ``last`` what comes after all of it.

    An error before the first byte keeps its HTTP status.
    """
    async for update in answer.updates():
        if not exchange.streaming:
            await exchange.start_events()
        if update is None:
            await exchange.send_text(": ping\n\n")
            continue
        if isinstance(update, Completion):
            written = last(update)
        else:
            text = "".join(e.text for e in update if isinstance(e, Content))
            written = event(text) if text else ""
        if written:
            await exchange.send_text(written)
    exchange.end_events("")


def json_event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"
