"""Finding conversations: by words, by pages, by age; and the newest leaf of a branch."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from llmkit.errors import InvalidRequestError
from llmkit.store.conversation_records import StoredConversation, storable
from llmkit.store.conversation_rows import (
    conversation_of,
    find,
    in_progress,
    owner_key,
    read_message,
)
from llmkit.store.tables import Conversations, Messages

__all__ = ["newest_leaf", "remove_expired", "search", "titled"]

MAX_QUERY, MAX_LISTED = 1000, 1000


def search(
    session: Session, owner: str, query: str, limit: int, after: str | None, now: float
) -> list[StoredConversation]:
    """Implements `ConversationStore.list`."""
    if not isinstance(query, str) or len(query) > MAX_QUERY:
        raise InvalidRequestError(f"query may have {MAX_QUERY} characters at most.", "query")
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LISTED:
        raise InvalidRequestError(f"limit must be between 1 and {MAX_LISTED}.", "limit")
    statement = (
        sa.select(Conversations)
        .where(
            Conversations.owner == owner_key(owner),
            sa.or_(Conversations.expires_at.is_(None), Conversations.expires_at > now),
        )
        .order_by(Conversations.used_at.desc(), Conversations.id.desc())
        .limit(limit)
    )
    if after is not None:
        last = find(session, owner, after, now)
        statement = statement.where(
            sa.tuple_(Conversations.used_at, Conversations.id)
            < sa.tuple_(sa.literal(last.used_at), sa.literal(last.id))
        )
    words = storable(query).strip()
    if words:
        has = _holds(session.get_bind().dialect.name, words)
        in_messages = sa.exists().where(
            Messages.conversation_id == Conversations.id, has(Messages.content)
        )
        statement = statement.where(sa.or_(has(Conversations.title), in_messages))
    return [conversation_of(row) for row in session.scalars(statement)]


def _holds(dialect: str, words: str) -> Any:
    """A condition on a column: it holds these words, in whatever case."""
    if dialect == "sqlite" and not words.isascii():  # whose LIKE folds ASCII only
        folded = words.casefold()
        return lambda column: sa.func.llmkit_holds(column, folded) == 1
    return lambda column: column.icontains(words, autoescape=True)


def titled(session: Session, owner: str, title: str, now: float) -> Conversations | None:
    """Implements `ConversationStore.titled`."""
    query = (
        sa.select(Conversations)
        .where(
            Conversations.owner == owner_key(owner),
            Conversations.title == " ".join(storable(title).split()),
            sa.or_(Conversations.expires_at.is_(None), Conversations.expires_at > now),
        )
        .order_by(Conversations.used_at.desc())
        .limit(1)
    )
    return session.scalar(query)


def remove_expired(session: Session, now: float) -> int:
    """Delete what has expired and is not being answered in; how many."""
    done = session.execute(
        sa.delete(Conversations).where(
            Conversations.expires_at <= now, ~in_progress(Conversations.id)
        )
    )
    return int(done.rowcount)  # type: ignore[attr-defined]


def newest_leaf(session: Session, conversation_id: str, message_id: str) -> str:
    """Implements `ConversationStore.newest_leaf`."""
    first = read_message(session, conversation_id, message_id)
    later = session.execute(
        sa.select(Messages.id, Messages.parent_id)
        .where(Messages.conversation_id == conversation_id, Messages.number > first.number)
        .order_by(Messages.number)
    )
    newest = {parent: child for child, parent in later}  # the last child of each
    leaf = message_id
    while leaf in newest:
        leaf = newest[leaf]
    return leaf
