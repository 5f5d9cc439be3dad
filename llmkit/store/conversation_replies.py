"""Replies that are being written: begun, checkpointed, ended, and found when their writer is gone.

A row of `Replies` is the lease of one. Functions of a transaction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from llmkit.errors import ConflictError, InvalidRequestError, NotFoundError
from llmkit.store.conversation_records import NewMessage, StoredMessage, Unset, storable
from llmkit.store.conversation_rows import (
    MESSAGES,
    add_chain,
    as_read,
    find,
    message_values,
    read_message,
    used,
)
from llmkit.store.tables import Conversations, Messages, Replies
from llmkit.store.writers import is_gone

__all__ = ["begin", "cancel", "check_parent", "checkpoint", "end", "lost", "recover", "renew"]

REPLIES: Any = Replies.__table__


def begin(
    session: Session,
    row: Conversations,
    parent_id: str | Unset | None,
    messages: Sequence[NewMessage],
    model: str,
    branch: bool,
    writer: str,
    now: float,
) -> list[StoredMessage]:
    """Implements `ConversationStore.begin_turn` in a locked conversation."""
    running = _running(session, row, now)
    parent = row.head if isinstance(parent_id, Unset) else parent_id
    under_way = next((r for r in running if r.message_id == parent), None)
    if under_way is not None and branch:
        parent = under_way.stem_id if messages else under_way.parent_id
    elif under_way is not None or (
        not branch and any(parent in (r.stem_id, r.parent_id) for r in running)
    ):
        raise ConflictError(
            "an answer is being written at this place of the session. Wait for its end, cancel "
            "it, or ask for a branch."
        )
    if parent is None and not messages:
        raise InvalidRequestError("there is no message to answer yet.", "messages")
    reply = NewMessage("assistant", status="running", model=model)
    added = add_chain(session, row, parent, [*messages, reply], now)
    lease = {
        "message_id": added[-1].id,
        "conversation_id": row.id,
        "stem_id": parent,
        "before_id": row.head,
        "writer": writer,
        "renewed_at": now,
    }
    session.execute(sa.insert(REPLIES), lease)
    row.head = added[-1].id
    used(row, now)
    return added


def _running(session: Session, row: Conversations, now: float) -> Sequence[Any]:
    """The running replies, with their parents, whose writers live; others are partial now."""
    query = (
        sa.select(REPLIES, Messages.parent_id)
        .join(Messages, Messages.id == Replies.message_id)
        .where(Replies.conversation_id == row.id)
        .order_by(Messages.number)
    )
    running = session.execute(query).all()
    if any(is_gone(r.writer, r.renewed_at, now) for r in running):
        recover(session, row, now)
        return session.execute(query).all()
    return running


def check_parent(session: Session, row: Conversations, parent_id: str, now: float) -> None:
    """Raises `ConflictError` if the parent of new messages is still being written."""
    if read_message(session, row.id, parent_id).status == "running":
        recover(session, row, now)
        if read_message(session, row.id, parent_id).status == "running":
            raise ConflictError("the message to which these belong is still being written.")


def checkpoint(
    session: Session,
    conversation_id: str,
    message_id: str,
    text: str,
    reasoning: str | None,
    writer: str,
    now: float,
) -> None:
    """Implements `ConversationStore.update_reply`."""
    lease = _lease(conversation_id, message_id, writer)
    renewed = session.execute(sa.update(REPLIES).where(lease).values(renewed_at=now))
    if not renewed.rowcount:  # type: ignore[attr-defined]
        find(session, None, conversation_id, now)
        read_message(session, conversation_id, message_id)
        raise ConflictError("the answer was taken for cut off, or has ended.")
    session.execute(
        sa.update(MESSAGES)
        .where(MESSAGES.c.id == message_id)
        .values(
            content=storable(text), reasoning=None if reasoning is None else storable(reasoning)
        )
    )


def end(
    session: Session,
    row: Conversations,
    message_id: str,
    message: NewMessage,
    lease: str,
    now: float,
) -> StoredMessage:
    """Implements `ConversationStore.end_reply` in a locked conversation."""
    known = read_message(session, row.id, message_id)
    message = replace(message, model=message.model or known.model)
    if not _release(session, row.id, message_id, lease):
        if known.status != "partial":
            raise ConflictError("the answer has ended before.")
        (kept,) = add_chain(session, row, known.parent_id, [message], now)
        if row.head == message_id:
            row.head = kept.id
        used(row, now)
        return kept
    values = message_values(message)
    session.execute(sa.update(MESSAGES).where(MESSAGES.c.id == message_id).values(**values))
    row.num_chars += message.size
    used(row, now)
    fixed = ("id", "conversation_id", "parent_id", "number", "created_at")
    return as_read({name: getattr(known, name) for name in fixed} | values)


def _release(session: Session, conversation_id: str, message_id: str, writer: str) -> bool:
    """Give a lease back; False if it was lost."""
    done = session.execute(sa.delete(REPLIES).where(_lease(conversation_id, message_id, writer)))
    return bool(done.rowcount)  # type: ignore[attr-defined]


def _lease(conversation_id: str, message_id: str, writer: str) -> Any:
    """The row of a lease that this writer holds."""
    columns = REPLIES.c
    return sa.and_(
        columns.message_id == message_id,
        columns.conversation_id == conversation_id,
        columns.writer == writer,
    )


def cancel(session: Session, row: Conversations, message_id: str, writer: str, now: float) -> None:
    """Implements `ConversationStore.cancel_turn` in a locked conversation."""
    lease = session.get(Replies, message_id)
    if lease is None or lease.conversation_id != row.id or lease.writer != writer:
        raise NotFoundError(f"no answer {message_id!r:.60} is being written.")
    stem, before = lease.stem_id, lease.before_id
    session.delete(lease)
    session.flush()
    gone: str | None = message_id
    while gone is not None and gone != stem:
        if session.scalar(
            sa.select(Messages.id)
            .where(Messages.conversation_id == row.id, Messages.parent_id == gone)
            .limit(1)
        ):
            break  # somebody builds on it
        message = read_message(session, row.id, gone)
        session.execute(sa.delete(Messages).where(Messages.id == gone))
        row.num_messages -= 1
        row.num_chars = max(0, row.num_chars - message.size)
        if row.head == gone:
            row.head = message.parent_id
        gone = message.parent_id
    if row.head == stem and (before is None or _is_there(session, row.id, before)):
        row.head = before
    used(row, now)


def _is_there(session: Session, conversation_id: str, message_id: str) -> bool:
    query = sa.select(Messages.id).where(
        Messages.id == message_id, Messages.conversation_id == conversation_id
    )
    return session.scalar(query) is not None


def renew(session: Session, writer: str, now: float) -> None:
    """Renew all leases of a writer."""
    session.execute(sa.update(Replies).where(Replies.writer == writer).values(renewed_at=now))


def lost(session: Session, now: float) -> list[str]:
    """Conversations with replies whose writer is gone."""
    query = sa.select(Replies.conversation_id, Replies.writer, Replies.renewed_at)
    rows = session.execute(query).all()
    return sorted({r.conversation_id for r in rows if is_gone(r.writer, r.renewed_at, now)})


def recover(session: Session, row: Conversations, now: float) -> int:
    """Let replies in a locked conversation whose writer is gone be partial; how many."""
    leases = session.scalars(sa.select(Replies).where(Replies.conversation_id == row.id)).all()
    gone = [each for each in leases if is_gone(each.writer, each.renewed_at, now)]
    for lease in gone:
        values: dict[str, Any] = {"status": "partial", "finish_reason": "abort"}
        where = sa.and_(Messages.id == lease.message_id, Messages.status == "running")
        session.execute(sa.update(Messages).where(where).values(**values))
        session.delete(lease)
    if gone:
        session.flush()
        row.updated_at = now
        row.version += 1
    return len(gone)
