"""Rows of conversations and messages, read and written in somebody's transaction."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llmkit.errors import ConflictError, InvalidRequestError, NotFoundError
from llmkit.protocol import Message, ToolCall
from llmkit.store import media
from llmkit.store.conversation_bounds import MUCH_CHARS, check_owner
from llmkit.store.conversation_records import (
    MAX_CHARS,
    MAX_MESSAGES,
    NewMessage,
    StoredConversation,
    StoredMessage,
    new_id,
    said_in,
    storable,
)
from llmkit.store.conversation_statements import (
    ANCESTORS,
    CONVERSATIONS,
    FIND,
    FIND_LOCKED,
    INSERT_MESSAGES,
    LAST_NUMBER,
    MESSAGES,
    NUMBER_AFTER,
    READ_MESSAGE,
    REPLIES,
    SAVE_USE,
    USE_FIELDS,
)

__all__ = [
    "CONVERSATIONS",
    "MESSAGES",
    "REPLIES",
    "Row",
    "add",
    "add_chain",
    "as_new",
    "as_read",
    "check_version",
    "conversation_of",
    "find",
    "in_progress",
    "insert",
    "make_room",
    "message_of",
    "message_values",
    "owner_key",
    "read_message",
    "read_messages",
    "read_path",
    "save",
    "used",
]

MAX_OWNER = 255
NEAR = 16  # ancestors looked at before a whole path is read
SAVE = sa.update(CONVERSATIONS).where(CONVERSATIONS.c.id == sa.bindparam("of"))


class Row(SimpleNamespace):
    """A conversation's columns, to be changed and saved."""


def owner_key(owner: str) -> str:
    """An owner's name as it is stored; a very long one is cut, and stays another's not."""
    owner = storable(owner)
    if len(owner) <= MAX_OWNER:
        return owner
    return f"{owner[:180]} {hashlib.sha256(owner.encode()).hexdigest()}"


def as_new(messages: Iterable[NewMessage | Message]) -> list[NewMessage]:
    return [m if isinstance(m, NewMessage) else NewMessage.of(m) for m in messages]


def find(
    connection: Connection,
    owner: str | None,
    conversation_id: str,
    now: float,
    *,
    lock: bool = False,
) -> Row:
    """A conversation's row; ``lock`` keeps other writers out. Raises `NotFoundError`.

    Without an owner, for a reply that was begun, it may have expired meanwhile.
    """
    query = FIND_LOCKED if lock else FIND
    found = query.first(connection, {"of": storable(conversation_id)})
    if found is None or (
        owner is not None
        and (found.owner != owner_key(owner) or (found.expires_at or math.inf) <= now)
    ):
        raise NotFoundError(
            f"there is no session {conversation_id!r:.60}: it does not exist, or was deleted or "
            "expired."
        )
    return Row(**found._asdict())


def save(connection: Connection, row: Row, **more: Any) -> None:
    """Store what a turn changes of a conversation, and ``more`` columns."""
    values = {"of": row.id, **{name: getattr(row, name) for name in USE_FIELDS}}
    if more:
        connection.execute(SAVE, {**values, **more})
    else:
        SAVE_USE.run(connection, values)


def add(connection: Connection, owner: str, values: dict[str, Any], now: float) -> Row:
    """An empty conversation with these columns."""
    row = Row(
        **{"by_title": False, **values},
        id=new_id("sess"),
        owner=owner_key(owner),
        version=1,
        num_messages=0,
        num_chars=0,
        created_at=now,
        updated_at=now,
        used_at=now,
        expires_at=None if values["ttl_s"] is None else now + values["ttl_s"],
    )
    connection.execute(sa.insert(CONVERSATIONS), vars(row))
    return row


def used(row: Row, now: float, *, changed: bool = True) -> None:
    """Note that a conversation was used now, and ``changed``."""
    row.used_at = max(now, row.used_at)
    row.expires_at = None if row.ttl_s is None else row.used_at + row.ttl_s
    if changed:
        row.updated_at = now
        row.version += 1


