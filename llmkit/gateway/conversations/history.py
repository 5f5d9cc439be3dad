"""What a session holds: its messages a page at a time, and all of it as a file. Tornado loop only.

Reading, rendering and making JSON take as long as texts are: that is for threads.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequestError, NotFoundError
from llmkit.gateway.aside import Waiting
from llmkit.gateway.conversations.objects import Object, encoded, message_object
from llmkit.gateway.conversations.turns import Turns
from llmkit.gateway.exchange import ClientGoneError, Exchange
from llmkit.gateway.ops.openapi import Query, Route
from llmkit.media.addresses import mime_of
from llmkit.store.conversation_records import StoredConversation, StoredMessage

if TYPE_CHECKING:
    from llmkit.store.conversation_pages import MessagePage
    from llmkit.store.conversations import ConversationStore

__all__ = ["MAX_PAGE", "HistoryRoutes", "number_of"]

logger = logging.getLogger("llmkit.gateway")

MAX_PAGE = 1000
# Of a file, which are in memory at once.
PART_CHARS, PART_MESSAGES, PART_BYTES = 1 << 18, 500, 8 << 20
TAG = "Sessions"
ORDERS = ("asc", "desc")


class HistoryRoutes:
    """`/v1/sessions/{session_id}/messages`, `…/media` and `…/export`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def routes(self) -> list[Route]:
        one = "/v1/sessions/{session_id}"
        return [
            Route(
                "GET",
                f"{one}/messages",
                self.messages,
                "Its messages",
                TAG,
                query=(
                    Query.choice("tree", "All branches, not only one.", "0", "1"),
                    Query("leaf", "The last message of the branch; by default the one shown."),
                    Query("after", "The id of the last message that is known."),
                    Query.number("limit", "The most that are listed.", MAX_PAGE, MAX_PAGE),
                    Query.choice("order", "Newest first with desc.", *ORDERS),
                    Query.choice("render", "HTML beside the text.", "html"),
                ),
            ),
            Route("GET", f"{one}/media/{{digest}}", self.media, "A picture or sound in it", TAG),
            Route(
                "GET",
                f"{one}/export",
                self.export,
                "All of it, as a file",
                TAG,
                query=(Query.choice("format", "What kind of file.", *EXPORTS),),
            ),
        ]

    async def messages(self, exchange: Exchange) -> None:
        """A page of the branch that is shown; with ``tree`` of all, with ``render=html`` as HTML
        too."""
        owner, session_id = exchange.identity.name, exchange.args[0]
        is_tree, leaf, after = (
            _flag(exchange, "tree"),
            exchange.query("leaf"),
            exchange.query("after"),
        )
        limit, order = number_of(exchange, "limit", MAX_PAGE), exchange.query("order") or "asc"
        renders = exchange.query("render")
        if renders not in (None, "html"):
            raise InvalidRequestError("render can only be html.", "render")
        if order not in ORDERS:
            raise InvalidRequestError("order must be asc or desc.", "order")

        def read(store: ConversationStore) -> MessagePage:
            return store.page(
                owner,
                session_id,
                tree=is_tree,
                leaf=leaf,
                after=after,
                limit=limit,
                newest_first=order == "desc",
            )

        def listed(store: ConversationStore) -> tuple[StoredConversation, bytes]:
            page = read(store)
            return page.conversation, _listed(page, _objects(page, is_tree))

        def rendered(waiting: Waiting) -> tuple[StoredConversation, bytes]:
            # Read only now: pages that wait for a thread would be in memory, counted by nobody.
            page = waiting.result(shelf.reading(owner, read))
            return page.conversation, _listed(page, _rendered(page, is_tree, waiting))

        shelf = self._turns.shelf
        if renders:
            session, data = await self._turns.rendering.run(exchange.counted_as, rendered)
        else:
            session, data = await shelf.look(owner, listed)
        self._touch(session)
        exchange.send_bytes(data)

    async def media(self, exchange: Exchange) -> None:
        """A file of a session, by its digest; it never changes."""
        owner, (session_id, digest) = exchange.identity.name, exchange.args

        def read(store: ConversationStore) -> bytes | None:
            store.get(owner, session_id)
            return store.media(owner, [digest]).get(digest)

        data = await self._turns.shelf.look(owner, read)
        if data is None:
            raise NotFoundError(f"the session has no file {digest!r:.80}.")
        headers = {
            "Cache-Control": "private, max-age=31536000, immutable",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "X-Content-Type-Options": "nosniff",
        }
        exchange.send_bytes(data, headers=headers, content_type=mime_of(data))

    def _touch(self, session: StoredConversation) -> None:
        """It was read; nobody waits until that is noted."""
        self._turns.shelf.call(session.owner, lambda store: store.touch(session), session.id)

    async def export(self, exchange: Exchange) -> None:
        """A file, in parts as fast as its reader takes them."""
        owner, session_id = exchange.identity.name, exchange.args[0]
        form = exchange.query("format") or "json"
        if form not in EXPORTS:
            raise InvalidRequestError("format must be json or markdown.", "format")
        parts_of, kind, end = EXPORTS[form]
        session = await self._turns.shelf.look(owner, lambda store: store.get(owner, session_id))
        self._touch(session)
        async with contextlib.aclosing(parts_of(self._turns, session)) as parts:
            first = await anext(parts)  # what goes wrong until here has a status
            name = f'attachment; filename="{session_id:.60}.{end}"'
            exchange.set_header("Content-Disposition", name)
            await exchange.start_events(kind)
            try:
                await exchange.send_part(first)
                async for part in parts:
                    await exchange.send_part(part)
            except ClientGoneError:
                raise
            except Exception as error:  # a file that ends early must not look whole
                logger.warning("the export of %s broke off: %s", session_id, error)
                raise ClientGoneError from error
        exchange.end_events("")


