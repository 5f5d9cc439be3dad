"""How much all conversations of an owner may hold. Any thread."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from llmkit.errors import InvalidRequestError
from llmkit.store.conversation_records import MAX_OWNER_CHARS
from llmkit.store.tables import Conversations

__all__ = ["MUCH_CHARS", "check_owner"]

MUCH_CHARS = 1 << 16  # added at once, for which the owner's others are looked at


def check_owner(connection: Connection, owner: str, size: int) -> None:
    """Raises `InvalidRequestError` if so many characters more are too much.

    For who pastes, imports or forks: a few words at a time never come to it.
    """
    query = sa.select(sa.func.sum(Conversations.num_chars)).where(Conversations.owner == owner)
    if int(connection.scalar(query) or 0) + size > MAX_OWNER_CHARS:
        raise InvalidRequestError(
            f"all sessions of a caller hold {MAX_OWNER_CHARS >> 20} million characters at most; "
            "delete some first.",
            "messages",
        )