def check_version(row: Row, version: int | None) -> None:
    """Raises `ConflictError` if somebody else changed it."""
    if version is not None and version != row.version:
        raise ConflictError(
            f"the session was changed meanwhile: it has version {row.version}, not {version:d}. "
            "Read it again."
        )


def conversation_of(row: Any) -> StoredConversation:
    return StoredConversation(
        row.id,
        row.owner,
        row.title,
        row.model,
        row.settings,
        row.pruning,
        row.head,
        row.version,
        row.created_at,
        row.updated_at,
        row.used_at,
        row.ttl_s,
        row.expires_at,
        row.num_messages,
    )


def message_of(row: Any) -> StoredMessage:
    return StoredMessage(
        row.id,
        row.conversation_id,
        row.parent_id,
        row.number,
        row.role,
        row.content if row.parts is None else row.parts,
        row.reasoning,
        tuple(ToolCall(*call) for call in row.tool_calls or ()),
        row.tool_call_id,
        row.name,
        row.status,
        row.finish_reason,
        row.model,
        row.usage,
        row.created_at,
    )


def message_values(message: NewMessage) -> dict[str, Any]:
    """The columns that a message's own fields fill."""
    is_text = isinstance(message.content, str)
    text = message.content if isinstance(message.content, str) else _text(message.content)
    optional = {
        name: None if value is None else storable(value)
        for name in ("reasoning", "tool_call_id", "name", "finish_reason")
        for value in (getattr(message, name),)
    }
    return {
        "role": message.role,
        "content": storable(text),
        "parts": None if is_text else message.content,
        "tool_calls": [
            [storable(call.call_id), storable(call.name), storable(call.arguments)]
            for call in message.tool_calls
        ]
        or None,
        "status": message.status,
        "model": storable(message.model),
        "usage": message.usage,
        **optional,
    }


def _text(parts: list[dict[str, Any]]) -> str:
    """The text of parts, to be searched."""
    return "\n".join(text for part in parts if (text := said_in(part)) is not None)


def insert(
    connection: Connection,
    row: Row,
    messages: Sequence[tuple[str, str | None, NewMessage]],
    now: float,
) -> list[StoredMessage]:
    """Insert messages with their ids and parents, parents first, into a locked conversation.

    Raises `InvalidRequestError` if it would hold too much, and `NotFoundError` for a first parent
    that it does not hold.
    """
    size = sum(message.size for _, _, message in messages)
    if row.num_messages + len(messages) > MAX_MESSAGES or row.num_chars + size > MAX_CHARS:
        raise InvalidRequestError(
            f"a session holds {MAX_MESSAGES:,} messages and {MAX_CHARS >> 20} million characters "
            "at most; begin another one.",
            "messages",
        )
    if size > MUCH_CHARS:
        check_owner(connection, row.owner, size)
    first = _next_number(connection, row.id, messages[0][1] if messages else None)
    values = [
        {
            "id": message_id,
            "conversation_id": row.id,
            "parent_id": parent_id,
            "number": number,
            "created_at": now if message.created_at is None else message.created_at,
            **message_values(message),
        }
        for number, (message_id, parent_id, message) in enumerate(messages, first)
    ]
    if values:
        INSERT_MESSAGES.run_all(connection, values)
    digests = [digest for _, _, message in messages for digest in message.digests]
    if digests:
        files = {digest: data for _, _, m in messages for digest, data in m.media.items()}
        media.keep(connection, row.owner, digests, files, now, conversation_id=row.id)
    row.num_messages += len(messages)
    row.num_chars += size
    return [as_read(each) for each in values]


def _next_number(connection: Connection, conversation_id: str, parent_id: str | None) -> int:
    if parent_id is None:
        return (LAST_NUMBER.first(connection, {"here": conversation_id}).number or 0) + 1
    place = {"of": storable(parent_id), "here": conversation_id}
    last = NUMBER_AFTER.first(connection, place)
    if last is None:
        raise NotFoundError(f"the session has no message {parent_id!r:.60}.")
    return int(last.number) + 1


