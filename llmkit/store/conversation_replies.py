"""Replies that are being written: begun, checkpointed, ended, and found when their writer is gone.

A row of `Replies` is the lease of one. Functions of a transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llmkit.errors import ConflictError, InvalidRequestError, NotFoundError
from llmkit.store.conversation_records import (
    UNDER_WAY,
    NewMessage,
    StoredMessage,
    Unset,
    storable,
)
from llmkit.store.conversation_rows import (
    Row,
    add_chain,
    as_read,
    find,
    message_values,
    read_message,
    used,
)
from llmkit.store.conversation_statements import (
    FILL_REPLY,
    HELD,
    ID,
    LEASE,
    MESSAGES,
    RELEASE,
    REPLIES,
    RUNNING,
    USE,
)
from llmkit.store.writers import is_gone

__all__ = [
    "begin",
    "cancel",
    "check_parent",
    "checkpoint",
    "end",
    "end_known",
    "lost",
    "recover",
    "renew",
]

COLUMNS = REPLIES.c
RENEW = sa.update(REPLIES).where(HELD)
RENEWED = 500  # in one statement
CHANGE = sa.update(MESSAGES).where(MESSAGES.c.id == ID)


def begin(
    connection: Connection,
    row: Row,
    parent_id: str | Unset | None,
    messages: Sequence[NewMessage],
    model: str,
    branch: bool,
    writer: str,
    now: float,
) -> list[StoredMessage]:
    """Implements `ConversationStore.begin_turn` in a locked conversation."""
    running = _running(connection, row, now)
    parent = row.head if isinstance(parent_id, Unset) else parent_id
    under_way = next((r for r in running if r.message_id == parent), None)
    if under_way is not None and branch:
        parent = under_way.stem_id if messages else under_way.parent_id
    elif under_way is not None or (
        not branch and any(parent in (r.stem_id, r.parent_id) for r in running)
    ):
        raise ConflictError(
            f"{UNDER_WAY} Wait for it, cancel it, or ask for a branch (branch: true)."
        )
    if parent is None and not messages:
        raise InvalidRequestError("there is no message to answer yet.", "messages")
    reply = NewMessage("assistant", status="running", model=model)
    added = add_chain(connection, row, parent, [*messages, reply], now)
    lease = {
        "message_id": added[-1].id,
        "conversation_id": row.id,
        "stem_id": parent,
        "before_id": row.head,
        "writer": writer,
        "renewed_at": now,
    }
    LEASE.run(connection, lease)
    row.head = added[-1].id
    used(row, now)
    return added


def _running(connection: Connection, row: Row, now: float) -> Sequence[Any]:
    """The running replies, with their parents, whose writers live; others are partial now."""
    running = RUNNING.rows(connection, {"here": row.id})
    if any(is_gone(r.writer, r.renewed_at, now) for r in running):
        recover(connection, row, now)
        return RUNNING.rows(connection, {"here": row.id})
    return running


def check_parent(connection: Connection, row: Row, parent_id: str, now: float) -> None:
    """Raises `ConflictError` if the parent of new messages is still being written."""
    if read_message(connection, row.id, parent_id).status == "running":
        recover(connection, row, now)
        if read_message(connection, row.id, parent_id).status == "running":
            raise ConflictError("the message to which these belong is still being written.")


def checkpoint(
    connection: Connection,
    conversation_id: str,
    message_id: str,
    text: str,
    reasoning: str | None,
    writer: str,
    now: float,
) -> None:
    """Implements `ConversationStore.update_reply`."""
    lease = {"of": message_id, "here": conversation_id, "by": writer}
    if not connection.execute(RENEW, {**lease, "renewed_at": now}).rowcount:
        find(connection, None, conversation_id, now)
        read_message(connection, conversation_id, message_id)
        raise ConflictError("the answer was taken for cut off, or has ended.")
    thoughts = None if reasoning is None else storable(reasoning)
    connection.execute(CHANGE, {"of": message_id, "content": storable(text), "reasoning": thoughts})


def end(
    connection: Connection,
    row: Row,
    message_id: str,
    message: NewMessage,
    lease: str,
    now: float,
) -> StoredMessage:
    """Implements `ConversationStore.end_reply` in a locked conversation."""
    known = read_message(connection, row.id, message_id)
    message = replace(message, model=message.model or known.model)
    if not _release(connection, row.id, message_id, lease):
        if known.status != "partial":
            raise ConflictError("the answer has ended before.")
        (kept,) = add_chain(connection, row, known.parent_id, [message], now)
        if row.head == message_id:
            row.head = kept.id
        used(row, now)
        return kept
    row.num_chars += message.size
    used(row, now)
    return _fill(connection, known, message)


def end_known(
    connection: Connection, begun: StoredMessage, message: NewMessage, writer: str, now: float
) -> StoredMessage:
    """`end` with fewer questions, for a reply that was ``begun`` here.

    Raises `NotFoundError` if that is not running any more, to be rolled back.
    """
    use = {"of": begun.conversation_id, "now": now, "more": message.size}
    if not USE.run(connection, use) or not _release(
        connection, begun.conversation_id, begun.id, writer
    ):
        raise NotFoundError("the answer was taken for cut off, or has ended.")
    return _fill(connection, begun, replace(message, model=message.model or begun.model))


def _fill(connection: Connection, known: StoredMessage, message: NewMessage) -> StoredMessage:
    """Store all of a reply in place of its beginning."""
    values = message_values(message)
    FILL_REPLY.run(connection, {"of": known.id, **values})
    fixed = ("id", "conversation_id", "parent_id", "number", "created_at")
    return as_read({name: getattr(known, name) for name in fixed} | values)


def _release(connection: Connection, conversation_id: str, message_id: str, writer: str) -> bool:
    """Give a lease back; False if it was lost."""
    lease = {"of": message_id, "here": conversation_id, "by": writer}
    return bool(RELEASE.run(connection, lease))


def cancel(connection: Connection, row: Row, message_id: str, writer: str, now: float) -> None:
    """Implements `ConversationStore.cancel_turn` in a locked conversation."""
    wanted = sa.select(REPLIES).where(COLUMNS.message_id == message_id)
    lease = connection.execute(wanted).one_or_none()
    if lease is None or lease.conversation_id != row.id or lease.writer != writer:
        raise NotFoundError(f"no answer {message_id!r:.60} is being written.")
    stem, before = lease.stem_id, lease.before_id
    _release(connection, row.id, message_id, writer)
    gone: str | None = message_id
    while gone is not None and gone != stem:
        if connection.scalar(
            sa.select(MESSAGES.c.id)
            .where(MESSAGES.c.conversation_id == row.id, MESSAGES.c.parent_id == gone)
            .limit(1)
        ):
            break  # somebody builds on it
        message = read_message(connection, row.id, gone)
        connection.execute(sa.delete(MESSAGES).where(MESSAGES.c.id == gone))
        row.num_messages -= 1
        row.num_chars = max(0, row.num_chars - message.size)
        if row.head == gone:
            row.head = message.parent_id
        gone = message.parent_id
    if row.head == stem and (before is None or _is_there(connection, row.id, before)):
        row.head = before
    used(row, now)


def _is_there(connection: Connection, conversation_id: str, message_id: str) -> bool:
    query = sa.select(MESSAGES.c.id).where(
        MESSAGES.c.id == message_id, MESSAGES.c.conversation_id == conversation_id
    )
    return connection.scalar(query) is not None


def renew(connection: Connection, writer: str, ids: Sequence[str], now: float) -> None:
    """Renew a writer's leases of these replies."""
    for first in range(0, len(ids), RENEWED):
        some = COLUMNS.message_id.in_(ids[first : first + RENEWED])
        where = sa.and_(COLUMNS.writer == writer, some)
        connection.execute(sa.update(REPLIES).where(where).values(renewed_at=now))


def lost(connection: Connection, now: float) -> list[str]:
    """Conversations with replies whose writer is gone."""
    query = sa.select(REPLIES.c.conversation_id, REPLIES.c.writer, REPLIES.c.renewed_at)
    rows = connection.execute(query).all()
    return sorted({r.conversation_id for r in rows if is_gone(r.writer, r.renewed_at, now)})


def recover(connection: Connection, row: Row, now: float) -> int:
    """Let replies in a locked conversation whose writer is gone be partial; how many."""
    leases = connection.execute(sa.select(REPLIES).where(COLUMNS.conversation_id == row.id)).all()
    gone = [each for each in leases if is_gone(each.writer, each.renewed_at, now)]
    for lease in gone:
        values: dict[str, Any] = {"status": "partial", "finish_reason": "abort"}
        where = sa.and_(MESSAGES.c.id == lease.message_id, MESSAGES.c.status == "running")
        connection.execute(sa.update(MESSAGES).where(where).values(**values))
        connection.execute(sa.delete(REPLIES).where(COLUMNS.message_id == lease.message_id))
    if gone:
        row.updated_at = now
        row.version += 1
    return len(gone)
