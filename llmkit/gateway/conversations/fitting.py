"""A conversation fitted into the model's context, by the engine's own count of tokens.

What was left out is remembered with the reply (``usage.pruned``), so that the next turn leaves out
the same, and its prompt begins with what is computed already. Tornado loop only; counting waits
for the engine on a thread.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.chat.parsers.events import Content
from llmkit.errors import ContextLengthError
from llmkit.gateway.answers import Answer
from llmkit.gateway.chats import Chat
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.protocol import Inquiry, Message, SamplingParams, TokenizeChat, check_size
from llmkit.protocol.client import EngineClient
from llmkit.sessions.pruning import Pruned, ask_for_summary, prune, with_summary
from llmkit.store.conversation_records import Pruning, StoredMessage

__all__ = ["Fitted", "fit"]

SYSTEM = ("system", "developer")
MESSAGE_BYTES, CHAT_BYTES = 64, 512  # what a template adds to texts, at most, about
ANSWER_SHARE = 4  # at most a quarter of the context is left to the answer
SUMMARY_TOKENS = 400
COUNT_S = 60.0


@dataclass(frozen=True, slots=True)
class Fitted:
    """A chat that fits. ``pruned`` says what is left out of it, ``is_new`` whether only now."""

    chat: Chat
    pruned: dict[str, Any] | None = None
    is_new: bool = False


async def fit(
    exchange: Exchange,
    engine: EngineClient,
    chat: Chat,
    path: Sequence[StoredMessage],
    new: Sequence[Message],
    how: Pruning,
    *,
    system: Sequence[Message] = (),
) -> Fitted:
    """``chat`` with the history of ``path`` and the ``new`` messages, as far as they fit.

    ``system`` goes in place of the history's own system prompt. Raises `ContextLengthError` for
    what cannot be made to fit, or is not to be.
    """
    told = [m for m in path if m.role != "assistant" or m.text or m.tool_calls]
    if system:
        told = [m for m in told if m.role not in SYSTEM]
    ids = [*("" for _ in system), *(m.id for m in told)]
    messages = [*system, *(m.message for m in told), *new]
    earlier = _earlier(path)
    since = ids.index(earlier["after"]) + 1 if earlier and earlier["after"] in ids else 0
    if earlier is None or not since:
        earlier, kept = None, messages
    else:
        kept = [*(m for m in messages[:since] if m.role in SYSTEM), *messages[since:]]
    summary = "" if earlier is None else earlier.get("summary") or ""
    fitted = replace(chat, messages=_told(kept, summary))
    n_ctx = engine.description.n_ctx
    room = min(chat.sampling.max_tokens or n_ctx, n_ctx // ANSWER_SHARE)
    if _most_bytes(fitted) <= n_ctx - room:
        return Fitted(fitted, earlier)
    count = _counter(engine, chat, exchange.caller)
    limit = n_ctx - 1 if how == "stop" else n_ctx - room - (SUMMARY_TOKENS if summary else 0)
    pruned = await asyncio.to_thread(_pruned, messages, count, limit, n_ctx, how, since)
    if not pruned.dropped:
        return Fitted(replace(chat, messages=_told(pruned.messages, summary)), earlier)
    if how == "summarise":
        asked = await asyncio.to_thread(
            ask_for_summary, pruned.dropped, count, n_ctx - SUMMARY_TOKENS - 1, summary
        )
        summary = await _summary(exchange, engine, asked)
    if not ids:  # all of it came with this request: the session has nothing to leave out
        return Fitted(replace(chat, messages=_told(pruned.messages, summary)), earlier)
    after = ids[min(pruned.cut, len(ids)) - 1]
    note: dict[str, Any] = {"after": after, "messages": len(pruned.dropped)}
    if earlier is not None:
        note["messages"] += earlier["messages"]
    if summary:
        note["summary"] = summary
    return Fitted(replace(chat, messages=_told(pruned.messages, summary)), note, is_new=True)


def _earlier(path: Sequence[StoredMessage]) -> dict[str, Any] | None:
    """What the latest reply left out."""
    usage = next((m.usage for m in reversed(path) if m.role == "assistant" and m.usage), {})
    note = usage.get("pruned")
    if not isinstance(note, dict) or not isinstance(note.get("messages"), int):
        return None
    return note if isinstance(note.get("after"), str) else None


def _told(messages: Sequence[Message], summary: str) -> tuple[Message, ...]:
    return with_summary(messages, summary) if summary else tuple(messages)


def _pruned(
    messages: Sequence[Message],
    count: Callable[[Sequence[Message]], int],
    limit: int,
    n_ctx: int,
    how: Pruning,
    since: int,
) -> Pruned:
    """At most ``limit`` tokens; a newest turn that alone is longer may leave less to the answer."""
    try:
        return prune(messages, count, limit, how, since=since)
    except ContextLengthError:
        most = n_ctx - 1
        try:
            return prune(messages, count, most, how, since=since, target=limit * 3 // 4)
        except ContextLengthError as error:
            raise ContextLengthError(error.num_tokens, n_ctx, "messages") from None


def _counter(engine: EngineClient, chat: Chat, caller: str) -> Callable[[Sequence[Message]], int]:
    """Counts the prompt tokens of messages. It waits for the engine: not on the loop."""

    def count(messages: Sequence[Message]) -> int:
        asked = replace(chat, messages=tuple(messages), continue_final=False)
        request = asked.request(new_id("count"), engine.description)
        check_size(request, engine.description.n_ctx)
        question = TokenizeChat(asked.messages, request.tools, request.template_options)
        inquiry = Inquiry(request.request_id, question, caller)
        return len(engine.inquire(inquiry).result(COUNT_S).tokens)

    return count


async def _summary(exchange: Exchange, engine: EngineClient, asked: Sequence[Message]) -> str:
    """The model's own summary; without one the messages are only dropped."""
    chat = Chat(
        messages=tuple(asked),
        sampling=SamplingParams(max_tokens=SUMMARY_TOKENS, temperature=0),
        reasoning_effort="none" if engine.description.reasoning else None,
    )
    answer = Answer(engine, chat, new_id("summary"), exchange, lambda _: None)
    try:
        events, _ = await answer.whole()
    except ContextLengthError:
        return ""
    finally:
        answer.close()
    return "".join(event.text for event in events if isinstance(event, Content)).strip()


def _most_bytes(chat: Chat) -> int:
    """Bytes of all texts of a chat: no tokenizer makes more tokens of them."""
    size = CHAT_BYTES
    for message in chat.messages:
        size += len(message.text.encode()) + MESSAGE_BYTES
        size += len((message.reasoning_content or "").encode())
        size += sum(len(c.arguments.encode()) + MESSAGE_BYTES for c in message.tool_calls)
    for tool in chat.tools:
        size += len(json.dumps(tool.parameters)) + len(tool.description.encode()) + 128
    return size
