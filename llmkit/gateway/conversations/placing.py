"""Where a turn goes on in its session, and its beginning in the store. Any thread.

Raises what the store raises; then nothing was stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmkit.errors import ConflictError, InvalidRequestError
from llmkit.gateway.conversations.detached import Wish
from llmkit.gateway.conversations.schemas import EditBody, SendBody, TurnBody
from llmkit.gateway.media.attached import Attached
from llmkit.store.conversation_records import (
    UNDER_WAY,
    NewMessage,
    StoredConversation,
    StoredMessage,
    Unset,
)

if TYPE_CHECKING:
    from llmkit.store.conversations import ConversationStore

__all__ = ["Place", "append", "begin", "placed", "settled_path"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn goes on: after ``path``, with ``new`` messages; ``session`` None is a new one.

    ``branches``: whether the end of the path may have other messages after it.
    """

    session: StoredConversation | None
    path: list[StoredMessage]
    new: list[NewMessage]
    branches: bool

    @property
    def parent_id(self) -> str | None:
        return self.path[-1].id if self.path else None


def placed(
    store: ConversationStore, owner: str, wish: Wish, body: TurnBody, attached: Attached
) -> Place:
    """Where the turn goes on, with what is ``attached``. Any thread; raises what the store
    raises."""
    if wish.session_id is None:
        assert isinstance(body, SendBody)
        if isinstance(body.parent_id, str):
            raise InvalidRequestError("parent: a new session has no messages yet.", "parent")
        return Place(None, [], body.new(attached), False)
    session, path = store.opened(owner, wish.session_id)
    new: list[NewMessage] = []
    if isinstance(body, SendBody):
        new, branches = body.new(attached), body.branch
        leaf = body.parent_id
        if isinstance(leaf, Unset):
            leaf = session.head
        elif leaf != session.head and not branches:
            raise ConflictError(
                "parent is no longer the session's last message. Leave parent out to continue at "
                "the end, or send branch: true to branch here."
            )
    else:
        branches = True
        shown = wish.message_id or session.head
        if shown is None:
            raise InvalidRequestError("The session has no message yet.", "message")
        message = store.message(owner, session.id, shown)
        if isinstance(body, EditBody):
            leaf = message.parent_id
            new = [
                replace(
                    each,
                    role=message.role,
                    name=message.name,
                    tool_call_id=message.tool_call_id,
                )
                for each in body.new(attached)
            ]
        else:
            leaf = message.parent_id if message.role == "assistant" else message.id
            if leaf is None:
                raise InvalidRequestError(
                    "There is no question before this message, so it cannot be regenerated.",
                    "message",
                )
    path = settled_path(store, owner, session.id, leaf, path)
    if path and path[-1].status == "running":
        if not branches:
            raise ConflictError(
                f"{UNDER_WAY} Wait for it, cancel it, or ask for a branch (branch: true)."
            )
        path = _before_turn(path)
    return Place(session, path, new, branches)


def settled_path(
    store: ConversationStore,
    owner: str,
    session_id: str,
    leaf: str | None,
    read: Sequence[StoredMessage],
) -> list[StoredMessage]:
    """The path to ``leaf``, perhaps that ``read`` before; a reply is running only if somebody
    still writes it."""
    path = read
    if leaf is None:
        path = []
    elif not path or path[-1].id != leaf:
        path = store.path(owner, session_id, leaf)
    if path and path[-1].status == "running" and store.recover():
        path = store.path(owner, session_id, leaf)
    return list(path)


def _before_turn(path: Sequence[StoredMessage]) -> list[StoredMessage]:
    """The path without its running reply and what that answers."""
    end = len(path) - 1
    while end and path[end - 1].role in ("user", "tool"):
        end -= 1
    return list(path[:end])


def begin(
    store: ConversationStore, owner: str, place: Place, named: str | None, model: str
) -> list[StoredMessage]:
    """Store question and reply. Any thread."""
    session = place.session
    made = None
    if session is None:
        made = session = store.create(owner, model=named or "")
    try:
        return store.begin_turn(
            owner, session.id, place.parent_id, place.new, model=model, branch=place.branches
        )
    except BaseException:
        if made is not None:
            store.delete(owner, made.id)
        raise


def append(store: ConversationStore, owner: str, place: Place) -> list[StoredMessage]:
    session = place.session or store.create(owner)
    return store.append(owner, session.id, place.parent_id, place.new)
