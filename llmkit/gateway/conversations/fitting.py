"""A conversation fitted into the model's context, by the engine's own count of tokens.

What was left out is remembered with the reply (``usage.pruned``), so that the next turn leaves out
the same, and its prompt begins with what is computed already. Tornado loop only; long histories are
walked on a thread, where counting waits for the engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmkit.chat.parsers.events import Content
from llmkit.errors import ContextLengthError, InvalidRequestError
from llmkit.gateway.answers import Answer
from llmkit.gateway.aside import Waiting
from llmkit.gateway.chats import Chat
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ids import new_id
from llmkit.media.taking import MAX_MEDIA, check_takes
from llmkit.protocol import (
    INSTRUCTIONS,
    Inquiry,
    Message,
    SamplingParams,
    TokenizeChat,
    check_size,
)
from llmkit.protocol.client import EngineClient
from llmkit.sessions.pruning import Pruned, ask_for_summary, prune, with_summary
from llmkit.store.conversation_records import Pruning, StoredMessage
from llmkit.store.media_parts import with_words

__all__ = ["Fitted", "fit"]

MESSAGE_BYTES, CHAT_BYTES = 64, 512  # what a template adds to texts, at most, about
ANSWER_SHARE = 4  # at most a quarter of the context is left to the answer
SUMMARY_TOKENS = 400
COUNT_S = 60.0
MEDIA_TOKENS = 16_384  # one of them, at most, about
SHORT, SHORT_CHARS = 64, 64 << 10  # messages, and their characters, that are walked at once


@dataclass(frozen=True, slots=True)
class Fitted:
    """A chat that fits. ``pruned`` says what is left out of it, ``is_new`` whether only now."""

    chat: Chat
    pruned: dict[str, Any] | None = None
    is_new: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """A history and what is new, as messages. ``ids`` are of all but the new ones.

    ``earlier`` is what the turn before left out, up to message ``since``; ``chat`` is without it,
    and ``most`` its greatest possible number of tokens.
    """

    ids: list[str]
    messages: list[Message]
    earlier: dict[str, Any] | None
    since: int
    summary: str
    chat: Chat
    most: int


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
    assert exchange.turns is not None
    chat, path = await _with_media(exchange, engine, chat, path, new)
    who, counting = exchange.counted_as, exchange.turns.counting(engine.description.name)
    told = (
        _told(chat, path, new, system)
        if _is_short(path, new)
        else await counting.run(who, lambda _: _told(chat, path, new, system))
    )
    n_ctx = engine.description.n_ctx
    room = min(chat.sampling.max_tokens or n_ctx, n_ctx // ANSWER_SHARE)
    if told.most <= n_ctx - room:
        return Fitted(told.chat, told.earlier)
    summary, since = told.summary, told.since
    limit = n_ctx - 1 if how == "stop" else n_ctx - room - (SUMMARY_TOKENS if summary else 0)

    def pruning(waiting: Waiting) -> Pruned:
        count = _counter(engine, chat, exchange.caller, waiting)
        return _pruned(told.messages, count, limit, n_ctx, how, since)

    pruned = await counting.run(who, pruning)
    if not pruned.dropped:
        return Fitted(_summed_up(chat, pruned.messages, summary), told.earlier)
    if how == "summarise":

        def asking(waiting: Waiting) -> list[Message]:
            count = _counter(engine, chat, exchange.caller, waiting)
            return ask_for_summary(pruned.dropped, count, n_ctx - SUMMARY_TOKENS - 1, summary)

        summary = await _summary(exchange, engine, await counting.run(who, asking))
    ids, earlier = told.ids, told.earlier
    if not ids:  # all of it came with this request: the session has nothing to leave out
        return Fitted(_summed_up(chat, pruned.messages, summary), earlier)
    after = ids[min(pruned.cut, len(ids)) - 1]
    note: dict[str, Any] = {"after": after, "messages": len(pruned.dropped)}
    if earlier is not None:
        note["messages"] += earlier["messages"]
    if summary:
        note["summary"] = summary
    return Fitted(_summed_up(chat, pruned.messages, summary), note, is_new=True)


async def _with_media(
    exchange: Exchange,
    engine: EngineClient,
    chat: Chat,
    path: Sequence[StoredMessage],
    new: Sequence[Message],
) -> tuple[Chat, Sequence[StoredMessage]]:
    """The chat with the files of the history and of the new messages.

    Only the latest are told, and words in place of the others, and of those that are gone. Raises
    `InvalidRequestError` if the model takes none of their kind.
    """
    items = [item for message in new for item in message.media]
    digests = [digest for message in path for digest in message.digests]
    if not items and not digests:
        return chat, path
    assert exchange.turns is not None
    told = [*(item for m in path if m.digests for item in m.message.media), *items]
    for item in told:
        check_takes(engine.description, item.kind, "messages")
    wanted = {item.digest for item in told[-MAX_MEDIA:]} - chat.media.keys()
    owner = exchange.identity.name
    files = await exchange.turns.shelf.look(owner, lambda store: store.media(owner, wanted))
    files = {**files, **chat.media}
    if any(item.digest not in files for item in items):
        raise InvalidRequestError("messages: there is no picture of this digest.", "messages")
    return replace(chat, media=files), [
        replace(m, content=with_words(m.content, files)) if m.digests else m for m in path
    ]


def _is_short(path: Sequence[StoredMessage], new: Sequence[Message]) -> bool:
    """Whether looking at all of it takes no time."""
    if len(path) + len(new) > SHORT:
        return False
    return sum(m.size for m in path) + sum(len(m.text) for m in new) <= SHORT_CHARS


def _told(
    chat: Chat,
    path: Sequence[StoredMessage],
    new: Sequence[Message],
    system: Sequence[Message],
) -> Told:
    """Any thread: takes as long as the history is."""
    told = [m for m in path if m.role != "assistant" or m.text or m.tool_calls]
    if system:
        told = [m for m in told if m.role not in INSTRUCTIONS]
    ids = [*("" for _ in system), *(m.id for m in told)]
    messages = [*system, *(m.message for m in told), *new]
    earlier = _earlier(path)
    since = ids.index(earlier["after"]) + 1 if earlier and earlier["after"] in ids else 0
    if earlier is None or not since:
        earlier, kept = None, messages
    else:
        kept = [*(m for m in messages[:since] if m.role in INSTRUCTIONS), *messages[since:]]
    summary = "" if earlier is None else earlier.get("summary") or ""
    chat = _summed_up(chat, kept, summary)
    return Told(ids, messages, earlier, since, summary, chat, _most_bytes(chat))


def _earlier(path: Sequence[StoredMessage]) -> dict[str, Any] | None:
    """What the latest reply left out."""
    usage = next((m.usage for m in reversed(path) if m.role == "assistant" and m.usage), {})
    note = usage.get("pruned")
    if not isinstance(note, dict) or not isinstance(note.get("messages"), int):
        return None
    return note if isinstance(note.get("after"), str) else None


def _summed_up(chat: Chat, messages: Sequence[Message], summary: str) -> Chat:
    """The chat with these messages, after a summary of others."""
    return replace(chat, messages=with_summary(messages, summary) if summary else tuple(messages))


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


def _counter(
    engine: EngineClient, chat: Chat, caller: str, waiting: Waiting
) -> Callable[[Sequence[Message]], int]:
    """Counts the prompt tokens of messages, while somebody waits for that. Any thread: the engine
    takes its time. It is sent each file once, then knows how many tokens that takes."""
    sent: set[str] = set()

    def count(messages: Sequence[Message]) -> int:
        waiting.check()
        asked = replace(chat, messages=tuple(messages), continue_final=False)
        request = asked.request(new_id("count"), engine.description)
        check_size(request, engine.description.n_ctx)
        used = {item.digest for message in asked.messages for item in message.media}
        media = {digest: request.media[digest] for digest in used & request.media.keys()}

        def tokens(files: dict[str, bytes]) -> int:
            question = TokenizeChat(
                asked.messages, request.tools, request.template_options, media=files
            )
            inquiry = Inquiry(request.request_id, question, caller)
            return len(waiting.result(engine.inquire(inquiry), COUNT_S).tokens)

        try:
            number = tokens({digest: media[digest] for digest in media.keys() - sent})
        except InvalidRequestError as error:
            if isinstance(error, ContextLengthError) or not media.keys() & sent:
                raise
            number = tokens(media)  # it knows them no longer
        sent.update(media)
        return number

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
        size += len(message.text.encode()) + MESSAGE_BYTES + MEDIA_TOKENS * len(message.media)
        size += len((message.reasoning_content or "").encode())
        size += sum(len(c.arguments.encode()) + MESSAGE_BYTES for c in message.tool_calls)
    for tool in chat.tools:
        size += len(json.dumps(tool.parameters)) + len(tool.description.encode()) + 128
    return size
