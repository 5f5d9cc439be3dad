"""A session in a chat request of any dialect: its history goes before the request's messages.

The request stays its client's: it ends when the client leaves, and what there is of the answer is
kept. Tornado loop only; knows no dialect.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING

from llmkit.chat.parsers.events import Event
from llmkit.chat.reading import AnswerReader
from llmkit.errors import ConflictError, InvalidRequestError
from llmkit.gateway.access.refusals import displaced
from llmkit.gateway.chats import Chat
from llmkit.gateway.conversations.fitting import fit
from llmkit.gateway.conversations.keeping import Keeping
from llmkit.gateway.conversations.placing import settled_path
from llmkit.gateway.conversations.uses import Use
from llmkit.gateway.exchange import ClientGoneError, Exchange
from llmkit.gateway.failures import ApiError, api_error
from llmkit.protocol import INSTRUCTIONS, Completion, Delta, Message, ModelDescription
from llmkit.protocol.client import EngineClient
from llmkit.store.conversation_records import (
    MAX_TITLE,
    UNDER_WAY,
    NewMessage,
    StoredConversation,
    StoredMessage,
    is_session_id,
)

if TYPE_CHECKING:
    from llmkit.store.conversations import ConversationStore

__all__ = ["check_no_session", "recalled"]

# Clients send ids of their own in headers of these names, so that only ours count there.
HEADERS = ("session-id", "session_id", "x-session-id")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionChat(Chat):
    """A chat whose answer is kept in a session."""

    keeping: Keeping

    def reader(self, model: ModelDescription) -> AnswerReader:
        return KeepingReader(Chat.reader(self, model), self.keeping)

    async def finished(self) -> None:
        await self.keeping.begun()
        await self.keeping.end()


class KeepingReader(AnswerReader):
    """A reader whose events are kept."""

    def __init__(self, reader: AnswerReader, keeping: Keeping) -> None:
        self._reader, self._keeping = reader, keeping

    def read(self, deltas: Sequence[Delta]) -> list[Event]:
        events = self._reader.read(deltas)
        self._keeping.take(events)
        return events

    def end(self, completion: Completion) -> tuple[list[Event], Completion]:
        events, completion = self._reader.end(completion)
        self._keeping.take(events)
        self._keeping.completion = completion
        self._keeping.start_end()  # while the last text is sent
        return events, completion


async def recalled(
    exchange: Exchange, engine: EngineClient, chat: Chat, session_id: str | None
) -> Chat:
    """The chat with its session's history before it; as it is without a session.

    The session is named by the body's ``session_id`` or a header; one that is no id of ours is a
    title, and a session is begun if none has it. The request's messages are stored,
    and its answer will be. Raises `ApiError`, and what the store raises.
    """
    wanted = session_id or _named(exchange)
    if wanted is None:
        return chat
    if len(wanted) > MAX_TITLE or not wanted.strip() or not wanted.isprintable():
        raise InvalidRequestError(
            "session_id (session-id) must be a session's id, or a name of 1 to "
            f"{MAX_TITLE} printable characters.",
            "session_id",
        )
    assert exchange.turns is not None
    shelf = exchange.turns.shelf
    if chat.n > 1:
        raise InvalidRequestError("n must be 1 in a session.", "n")
    owner = exchange.identity.name
    first = next((i for i, m in enumerate(chat.messages) if m.role not in INSTRUCTIONS), None)
    if first is None:
        raise InvalidRequestError("messages hold nothing but a system prompt.", "messages")
    system, sent = chat.messages[:first], chat.messages[first:]
    exchange.cleanup.callback((use := shelf.uses.begin()).end)
    name = engine.description.name
    if is_session_id(wanted):
        session_id = wanted
    else:
        session_id = await shelf.call(owner, lambda store: _titled(store, use, owner, wanted, name))
    session, path, new = await shelf.call(
        owner, lambda store: _read(store, use, owner, session_id, sent), session_id
    )
    fitted = await fit(exchange, engine, chat, path, new, session.pruning, system=system)
    stored = [*(() if path else system), *(new[:-1] if chat.continue_final else new)]
    parent = path[-1].id if path else None
    told = [NewMessage.of(m, media=chat.files_of([m])) for m in stored]

    async def begun() -> StoredMessage:
        stored, _ = await shelf.finish(
            owner,
            lambda store: store.begin_turn(owner, session_id, parent, told, model=name),
            session_id,
        )
        return stored[-1]

    prefix = new[-1].text if chat.continue_final else ""
    # They are stored while the engine computes the prompt; no text is sent before.
    keeping = Keeping(shelf, owner, begun=begun(), prefix=prefix, pruned=fitted.pruned)
    exchange.before_events = keeping.begun
    turns = exchange.turns

    def ended(
        kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        failure = _failure(exchange, error)
        # Clients send again what they are told to, and then the question would be there twice.
        comes_again = failure is not None and "Retry-After" in failure.headers
        turns.finish(keeping.end(failure, comes_again=comes_again))

    exchange.cleanup.push(ended)
    values = {field.name: getattr(fitted.chat, field.name) for field in fields(Chat)}
    return SessionChat(**values, keeping=keeping)


def _failure(exchange: Exchange, error: BaseException | None) -> ApiError | None:
    """What its client is told of a request that ended so; None if it has left, or all went well."""
    record = exchange.record
    if isinstance(error, asyncio.CancelledError):  # by a stage, or since the client has left
        if record.is_displaced:
            return displaced(0)
        deadline = record.deadline
        is_late = deadline is not None and deadline.is_over
        return api_error(deadline.error(record)) if deadline is not None and is_late else None
    if isinstance(error, Exception) and not isinstance(error, ClientGoneError):
        return api_error(error)
    return None


def check_no_session(exchange: Exchange, session_id: str | None) -> None:
    """Raises `InvalidRequestError` if a request whose prompt is no chat names a session."""
    if session_id or _named(exchange):
        raise InvalidRequestError(
            "session_id (or the header session-id) continues a conversation, which needs the chat "
            "template: leave it out, or leave out use_chat_template: false.",
            "session_id",
        )


def _named(exchange: Exchange) -> str | None:
    values = (exchange.header(name) for name in HEADERS)
    return next((value for value in values if value and is_session_id(value)), None)


def _titled(store: ConversationStore, use: Use, owner: str, title: str, model: str) -> str:
    """The id of the session with this title, which is begun if none has it. Any thread."""
    known = store.titled(owner, title)
    session = known or store.create(owner, title=title, model=model, by_title=True)
    use.of(session.id)
    return session.id


def _read(
    store: ConversationStore, use: Use, owner: str, session_id: str, sent: Sequence[Message]
) -> tuple[StoredConversation, list[StoredMessage], Sequence[Message]]:
    """The session, its path, and what of the messages it does not have. Any thread."""
    session, path = store.opened(owner, session_id)
    use.of(session.id)
    path = settled_path(store, owner, session.id, session.head, path)
    if path and path[-1].status == "running":
        raise ConflictError(f"{UNDER_WAY} Wait for it, or cancel it.")
    return session, path, _news(sent, path)


def _news(messages: Sequence[Message], path: Sequence[StoredMessage]) -> Sequence[Message]:
    """What of a request the session does not have: some clients send all of it each time."""
    known = [(m.role, m.text, m.digests) for m in path if m.role not in INSTRUCTIONS]
    sent = [(m.role, m.text, [i.digest for i in m.media]) for m in messages[: len(known)]]
    return messages[len(known) :] if known == sent and len(messages) > len(known) else messages
