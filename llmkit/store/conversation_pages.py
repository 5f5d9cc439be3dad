"""Long conversations a page at a time, in somebody's transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llmkit.errors import InvalidRequestError, NotFoundError
from llmkit.store.conversation_records import (
    MAX_MESSAGES,
    StoredConversation,
    StoredMessage,
    storable,
)
from llmkit.store.conversation_rows import MESSAGES, conversation_of, message_of

__all__ = [
    "MAX_PAGE",
    "PAGE_CHARS",
    "MessagePage",
    "branch",
    "branch_page",
    "some",
    "tree_page",
]

MAX_PAGE = 1000  # messages of a page
PAGE_CHARS = 2 << 20  # after so many characters it ends
ROWS = 8  # that are read from the database at once
COLUMNS = MESSAGES.c
HERE = COLUMNS.conversation_id == sa.bindparam("here")


def _chain_query() -> Any:
    """A message and its ancestors, as ids and depths: up to a number, and so many of them."""
    most = sa.bindparam("most", type_=sa.Integer)
    above_number = sa.bindparam("number", type_=sa.BigInteger)
    fields = (COLUMNS.id, COLUMNS.parent_id, sa.literal(1).label("depth"))
    found = (
        sa.select(*fields)
        .where(COLUMNS.id == sa.bindparam("of", type_=sa.String), HERE)
        .where(COLUMNS.number > above_number)
        .cte("found", recursive=True)
    )
    above = MESSAGES.alias("above")
    found = found.union_all(
        sa.select(above.c.id, above.c.parent_id, found.c.depth + 1)
        .join(found, above.c.id == found.c.parent_id)
        .where(above.c.number > above_number, found.c.depth < most)
        .where(above.c.conversation_id == sa.bindparam("here"))
    )
    return sa.select(found.c.id, found.c.parent_id).order_by(found.c.depth)


CHAIN = _chain_query()


@dataclass(frozen=True, slots=True)
class MessagePage:
    """A part of a conversation's messages; ``children`` are by parent, in order."""

    conversation: StoredConversation
    messages: list[StoredMessage]
    has_more: bool
    children: dict[str, list[str]]


def tree_page(
    connection: Connection,
    row: Any,
    after: str | None,
    limit: int,
    newest_first: bool,
    max_chars: int = PAGE_CHARS,
    children: bool = True,
) -> MessagePage:
    """Of all messages, in the order in which they were stored.

    For ``children`` the ids of all later messages are read.
    """
    _check(limit)
    query = sa.select(MESSAGES).where(COLUMNS.conversation_id == row.id)
    if after is not None:
        number = _place(connection, row.id, after).number
        query = query.where(COLUMNS.number < number if newest_first else COLUMNS.number > number)
    query = query.order_by(COLUMNS.number.desc() if newest_first else COLUMNS.number)
    messages, has_more = _read(connection, query, limit, max_chars)
    by_parent = _children(connection, row.id, messages) if children else {}
    return MessagePage(conversation_of(row), messages, has_more, by_parent)


def branch_page(
    connection: Connection,
    row: Any,
    leaf: str | None,
    after: str | None,
    limit: int,
    newest_first: bool,
    max_chars: int = PAGE_CHARS,
) -> MessagePage:
    """Of the messages from the root to ``leaf`` (by default the head)."""
    _check(limit)
    ids = branch(connection, row, leaf, after, limit + 1 if newest_first else None, newest_first)
    messages = some(connection, row.id, ids[:limit], max_chars, newest_first)
    return MessagePage(conversation_of(row), messages, len(ids) > len(messages), {})