def _objects(page: MessagePage, is_tree: bool) -> list[Object]:
    if not is_tree:
        return [message_object(message) for message in page.messages]
    return [{**message_object(m), "children": page.children[m.id]} for m in page.messages]


def _rendered(page: MessagePage, is_tree: bool, waiting: Waiting) -> list[Object]:
    """The objects with their text as blocks of sanitised HTML, while somebody waits for them."""
    from llmkit.gateway.web.markdown import render

    objects = _objects(page, is_tree)
    for message, made in zip(page.messages, objects, strict=True):
        waiting.check()
        made["html"] = render(message.text, waiting.check)
    return objects


def _listed(page: MessagePage, objects: list[Object]) -> bytes:
    last = page.messages[-1].id if page.messages else None
    return encoded({"object": "list", "data": objects, "last_id": last, "has_more": page.has_more})


Parts = AsyncGenerator[bytes]


async def _json(turns: Turns, session: StoredConversation) -> Parts:
    """As `ConversationStore.export` gives it."""
    from llmkit.store.conversation_formats import exported

    about = exported(session, [])
    head = about.pop("head")
    begun = encoded({**about, "messages": []}).removesuffix(b"]}")
    ids: set[str] = set()
    last: str | None = None
    has_more = True
    while has_more:
        page, data = await turns.shelf.look(session.owner, _read_tree(session, last))
        has_more = page.has_more
        if page.messages:
            yield begun + data
            begun = b", "
            ids.update(message.id for message in page.messages)
            last = page.messages[-1].id
    # A question that the engine has refused meanwhile is gone.
    end = b'], "head": ' + encoded(head if head in ids else last) + b"}"
    yield end if ids else begun + end


def _read_tree(
    session: StoredConversation, after: str | None
) -> Callable[[ConversationStore], tuple[MessagePage, bytes]]:
    """What reads the messages after one, as JSON with commas between."""
    from llmkit.store.conversation_formats import exported_message

    def read(store: ConversationStore) -> tuple[MessagePage, bytes]:
        page = store.page(
            session.owner,
            session.id,
            tree=True,
            after=after,
            limit=PART_MESSAGES,
            max_chars=PART_CHARS,
            children=False,
        )
        sizes = store.media_sizes(session.owner, _digests(page.messages))
        count, size = 0, 0
        for message in page.messages:  # as many as are in memory at once, with their files
            size += sum(sizes.get(digest, 0) for digest in message.digests)
            if count and size > PART_BYTES:
                break
            count += 1
        if count < len(page.messages):
            page = replace(page, messages=page.messages[:count], has_more=True)
        files = store.media(session.owner, _digests(page.messages)) if sizes else {}
        return page, b", ".join(encoded(exported_message(m, files)) for m in page.messages)

    return read


def _digests(messages: Sequence[StoredMessage]) -> list[str]:
    return [digest for message in messages for digest in message.digests]


async def _markdown(turns: Turns, session: StoredConversation) -> Parts:
    from llmkit.sessions.exchange_formats import about_markdown

    owner, session_id = session.owner, session.id
    ids = await turns.shelf.look(owner, lambda store: store.branch(owner, session_id))
    begun = about_markdown(session)
    while ids:
        count, text = await turns.shelf.look(owner, _read_some(session, ids[:PART_MESSAGES]))
        ids = ids[count:] if count else []
        yield (begun + text).encode("utf-8", "replace")
        begun = ""
    if begun:
        yield begun.encode("utf-8", "replace")


def _read_some(
    session: StoredConversation, ids: list[str]
) -> Callable[[ConversationStore], tuple[int, str]]:
    """What reads the first of these messages, as Markdown; and how many they are."""
    from llmkit.sessions.exchange_formats import message_markdown

    def read(store: ConversationStore) -> tuple[int, str]:
        found = store.some(session.owner, session.id, ids, PART_CHARS)
        return len(found), "".join(f"\n{message_markdown(message)}" for message in found)

    return read


EXPORTS: dict[str, tuple[Callable[[Turns, StoredConversation], Parts], str, str]] = {
    "json": (_json, "application/json", "json"),
    "markdown": (_markdown, "text/markdown; charset=utf-8", "md"),
}


def _flag(exchange: Exchange, name: str) -> bool:
    value = exchange.query(name) or "0"
    if value not in ("0", "1", "true", "false"):
        raise InvalidRequestError(f"{name} must be 0 or 1.", name)
    return value in ("1", "true")


def number_of(exchange: Exchange, name: str, default: int) -> int:
    """A number of the query, from 1 to 1000. Raises `InvalidRequestError`."""
    text = exchange.query(name) or str(default)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= MAX_PAGE):
        raise InvalidRequestError(f"{name} must be a number from 1 to {MAX_PAGE}.", name)
    return int(text)
