"""Finding conversations: by words, by pages, by age, by their files."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llmkit.errors import InvalidRequestError
from llmkit.store.conversation_records import StoredConversation, storable
from llmkit.store.conversation_rows import (
    CONVERSATIONS,
    MESSAGES,
    conversation_of,
    find,
    in_progress,
    owner_key,
)
from llmkit.store.media import MEDIA, UNUSED_S, USES, remove_unused

__all__ = ["forget_files", "remove_expired", "search", "titled"]

MAX_QUERY, MAX_LISTED = 1000, 1000
PAGE_CHARS = 2 << 20  # of settings, after which a page of conversations ends
ROWS = 8  # that are read from the database at once


def forget_files(connection: Connection, owner: str, used_now: Collection[str], now: float) -> str:
    """Delete the owner's least recently used conversation with pictures or sounds that nothing but
    conversations uses, none that is in use. Its id, or "" if there is none."""
    files, uses, other = MEDIA.c, USES.c, USES.alias("other").c
    has_files = sa.exists().where(
        uses.conversation_id == CONVERSATIONS.c.id,
        files.owner == uses.owner,
        files.digest == uses.digest,
        files.added_at < now - UNUSED_S,
        ~sa.exists().where(
            other.owner == uses.owner,
            other.digest == uses.digest,
            other.segment_id.is_not(None),
        ),
    )
    is_free = ~in_progress(CONVERSATIONS.c.id)
    where = CONVERSATIONS.c.owner == owner, CONVERSATIONS.c.id.not_in(list(used_now)), is_free
    oldest = connection.scalar(
        sa.select(CONVERSATIONS.c.id)
        .where(*where, has_files)
        .order_by(CONVERSATIONS.c.by_title.desc(), CONVERSATIONS.c.used_at, CONVERSATIONS.c.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    # Asked again now that nobody can begin a reply in it.
    delete = sa.delete(CONVERSATIONS).where(CONVERSATIONS.c.id == oldest, is_free)
    if oldest is None or not connection.execute(delete).rowcount:
        return ""
    remove_unused(connection, now, owner)
    return str(oldest)


def search(
    connection: Connection, owner: str, query: str, limit: int, after: str | None, now: float
) -> tuple[list[StoredConversation], bool]:
    """Implements `ConversationStore.listed`."""
    if not isinstance(query, str) or len(query) > MAX_QUERY:
        raise InvalidRequestError(f"query may have {MAX_QUERY} characters at most.", "query")
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_LISTED:
        raise InvalidRequestError(f"limit must be between 1 and {MAX_LISTED}.", "limit")
    statement = (
        sa.select(CONVERSATIONS)
        .where(
            CONVERSATIONS.c.owner == owner_key(owner),
            sa.or_(CONVERSATIONS.c.expires_at.is_(None), CONVERSATIONS.c.expires_at > now),
        )
        .order_by(CONVERSATIONS.c.updated_at.desc(), CONVERSATIONS.c.id.desc())
        .limit(limit + 1)
        .execution_options(yield_per=ROWS)
    )
    if after is not None:
        last = find(connection, owner, after, now)
        statement = statement.where(
            sa.tuple_(CONVERSATIONS.c.updated_at, CONVERSATIONS.c.id)
            < sa.tuple_(sa.literal(last.updated_at), sa.literal(last.id))
        )
    words = storable(query).strip()
    if words:
        has = _holds(connection.dialect.name, words)
        in_messages = sa.exists().where(
            MESSAGES.c.conversation_id == CONVERSATIONS.c.id, has(MESSAGES.c.content)
        )
        statement = statement.where(sa.or_(has(CONVERSATIONS.c.title), in_messages))
    found: list[StoredConversation] = []
    size = 0
    with connection.execute(statement) as result:
        for row in result:
            if len(found) >= limit or size > PAGE_CHARS:
                return found, True
            found.append(conversation_of(row))
            size += len(json.dumps(row.settings))
    return found, False


def _holds(dialect: str, words: str) -> Any:
    """A condition on a column: it holds these words, in whatever case."""
    if dialect == "sqlite" and not words.isascii():  # whose LIKE folds ASCII only
        folded = words.casefold()
        return lambda column: sa.func.llmkit_holds(column, folded) == 1
    return lambda column: column.icontains(words, autoescape=True)


def titled(connection: Connection, owner: str, title: str, now: float) -> StoredConversation | None:
    """Implements `ConversationStore.titled`."""
    query = (
        sa.select(CONVERSATIONS)
        .where(
            CONVERSATIONS.c.owner == owner_key(owner),
            CONVERSATIONS.c.title == " ".join(storable(title).split()),
            sa.or_(CONVERSATIONS.c.expires_at.is_(None), CONVERSATIONS.c.expires_at > now),
        )
        .order_by(CONVERSATIONS.c.used_at.desc())
        .limit(1)
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else conversation_of(row)


def remove_expired(connection: Connection, now: float) -> int:
    """Delete what has expired and is not being answered in; how many."""
    done = connection.execute(
        sa.delete(CONVERSATIONS).where(
            CONVERSATIONS.c.expires_at <= now, ~in_progress(CONVERSATIONS.c.id)
        )
    )
    return int(done.rowcount)
