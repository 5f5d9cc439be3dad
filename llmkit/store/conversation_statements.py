"""What each turn asks of the conversations in the database."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from llmkit.store.prepared import Prepared
from llmkit.store.tables import Conversations, Messages, Replies

__all__ = [
    "ANCESTORS",
    "CONVERSATIONS",
    "FILL_REPLY",
    "FIND",
    "FIND_LOCKED",
    "HELD",
    "ID",
    "INSERT_MESSAGES",
    "LAST_NUMBER",
    "LEASE",
    "MESSAGES",
    "MESSAGE_FIELDS",
    "NUMBER_AFTER",
    "READ_MESSAGE",
    "RELEASE",
    "REPLIES",
    "RUNNING",
    "SAVE_USE",
    "USE",
    "USE_FIELDS",
]

CONVERSATIONS: Any = Conversations.__table__
MESSAGES: Any = Messages.__table__
REPLIES: Any = Replies.__table__
USE_FIELDS = ("head", "version", "num_messages", "num_chars", "updated_at", "used_at", "expires_at")
MESSAGE_FIELDS = (  # of what somebody said
    "role", "content", "parts", "reasoning", "tool_calls", "tool_call_id", "name", "status",
    "finish_reason", "model", "usage",
)  # fmt: skip
ID, HERE = sa.bindparam("of", type_=sa.String), sa.bindparam("here", type_=sa.String)
IN_HERE = MESSAGES.c.conversation_id == HERE

CONVERSATION = sa.select(CONVERSATIONS).where(CONVERSATIONS.c.id == ID)
FIND, FIND_LOCKED = Prepared(CONVERSATION), Prepared(CONVERSATION.with_for_update())
SAVE_USE = Prepared(sa.update(CONVERSATIONS).where(CONVERSATIONS.c.id == ID), USE_FIELDS)
NOW = sa.bindparam("now", type_=sa.Float)
USED_AT = sa.case((CONVERSATIONS.c.used_at > NOW, CONVERSATIONS.c.used_at), else_=NOW)
USE = Prepared(  # what `conversation_rows.used` does, and more characters
    sa.update(CONVERSATIONS)
    .where(CONVERSATIONS.c.id == ID)
    .values(
        used_at=USED_AT,
        expires_at=USED_AT + CONVERSATIONS.c.ttl_s,
        updated_at=NOW,
        version=CONVERSATIONS.c.version + 1,
        num_chars=CONVERSATIONS.c.num_chars + sa.bindparam("more", type_=sa.BigInteger),
    )
)

READ_MESSAGE = Prepared(sa.select(MESSAGES).where(MESSAGES.c.id == ID, IN_HERE))
INSERT_MESSAGES = Prepared(sa.insert(MESSAGES))
FILL_REPLY = Prepared(sa.update(MESSAGES).where(MESSAGES.c.id == ID), MESSAGE_FIELDS)
LAST = sa.select(sa.func.max(MESSAGES.c.number).label("number")).where(IN_HERE)
LAST_NUMBER = Prepared(LAST)
NUMBER_AFTER = Prepared(
    sa.select(LAST.scalar_subquery().label("number")).where(
        sa.exists().where(MESSAGES.c.id == ID, IN_HERE)
    )
)

HELD = sa.and_(  # a lease of a writer
    REPLIES.c.message_id == ID,
    REPLIES.c.conversation_id == HERE,
    REPLIES.c.writer == sa.bindparam("by", type_=sa.String),
)
RUNNING = Prepared(
    sa.select(REPLIES, MESSAGES.c.parent_id)
    .join(MESSAGES, MESSAGES.c.id == REPLIES.c.message_id)
    .where(REPLIES.c.conversation_id == HERE)
    .order_by(MESSAGES.c.number)
)
LEASE, RELEASE = Prepared(sa.insert(REPLIES)), Prepared(sa.delete(REPLIES).where(HELD))


def _ancestors() -> Any:
    columns = MESSAGES.c
    found = (
        sa.select(columns.id, columns.parent_id, sa.literal(1).label("depth"))
        .where(columns.id == ID, IN_HERE)
        .cte("found", recursive=True)
    )
    above = MESSAGES.alias("above")
    found = found.union_all(
        sa.select(above.c.id, above.c.parent_id, found.c.depth + 1)
        .join(found, above.c.id == found.c.parent_id)
        .where(
            above.c.conversation_id == HERE,
            found.c.depth < sa.bindparam("most", type_=sa.Integer),
        )
    )
    query = sa.select(MESSAGES).join(found, columns.id == found.c.id)
    return query.order_by(columns.number)


ANCESTORS = Prepared(_ancestors())
