"""Conversations in the database: trees of messages that outlive processes. Any thread.

The functions of its transactions are in `conversation_rows`, `conversation_replies` and
`conversation_search`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from llmkit.errors import InvalidRequestError, NotFoundError, StoreError
from llmkit.protocol import Message
from llmkit.store import conversation_formats as formats
from llmkit.store import conversation_replies as replies
from llmkit.store import conversation_rows as rows
from llmkit.store import conversation_search as searching
from llmkit.store import media
from llmkit.store.conversation_reading import ConversationReader
from llmkit.store.conversation_records import (
    UNSET,
    NewMessage,
    Pruning,
    Status,
    StoredConversation,
    StoredMessage,
    Unset,
    checked_fields,
    new_id,
)
from llmkit.store.conversation_rows import CONVERSATIONS, Row
from llmkit.store.database import Database
from llmkit.store.writers import new_writer

__all__ = [
    "UNSET",
    "ConversationStore",
    "NewMessage",
    "Pruning",
    "Status",
    "StoredConversation",
    "StoredMessage",
    "Unset",
]

FIELDS = ("title", "model", "settings", "pruning", "head", "ttl_s")
New = Sequence[NewMessage | Message]
Path = list[StoredMessage]
Ids = list[Callable[[], Collection[str]]]
Done = TypeVar("Done")
TOUCH_S = 60.0


class ConversationStore(ConversationReader):
    """The conversations of all callers; each sees its own.

    Raises `NotFoundError` for an id that is unknown, expired or, indistinguishably, somebody
    else's; `ConflictError` for a change that comes too late; `InvalidRequestError` for wrong
    values; `StoreError`. Then nothing was changed.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_sessions: int = 1000,
        ttl_s: float | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``max_sessions`` are kept of each owner, ``ttl_s`` after their last use (None: ever)."""
        super().__init__(database, now=now)
        self._max_sessions, self._ttl_s = max_sessions, ttl_s
        self._writer = new_writer()
        self._in_use: Ids = []
        self._under_way: set[str] = set()  # the replies that this store has begun

    def create(
        self,
        owner: str,
        *,
        title: str = "",
        model: str = "",
        settings: Mapping[str, Any] | None = None,
        pruning: Pruning = "drop",
        messages: New = (),
        ttl_s: float | Unset | None = UNSET,
        by_title: bool = False,
    ) -> StoredConversation:
        """A conversation; ``messages`` are a path.

        Where there are too many, the least recently used one makes way, but none that is in use:
        first of those that were begun ``by_title`` and that nobody has changed since. So do those
        with pictures and sounds, where there are too many bytes of these.
        """
        ttl_s = self._ttl_s if isinstance(ttl_s, Unset) else ttl_s
        fields = {"title": title, "model": model, "settings": dict(settings or {})}
        values = checked_fields({**fields, "pruning": pruning, "ttl_s": ttl_s})
        values["by_title"] = by_title
        new = rows.as_new(messages)

        def create() -> StoredConversation:
            with self.database.connected(writes=True) as connection:
                row = self._add(connection, owner, values)
                added = rows.add_chain(connection, row, None, new, self._now())
                row.head = added[-1].id if added else None
                rows.save(connection, row)
                return rows.conversation_of(row)

        return self._with_room(owner, None, create)

    def _with_room(self, owner: str, mine: str | None, act: Callable[[], Done]) -> Done:
        """``act``; where the owner's files leave no room, conversations with files make way, the
        least recently used first: none that is in use, nor ``mine``."""
        while True:
            try:
                return act()
            except media.TooMuchError:
                used = {each for ids in self._in_use for each in ids()} | {mine or ""}
                key = rows.owner_key(owner)
                with self.database.connected(writes=True) as connection:
                    gone = searching.forget_files(connection, key, used, self._now())
                if not gone:
                    raise
                self._paths.drop(gone)

    def _add(self, connection: Connection, owner: str, values: dict[str, Any]) -> Row:
        now = self._now()
        searching.remove_expired(connection, now)
        in_use = {each for ids in self._in_use for each in ids()}
        rows.make_room(connection, rows.owner_key(owner), self._max_sessions - 1, in_use)
        return rows.add(connection, owner, values, now)

    @contextlib.contextmanager
    def _changing(
        self, owner: str | None, conversation_id: str, *, relaxed: bool = False
    ) -> Iterator[tuple[Connection, Row, float]]:
        """A locked conversation, which is saved afterwards, and the time."""
        with self.database.connected(writes=True, relaxed=relaxed) as connection:
            now = self._now()
            row = rows.find(connection, owner, conversation_id, now, lock=True)
            yield connection, row, now
            rows.save(connection, row)

    def change(
        self, owner: str, conversation_id: str, *, version: int | None = None, **fields: Any
    ) -> StoredConversation:
        """Change title, model, settings (all of them), pruning, head or ttl_s.

        With ``version`` it raises `ConflictError` if there is another one by now.
        """
        unknown = next((name for name in fields if name not in FIELDS), None)
        if unknown is not None:
            raise InvalidRequestError(f"a session has no {unknown!r:.40} to be changed.", unknown)
        head = fields.pop("head", UNSET)
        values = checked_fields(fields)
        with self.database.connected(writes=True) as connection:
            now = self._now()
            row = rows.find(connection, owner, conversation_id, now, lock=True)
            rows.check_version(row, version)
            if not isinstance(head, Unset):
                if head is not None:
                    rows.read_message(connection, row.id, str(head))
                row.head = head
            vars(row).update(values)
            rows.used(row, now)
            rows.save(connection, row, by_title=False, **values)
            return rows.conversation_of(row)

    def touch(self, known: StoredConversation) -> None:
        """Note that a conversation is read, which is a use; at most once a minute."""
        if self._now() - known.used_at < TOUCH_S:
            return
        with (
            contextlib.suppress(NotFoundError, StoreError),  # whoever reads it has it already
            self._changing(known.owner, known.id, relaxed=True) as (_, row, now),
        ):
            rows.used(row, now, changed=False)

    def delete(self, owner: str, conversation_id: str) -> None:
        """Delete a conversation, also one that is being answered in."""
        with self.database.connected(writes=True) as connection:
            row = rows.find(connection, owner, conversation_id, self._now(), lock=True)
            connection.execute(sa.delete(CONVERSATIONS).where(CONVERSATIONS.c.id == row.id))
            media.remove_unused(connection, self._now(), row.owner)
        self._paths.drop(conversation_id)

    def delete_all(self, owner: str) -> int:
        """Delete all conversations of an owner; how many they were."""
        with self.database.connected(writes=True) as connection:
            where = CONVERSATIONS.c.owner == rows.owner_key(owner)
            ids = connection.scalars(sa.select(CONVERSATIONS.c.id).where(where)).all()
            connection.execute(sa.delete(CONVERSATIONS).where(where))
            media.remove_unused(connection, self._now(), rows.owner_key(owner))
        for each in ids:
            self._paths.drop(each)
        return len(ids)

    def fork(
        self, owner: str, conversation_id: str, message_id: str | None = None
    ) -> StoredConversation:
        """A new conversation with the messages up to one (by default up to the head)."""
        known, path = self.opened(owner, conversation_id, message_id)
        copies = [formats.as_copy(m) for m in path if m.status != "running"]
        same = {name: getattr(known, name) for name in ("title", "model", "settings", "pruning")}
        return self.create(owner, messages=copies, ttl_s=known.ttl_s, **same)

    def import_(
        self, owner: str, data: Any, check: Callable[[Mapping[str, Any]], None] = lambda _: None
    ) -> StoredConversation:
        """A new conversation from what `export` gave, from a saved `llm.session`, or from
        ``{"messages": [...]}`` with OpenAI's messages.

        Raises `InvalidRequestError` for a cycle, an unknown parent, wrong types and too much, and
        what ``check`` raises for its settings.
        """
        read = formats.read(data)
        values = checked_fields({**read.fields, "ttl_s": self._ttl_s})
        check(read.fields["settings"])
        return self._with_room(owner, None, lambda: self._import(owner, values, read))

    def _import(
        self, owner: str, values: dict[str, Any], read: formats.ImportedConversation
    ) -> StoredConversation:
        with self.database.connected(writes=True) as connection:
            row = self._add(connection, owner, values)
            ids = {key: new_id("msg") for key, _, _ in read.messages}
            new = [(ids[key], ids.get(parent or ""), m) for key, parent, m in read.messages]
            rows.insert(connection, row, new, self._now())
            row.head = ids[read.head] if read.head is not None else None
            rows.save(connection, row)
            return rows.conversation_of(row)

    def append(
        self,
        owner: str,
        conversation_id: str,
        parent_id: str | None,
        messages: New,
        *,
        head: bool = True,
        version: int | None = None,
    ) -> Path:
        """Append messages, one below the other, to a message (None: as a beginning).

        Another child of the same parent is a branch. ``head``: it is then shown.
        """
        new = rows.as_new(messages)

        def append() -> Path:
            with self._changing(owner, conversation_id) as (connection, row, now):
                rows.check_version(row, version)
                if parent_id is not None:
                    replies.check_parent(connection, row, parent_id, now)
                added = rows.add_chain(connection, row, parent_id, new, now)
                if head and added:
                    row.head = added[-1].id
                rows.used(row, now)
            return added

        added = self._with_room(owner, conversation_id, append)
        self._paths.extend(conversation_id, added)
        return added

    def begin_turn(
        self,
        owner: str,
        conversation_id: str,
        parent_id: str | Unset | None = UNSET,
        messages: New = (),
        *,
        model: str = "",
        branch: bool = False,
        version: int | None = None,
    ) -> Path:
        """Append messages and, as the last, a running reply, to ``parent_id`` (UNSET: the head).

        Raises `ConflictError` if that is being answered already; with ``branch`` this turn is a
        sibling then. The reply becomes the head.
        """
        new = rows.as_new(messages)

        def begin() -> Path:
            with self._changing(owner, conversation_id, relaxed=True) as (connection, row, now):
                rows.check_version(row, version)
                return replies.begin(
                    connection, row, parent_id, new, model, branch, self._writer, now
                )

        added = self._with_room(owner, conversation_id, begin)
        self._under_way.add(added[-1].id)
        self._paths.extend(conversation_id, added)
        return added

    def update_reply(
        self, conversation_id: str, message_id: str, text: str, reasoning: str | None = None
    ) -> None:
        """Keep all of a running reply so far, about once a second: so much outlives a crash."""
        with self.database.connected(writes=True, relaxed=True) as connection:
            replies.checkpoint(
                connection, conversation_id, message_id, text, reasoning, self._writer, self._now()
            )

    def end_reply(
        self,
        conversation_id: str,
        message_id: str,
        message: NewMessage | Message,
        *,
        status: Status = "complete",
        finish_reason: str | None = None,
        usage: dict[str, Any] | None = None,
    ) -> StoredMessage:
        """Keep all of a reply.

        If this process had been taken for gone, the reply is kept beside the partial one, with
        another id.
        """
        (new,) = rows.as_new([message])
        new = replace(new, status=status, finish_reason=finish_reason, usage=usage)
        with self._last_of(message_id):
            kept = self._end(conversation_id, message_id, new)
        self._paths.extend(conversation_id, [kept])
        return kept

    def _end(self, conversation_id: str, message_id: str, new: NewMessage) -> StoredMessage:
        if (begun := self._paths.ended(message_id)) and begun.conversation_id == conversation_id:
            with (
                contextlib.suppress(NotFoundError),
                self.database.connected(writes=True, relaxed=True) as connection,
            ):
                return replies.end_known(connection, begun, new, self._writer, self._now())
        with self._changing(None, conversation_id, relaxed=True) as (connection, row, now):
            return replies.end(connection, row, message_id, new, self._writer, now)

    def cancel_turn(self, conversation_id: str, message_id: str) -> None:
        """Undo `begin_turn`, of a turn that the engine refused: its messages are deleted, unless
        others build on them."""
        with (
            self._last_of(message_id),
            self._changing(None, conversation_id, relaxed=True) as (connection, row, now),
        ):
            replies.cancel(connection, row, message_id, self._writer, now)
        self._paths.drop(conversation_id)

    def give_up(self, message_id: str) -> None:
        """Renew a running reply no longer: it is partial before long, with what is kept of it."""
        self._under_way.discard(message_id)

    @contextlib.contextmanager
    def _last_of(self, message_id: str) -> Iterator[None]:
        """Around the end of a reply: it stays under way only if the database is in trouble."""
        try:
            yield
        except StoreError:
            raise
        except Exception:
            self.give_up(message_id)
            raise
        self.give_up(message_id)

    def renew(self) -> None:
        """Say that this process still writes its replies; at least every 20 s."""
        with self.database.connected(writes=True, relaxed=True) as connection:
            replies.renew(connection, self._writer, list(self._under_way), self._now())

    def recover(self) -> int:
        """Let the running replies of processes that are gone be partial; how many. At any time."""
        with self.database.connected() as connection:
            found = replies.lost(connection, self._now())
        count = 0
        for each in found:
            with (
                contextlib.suppress(NotFoundError),  # deleted meanwhile
                self._changing(None, each) as (connection, row, now),
            ):
                count += replies.recover(connection, row, now)
        return count

    def remove_expired(self) -> int:
        """Delete conversations that have expired and are not in use; how many. And files of all
        that are gone."""
        with self.database.connected(writes=True) as connection:
            now = self._now()
            count = searching.remove_expired(connection, now)
            media.remove_unused(connection, now)
            return count

    def in_use(self, ids: Callable[[], Collection[str]]) -> None:
        """Let ``ids`` say which conversations are in use, beside those with running replies."""
        self._in_use.append(ids)
