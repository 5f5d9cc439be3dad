"""Conversations in the database, as far as they are read. Any thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from llmkit.store import conversation_formats as formats
from llmkit.store import conversation_pages as pages
from llmkit.store import conversation_rows as rows
from llmkit.store import conversation_search as searching
from llmkit.store import media
from llmkit.store.conversation_pages import MessagePage
from llmkit.store.conversation_paths import Paths
from llmkit.store.conversation_records import StoredConversation, StoredMessage
from llmkit.store.database import Database

__all__ = ["ConversationReader"]

# Inside the class, `list` is its method.
ManyConversations = list[StoredConversation]
Path = list[StoredMessage]
Ids = list[str]


class ConversationReader:
    """The conversations of all callers; each sees its own.

    Raises `NotFoundError` for an id that is unknown, expired or, indistinguishably, somebody
    else's; `InvalidRequestError` for wrong values; `StoreError`.
    """

    def __init__(self, database: Database, *, now: Callable[[], float] = time.time) -> None:
        self.database, self._now = database, now
        self._paths = Paths()

    def get(self, owner: str, conversation_id: str) -> StoredConversation:
        """A conversation, without its messages."""
        with self.database.connected() as connection:
            return rows.conversation_of(rows.find(connection, owner, conversation_id, self._now()))

    def list(
        self, owner: str, *, query: str = "", limit: int = 50, after: str | None = None
    ) -> ManyConversations:
        """Conversations, the latest changed first, at most 1,000; fewer if they are large.

        ``query`` is looked for in titles and messages, in whatever case; ``after`` is the id of the
        last one of the page before.
        """
        return self.listed(owner, query=query, limit=limit, after=after)[0]

    def listed(
        self, owner: str, *, query: str = "", limit: int = 50, after: str | None = None
    ) -> tuple[ManyConversations, bool]:
        """A `list`, and whether there are more."""
        with self.database.connected() as connection:
            return searching.search(connection, owner, query, limit, after, self._now())

    def titled(self, owner: str, title: str) -> StoredConversation | None:
        """The latest used of the conversations with this title."""
        with self.database.connected() as connection:
            return searching.titled(connection, owner, title, self._now())

    def owner_of(self, conversation_id: str) -> str:
        """Whose a conversation is: for people who may read the whole database."""
        with self.database.connected() as connection:
            return str(rows.find(connection, None, conversation_id, self._now()).owner)

    def export(self, owner: str, conversation_id: str) -> dict[str, Any]:
        """All of a conversation as JSON, for a file and for `import_`."""
        with self.database.connected() as connection:
            row = rows.find(connection, owner, conversation_id, self._now())
            messages = rows.read_messages(connection, row.id)
            digests = [digest for message in messages for digest in message.digests]
            files = media.read(connection, row.owner, digests)
            return formats.exported(rows.conversation_of(row), messages, files)

    def messages(self, owner: str, conversation_id: str) -> Path:
        """All messages of the tree, in the order in which they were stored."""
        with self.database.connected() as connection:
            row = rows.find(connection, owner, conversation_id, self._now())
            return rows.read_messages(connection, row.id)

    def page(
        self,
        owner: str,
        conversation_id: str,
        *,
        tree: bool = False,
        leaf: str | None = None,
        after: str | None = None,
        limit: int = pages.MAX_PAGE,
        newest_first: bool = False,
        max_chars: int = pages.PAGE_CHARS,
        children: bool = True,
    ) -> MessagePage:
        """At most ``limit`` messages of a branch, or of the whole ``tree``.

        Those that come after the message ``after``; fewer where they are long. Reads no others,
        but for the ``children`` of a tree's messages.
        """
        with self.database.connected() as connection:
            row = rows.find(connection, owner, conversation_id, self._now())
            if tree:
                return pages.tree_page(
                    connection, row, after, limit, newest_first, max_chars, children
                )
            return pages.branch_page(connection, row, leaf, after, limit, newest_first, max_chars)

    def branch(self, owner: str, conversation_id: str) -> Ids:
        """The ids of the messages that are shown, the first first."""
        with self.database.connected() as connection:
            return pages.branch(
                connection, rows.find(connection, owner, conversation_id, self._now())
            )

    def some(self, owner: str, conversation_id: str, ids: Sequence[str], max_chars: int) -> Path:
        """The first of these messages of a branch: one at least, and more while they are short."""
        with self.database.connected() as connection:
            row = rows.find(connection, owner, conversation_id, self._now())
            return pages.some(connection, row.id, ids, max_chars)

    def message(self, owner: str, conversation_id: str, message_id: str) -> StoredMessage:
        """One message."""
        with self.database.connected() as connection:
            row = rows.find(connection, owner, conversation_id, self._now())
            return rows.read_message(connection, row.id, message_id)

    def media(self, owner: str, digests: Collection[str]) -> dict[str, bytes]:
        """Those of an owner's pictures and sounds that are there, by digest."""
        with self.database.connected() as connection:
            return media.read(connection, rows.owner_key(owner), digests)

    def media_sizes(self, owner: str, digests: Collection[str]) -> dict[str, int]:
        """The same, but only how many bytes they have."""
        with self.database.connected() as connection:
            return media.sizes(connection, rows.owner_key(owner), digests)

    def path(self, owner: str, conversation_id: str, leaf: str | None = None) -> Path:
        """The messages from the root to ``leaf`` (by default the head).

        Of a conversation that was read before only what is new is read.
        """
        return self.opened(owner, conversation_id, leaf)[1]

    def opened(
        self, owner: str, conversation_id: str, leaf: str | None = None
    ) -> tuple[StoredConversation, Path]:
        """A conversation and its `path`."""
        path: Path = []
        with self.database.connected() as connection:
            row = rows.find(connection, owner, conversation_id, self._now())
            wanted = row.head if leaf is None else leaf
            if wanted is not None:
                path = rows.read_path(connection, row.id, wanted, self._paths.get(row.id))
        self._paths.keep(conversation_id, path)
        return rows.conversation_of(row), path