def branch(
    connection: Connection,
    row: Any,
    leaf: str | None = None,
    after: str | None = None,
    count: int | None = None,
    newest_first: bool = False,
) -> list[str]:
    """The ids of a branch, oldest first unless said otherwise.

    Newest first without a ``leaf``, it is the branch of ``after``, where that is given. Raises
    `NotFoundError` for a leaf that is not there, and for ``after`` outside the branch.
    """
    given, leaf = leaf, row.head if leaf is None else leaf
    if leaf is None:
        return []
    number = 0
    if after is not None:
        last = _place(connection, row.id, after)
        if not newest_first:
            number = last.number
        elif given is not None and not _is_above(connection, row.id, given, after, last.number):
            raise _stray(after)
        elif last.parent_id is None:
            return []
        else:  # no walk down from the leaf for each page
            leaf = last.parent_id
    place = {"of": storable(leaf), "here": row.id, "number": number, "most": count or MAX_MESSAGES}
    found = connection.execute(CHAIN, place).all()
    if not number and not found:
        raise NotFoundError(f"the session has no message {leaf!r:.60}.")
    if newest_first:
        return [each.id for each in found]
    if number and leaf != after and (not found or found[-1].parent_id != after):
        raise _stray(after)
    return [each.id for each in reversed(found)]


def _is_above(
    connection: Connection, conversation_id: str, leaf: str, message_id: str, number: int
) -> bool:
    """Whether a message, of this number, is the leaf or one of its ancestors."""
    place = {
        "of": storable(leaf),
        "here": conversation_id,
        "number": number - 1,
        "most": MAX_MESSAGES,
    }
    found = connection.execute(CHAIN, place).all()
    return bool(found) and found[-1].id == message_id


def _stray(message_id: str | None) -> NotFoundError:
    return NotFoundError(f"the message {message_id!r:.60} is not in this branch of the session.")


def _place(connection: Connection, conversation_id: str, message_id: str) -> Any:
    """Number and parent of a message. Raises `NotFoundError`."""
    query = sa.select(COLUMNS.number, COLUMNS.parent_id).where(
        COLUMNS.conversation_id == conversation_id, COLUMNS.id == storable(message_id)
    )
    found = connection.execute(query).one_or_none()
    if found is None:
        raise NotFoundError(f"the session has no message {message_id!r:.60}.")
    return found


def some(
    connection: Connection,
    conversation_id: str,
    ids: Sequence[str],
    max_chars: int,
    newest_first: bool = False,
) -> list[StoredMessage]:
    """The first of these messages of a branch: one at least, and more while they are short."""
    query = sa.select(MESSAGES).where(
        COLUMNS.conversation_id == conversation_id, COLUMNS.id.in_(list(ids))
    )
    query = query.order_by(COLUMNS.number.desc() if newest_first else COLUMNS.number)
    return _read(connection, query, len(ids), max_chars)[0]


def _children(
    connection: Connection, conversation_id: str, messages: Sequence[StoredMessage]
) -> dict[str, list[str]]:
    """The children of messages, which have higher numbers than any of them."""
    if not messages:
        return {}
    parents: dict[str, list[str]] = {message.id: [] for message in messages}
    first = min(message.number for message in messages)
    later = connection.execute(
        sa.select(COLUMNS.id, COLUMNS.parent_id)
        .where(COLUMNS.conversation_id == conversation_id, COLUMNS.number > first)
        .order_by(COLUMNS.number)
    )
    for each in later:
        if each.parent_id in parents:
            parents[each.parent_id].append(each.id)
    return parents


def _read(
    connection: Connection, query: Any, limit: int, max_chars: int
) -> tuple[list[StoredMessage], bool]:
    """The first messages of a query, and whether there are more. Reads no more than it gives."""
    found: list[StoredMessage] = []
    size = 0
    query = query.limit(limit + 1).execution_options(yield_per=ROWS)
    with connection.execute(query) as result:
        for row in result:
            if len(found) >= limit or size > max_chars:
                return found, True
            found.append(message := message_of(row))
            size += _size(message)
    return found, False


def _size(message: StoredMessage) -> int:
    parts = "" if isinstance(message.content, str) else json.dumps(message.content)
    return message.size + len(parts)


def _check(limit: int) -> None:
    if not isinstance(limit, int) or isinstance(limit, bool) or not 1 <= limit <= MAX_PAGE:
        raise InvalidRequestError(f"limit must be between 1 and {MAX_PAGE}.", "limit")
