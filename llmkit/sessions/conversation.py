"""A session that lasts: its messages in the store, each turn as it happens.

The store is the gateway's, so a conversation of `llm.session(id=...)` can go on there, and one of
the web page here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from llmkit.errors import ConflictError, InvalidRequestError, LLMKitError, NotFoundError
from llmkit.protocol import Message
from llmkit.store.conversation_records import UNDER_WAY, is_session_id
from llmkit.store.conversations import (
    ConversationStore,
    NewMessage,
    Status,
    StoredConversation,
    StoredMessage,
)

__all__ = ["LOCAL_OWNER", "Reply", "Transcript", "open_store"]

logger = logging.getLogger("llmkit")

LOCAL_OWNER = "local"  # who calls a gateway without a key, on this machine
CHECKPOINT_S = 1.0
PLAIN = (str, int, float, bool)  # options that other clients can read


def open_store(db_url: str | None = None) -> ConversationStore:
    """The store of ``db_url``, else that of the settings, as `llmkit serve` would open it.

    Whoever opens it closes its ``database``. Raises `InvalidRequestError` and `StoreError`.
    """
    from llmkit.settings.serving import read_settings
    from llmkit.store.database import open_database

    options = read_settings({} if db_url is None else {"db_url": db_url}).gateway
    return ConversationStore(
        open_database(options.db_url),
        max_sessions=options.max_sessions,
        ttl_s=options.session_ttl_s,
    )


class Transcript:
    """The path of a stored conversation that a session shows and adds to.

    ``owner`` may be anybody whose conversations are in the database: who can open that may read it.
    Raises `NotFoundError`, `ConflictError` and `StoreError`; then the store is as it was.
    """

    def __init__(
        self, store: ConversationStore, conversation: StoredConversation, model: str = ""
    ) -> None:
        self.store, self._model = store, model
        self.conversation = conversation
        path = store.path(conversation.owner, conversation.id)
        digests = [digest for message in path for digest in message.digests]
        # Of all messages that were ever in it: those of a session are added here.
        self.files = store.media(conversation.owner, digests) if digests else {}
        self._children: dict[tuple[str | None, Message], str] = {}
        self._ids: list[str] = []
        self._said: list[Message] = []
        self._pending: Callable[[], None] | None = None  # a reply that could not be written yet
        for message in path:
            if message.status != "running":
                self._add(message, message.message)

    @classmethod
    def open(
        cls,
        store: ConversationStore,
        id: str,
        model: str = "",
        settings: dict[str, Any] | None = None,
    ) -> Transcript:
        """The conversation of this id, or the one with this title; a new one has ``settings``."""
        if not isinstance(id, str) or not id.strip():
            raise InvalidRequestError("a session's id must be an id or a name.", "id")
        store.recover()
        if is_session_id(id):
            return cls(store, store.get(store.owner_of(id), id), model)
        known = store.titled(LOCAL_OWNER, id)
        if known is None:
            kept = {k: v for k, v in (settings or {}).items() if isinstance(v, PLAIN)}
            known = store.create(LOCAL_OWNER, title=id, model=model, settings=kept)
        return cls(store, known, model)

    @property
    def messages(self) -> list[Message]:
        """The path as it is stored."""
        return self._said[:]

    @property
    def id(self) -> str:
        return self.conversation.id

    def keep(self, messages: Sequence[Message]) -> None:
        """Let the path be these messages: known ones are found, others are a branch."""
        self._settle()
        place, rest = self._find(messages)
        owner, id = self.conversation.owner, self.conversation.id
        if rest:
            new = self._new(rest)
            added = self.store.append(owner, id, place, new)
            for stored, message in zip(added, rest, strict=True):
                self._add(stored, message)
        else:
            self.store.change(owner, id, head=place)

    def begin(self, messages: Sequence[Message], new: Sequence[Message]) -> Reply:
        """Write a question, and that it is being answered."""
        self._settle()
        place, rest = self._find([*messages, *new])
        try:
            turn = self.store.begin_turn(
                self.conversation.owner,
                self.id,
                place,
                self._new(rest),
                model=self._model,
            )
        except ConflictError as error:
            if not str(error).startswith(UNDER_WAY):
                raise
            raise ConflictError(
                f"{UNDER_WAY} Wait for it, leave the loop that reads it, or go on in a fork."
            ) from None
        for stored, message in zip(turn[:-1], rest, strict=True):
            self._add(stored, message)
        return Reply(self, self.store, turn)

    def fork(self, messages: Sequence[Message]) -> Transcript:
        """A conversation of its own that begins with these messages."""
        known = self.conversation
        copy = self.store.create(
            known.owner,
            title=known.title,
            model=known.model,
            settings=known.settings,
            pruning=known.pruning,
            messages=self._new(messages),
        )
        return Transcript(self.store, copy, self._model)

    def _new(self, messages: Sequence[Message]) -> list[NewMessage]:
        """Messages to be stored, with their files."""
        return [NewMessage.of(m, model=self._model_of(m), media=self.files) for m in messages]

    def _model_of(self, message: Message) -> str:
        return self._model if message.role == "assistant" else ""

    def _find(self, messages: Sequence[Message]) -> tuple[str | None, list[Message]]:
        """The place of the last message that is stored, and those after it; the path ends there."""
        count = 0
        for ours, wanted in zip(self._said, messages, strict=False):
            if ours is not wanted and ours != wanted:
                break
            count += 1
        del self._said[count:], self._ids[count:]
        for message in messages[count:]:
            known = self._children.get((self._ids[-1] if self._ids else None, message))
            if known is None:
                break
            self._ids.append(known)
            self._said.append(message)
        return self._ids[-1] if self._ids else None, list(messages[len(self._said) :])

    def _add(self, stored: StoredMessage, message: Message) -> None:
        # The session's own message, which may hold what a database does not.
        self._children[stored.parent_id, message] = stored.id
        self._ids.append(stored.id)
        self._said.append(message)

    def forget(self, messages: Sequence[StoredMessage]) -> None:
        """Messages at the end of the path were deleted."""
        gone = {stored.id for stored in messages}
        self._children = {key: id for key, id in self._children.items() if id not in gone}
        place = next((i for i, id in enumerate(self._ids) if id in gone), len(self._ids))
        del self._ids[place:], self._said[place:]

    def _settle(self) -> None:
        """Write what could not be written before."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending()
        except (NotFoundError, ConflictError) as error:
            logger.warning("an answer was not written down: %s", error)
        except LLMKitError:
            self._pending = pending
            raise

    def ended(self, stored: StoredMessage, said: Message) -> None:
        """A reply was written."""
        if self._ids and self._ids[-1] == stored.parent_id:
            self._add(stored, said)

    def postpone(self, write: Callable[[], None]) -> None:
        """Write something before the next turn, since it cannot be written now."""
        self._pending = write