def as_read(values: dict[str, Any]) -> StoredMessage:
    fields = {**values, "tool_calls": tuple(ToolCall(*c) for c in values["tool_calls"] or ())}
    parts = fields.pop("parts")
    return StoredMessage(**{**fields, "content": fields["content"] if parts is None else parts})


def add_chain(
    connection: Connection,
    row: Row,
    parent_id: str | None,
    messages: Sequence[NewMessage],
    now: float,
) -> list[StoredMessage]:
    """Insert messages one below the other; the first is a child of ``parent_id``."""
    ids = [new_id("msg") for _ in messages]
    return insert(connection, row, list(zip(ids, [parent_id, *ids], messages, strict=False)), now)


def read_messages(connection: Connection, conversation_id: str) -> list[StoredMessage]:
    """All messages, by number."""
    query = sa.select(MESSAGES).where(MESSAGES.c.conversation_id == conversation_id)
    return [message_of(row) for row in connection.execute(query.order_by(MESSAGES.c.number))]


def read_message(connection: Connection, conversation_id: str, message_id: str) -> StoredMessage:
    """One message. Raises `NotFoundError`."""
    place = {"of": storable(message_id), "here": conversation_id}
    row = READ_MESSAGE.first(connection, place)
    if row is None:
        raise NotFoundError(f"the session has no message {message_id!r:.60}.")
    return message_of(row)


def read_path(
    connection: Connection,
    conversation_id: str,
    leaf: str,
    known: Sequence[StoredMessage] = (),
) -> list[StoredMessage]:
    """The messages from the root to ``leaf``. ``known`` is a path that need not be read again.

    Raises `NotFoundError`.
    """
    if known:
        end = next((i for i in range(len(known), 0, -1) if known[i - 1].id == leaf), 0)
        if end:
            return list(known[:end])
        places = {message.id: i for i, message in enumerate(known)}
        near = _ancestors(connection, conversation_id, leaf, NEAR)
        if near and (place := places.get(near[0].parent_id or "")) is not None:
            return [*known[: place + 1], *near]
        joint = next((i for i in range(len(near) - 1, -1, -1) if near[i].id in places), None)
        if joint is not None:
            return [*known[: places[near[joint].id] + 1], *near[joint + 1 :]]
    path = _ancestors(connection, conversation_id, leaf, MAX_MESSAGES)
    if not path:
        raise NotFoundError(f"the session has no message {leaf!r:.60}.")
    return path


def _ancestors(
    connection: Connection, conversation_id: str, leaf: str, count: int
) -> list[StoredMessage]:
    """A message and at most so many of its ancestors, oldest first."""
    place = {"of": storable(leaf), "here": conversation_id, "most": count}
    return [message_of(row) for row in ANCESTORS.rows(connection, place)]


def in_progress(conversation_id: Any) -> sa.Exists:
    """Whether a reply is being written in a conversation."""
    return sa.exists().where(REPLIES.c.conversation_id == conversation_id)


def make_room(connection: Connection, owner: str, keep: int, used_now: Collection[str]) -> None:
    """Delete an owner's conversations beyond ``keep``, none that is in use: those first that a
    title began, which any client may make up, then the least recently used."""
    count = connection.scalar(
        sa.select(sa.func.count()).select_from(CONVERSATIONS).where(CONVERSATIONS.c.owner == owner)
    )
    excess = (count or 0) - keep
    if excess <= 0:
        return
    oldest = connection.scalars(
        sa.select(CONVERSATIONS.c.id)
        .where(
            CONVERSATIONS.c.owner == owner,
            CONVERSATIONS.c.id.not_in(list(used_now)),
            ~in_progress(CONVERSATIONS.c.id),
        )
        .order_by(CONVERSATIONS.c.by_title.desc(), CONVERSATIONS.c.used_at, CONVERSATIONS.c.id)
        .limit(excess)
        .with_for_update(skip_locked=True)
    ).all()
    # Asked again now that nobody can begin a reply in them.
    connection.execute(
        sa.delete(CONVERSATIONS).where(
            CONVERSATIONS.c.id.in_(oldest), ~in_progress(CONVERSATIONS.c.id)
        )
    )
