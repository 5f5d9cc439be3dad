"""Sessions that clients name themselves: kept under that name as their title. Tornado loop only."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequestError
from llmkit.gateway.exchange import Exchange

if TYPE_CHECKING:
    from llmkit.store.conversations import ConversationStore

__all__ = ["session_named"]

OURS = re.compile(r"sess_[0-9a-f]{24}")
MOST = 100  # characters of a name
LOOKED_AT = 100  # sessions whose title or text has the name


async def session_named(exchange: Exchange, name: str | None, model: str) -> str | None:
    """The id of the caller's session of this name, or made for it; an id of ours stays as it is.

    Raises `InvalidRequestError`, and what the store raises.
    """
    if name is None or OURS.fullmatch(name):
        return name
    if not name.strip() or len(name) > MOST or not name.isprintable():
        raise InvalidRequestError(
            f"session-id must be a name of 1 to {MOST} printable characters.", "session-id"
        )
    assert exchange.turns is not None
    owner = exchange.identity.name

    def find(store: ConversationStore) -> str:
        listed = store.list(owner, query=name, limit=LOOKED_AT)
        found = next((each for each in listed if each.title == name), None)
        return (found or store.create(owner, title=name, model=model)).id

    return await exchange.turns.shelf.call(f"{owner}\0{name}", find)