class Reply:
    """An answer as it is written down: so far each second, whole at its end."""

    def __init__(
        self, transcript: Transcript, store: ConversationStore, turn: Sequence[StoredMessage]
    ) -> None:
        self._transcript, self._store, self._asked = transcript, store, turn[:-1]
        self._ids = turn[-1].conversation_id, turn[-1].id
        self._next = time.monotonic() + CHECKPOINT_S

    @property
    def is_due(self) -> bool:
        """Whether the answer so far is to be written now."""
        return time.monotonic() >= self._next

    def update(self, text: str, reasoning: str) -> None:
        """The answer so far, if it is due. What cannot be written now is written later."""
        if not self.is_due:
            return
        try:
            self._store.update_reply(*self._ids, text, reasoning or None)
        except LLMKitError as error:
            logger.warning("the answer so far is only in memory: %s", error)
        self._next = time.monotonic() + CHECKPOINT_S

    def end(self, said: Message, finish_reason: str, usage: dict[str, Any]) -> None:
        """The whole answer, or what there is of one that was stopped (for the reason "abort").

        Raises `StoreError` if it cannot be written; it is tried again before the next turn.
        """
        status: Status = "partial" if finish_reason == "abort" else "complete"

        def write() -> None:
            stored = self._store.end_reply(
                *self._ids, said, status=status, finish_reason=finish_reason, usage=usage
            )
            self._transcript.ended(stored, said)

        try:
            write()
        except (NotFoundError, ConflictError):
            raise
        except LLMKitError:
            self._transcript.postpone(write)
            raise

    def fail(self, text: str, reasoning: str) -> None:
        """The request failed: as if it had never been, but what was said is kept aside."""
        try:
            if text or reasoning:
                said = Message("assistant", text, reasoning_content=reasoning or None)
                self._store.end_reply(*self._ids, said, status="partial", finish_reason="error")
            else:
                self._store.cancel_turn(*self._ids)
                self._transcript.forget(self._asked)
        except LLMKitError as error:
            logger.warning("the failed answer was not written down: %s", error)
