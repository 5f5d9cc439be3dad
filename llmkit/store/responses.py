"""Stored responses of OpenAI's interface: each belongs to its caller. Any thread.

Turns of a conversation share their beginning: a response ends a chain of segments, each with the
JSON of some items, and holds it; what nothing holds any more is deleted. Sizes are columns, so
nothing is read or serialised to be counted.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from llmkit.errors import InvalidRequestError, NotFoundError
from llmkit.store import media
from llmkit.store.conversation_records import storable
from llmkit.store.conversation_rows import owner_key
from llmkit.store.database import Database
from llmkit.store.media import TooMuchError
from llmkit.store.response_rows import (
    IN_PROGRESS,
    add,
    chain,
    count,
    delete,
    delete_one,
    hold,
    num_bytes,
    owners_by_count,
    owners_by_size,
)
from llmkit.store.tables import Responses, Segments
from llmkit.store.writers import is_gone, new_writer

__all__ = ["ResponseStore", "StoredResponse"]

MAX_KEPT, MAX_KEPT_BYTES, MAX_OWNER_BYTES, MAX_RESPONSE_BYTES = 1000, 64 << 20, 16 << 20, 1 << 20
MAX_REFERENCES = 1024  # in one request
RENEWED = 500  # in one statement
ADVISORY_LOCK = 0x6C6C6D72  # of PostgreSQL
RESPONSES: Any = Responses.__table__
Item = dict[str, Any]
NOTHING: Mapping[str, bytes] = {}


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that can be retrieved and continued; ``body`` is its JSON.

    Times are in seconds since the epoch.
    """

    id: str
    owner: str
    status: str
    body: bytes
    created_at: float
    expires_at: float | None


class ResponseStore:
    """The responses that were used last, bounded by count and bytes, of all and of each owner.

    Raises `NotFoundError` for one that does not exist or, indistinguishably, is somebody else's,
    and `StoreError`.
    """

    def __init__(
        self,
        database: Database,
        *,
        ttl_s: float | None = None,
        max_kept: int = MAX_KEPT,
        max_bytes: int = MAX_KEPT_BYTES,
        max_owner_bytes: int = MAX_OWNER_BYTES,
        max_response_bytes: int = MAX_RESPONSE_BYTES,
        now: Callable[[], float] = time.time,
    ) -> None:
        """They are deleted ``ttl_s`` after their last use (None: never)."""
        self._database, self._ttl_s, self._now = database, ttl_s, now
        self._max_kept, self._max_bytes = max_kept, max_bytes
        self._max_owner_bytes, self._max_response_bytes = max_owner_bytes, max_response_bytes
        self._writer = new_writer()
        self._under_way: set[str] = set()  # the responses in progress that this store has put

    def find(self, owner: str, response_id: str) -> StoredResponse:
        """A response; it counts as used now."""
        with self._database.writing(relaxed=True) as session:
            row = self._find(session, owner, response_id)
            used = self._used()
            where = Responses.id == row.id
            session.execute(sa.update(RESPONSES).where(where).values(**used))
            return StoredResponse(
                row.id, row.owner, row.status, row.body, row.created_at, used["expires_at"]
            )

    def history(self, owner: str, response_id: str) -> list[Item]:
        """All items of the conversation that a response ends."""
        with self._database.reading() as session:
            row = self._find(session, owner, response_id)
            return [item for data in chain(session, row.segment_id) for item in json.loads(data)]

    def input_items(self, owner: str, response_id: str) -> list[Item]:
        """The items that a response was asked with, without those of responses before."""
        with self._database.reading() as session:
            row = self._find(session, owner, response_id)
            segment = session.get(Segments, row.input_id)
            return list(json.loads(segment.data)) if segment is not None else []

    def find_items(self, owner: str, ids: Collection[str]) -> dict[str, Item]:
        """Stored items by their ids, the newest of each; together bounded as if they were sent.

        Raises `InvalidRequestError` for too many, `NotFoundError` for one that is not there.
        """
        if len(ids) > MAX_REFERENCES:
            raise self._too_many()
        wanted, found, size = set(ids), dict[str, Item](), 0
        query = (
            sa.select(Segments.data)
            .where(Segments.owner == owner_key(owner))
            .order_by(Segments.created_at.desc(), Segments.id)
            .execution_options(yield_per=20)
        )
        with self._database.reading() as session, session.scalars(query) as segments:
            for data in segments:
                if not wanted:
                    break
                for item in json.loads(data):
                    if (item_id := item.get("id")) in wanted:
                        wanted.discard(item_id)
                        found[item_id] = item
                        size += len(json.dumps(item))
        if wanted:
            raise NotFoundError(
                f"there is no item {min(wanted)!r:.100}: its response was never stored, was "
                "deleted, or has expired."
            )
        if size > self._max_owner_bytes:
            raise self._too_many()
        return found

    def _too_many(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"the input references too much; the limit is {MAX_REFERENCES} items and "
            f"{self._max_owner_bytes >> 20} MiB.",
            "input",
        )

    def put(
        self,
        owner: str,
        response_id: str,
        response: dict[str, Any],
        items: Sequence[Item],
        previous_id: str | None = None,
        before: Sequence[Item] = (),
        digests: Collection[str] = (),
        files: Mapping[str, bytes] = NOTHING,
    ) -> bool:
        """Keep a response, or its latest state; False if it is too large.

        ``items`` are those that it was asked with, after those of ``previous_id``. Should that be
        gone by now, ``before`` are its items. They hold the pictures and sounds of ``digests``, of
        which ``files`` has those that may be new. A response that is in progress fails when its
        process is gone, see `recover`.
        """
        try:
            is_kept = self._put(
                owner, response_id, response, items, previous_id, before, digests, files
            )
        except TooMuchError:
            is_kept = False
        if is_kept and response["status"] == IN_PROGRESS:
            self._under_way.add(response_id)
        else:
            self.give_up(response_id)
        return is_kept

    def _put(
        self,
        owner: str,
        response_id: str,
        response: dict[str, Any],
        items: Sequence[Item],
        previous_id: str | None,
        before: Sequence[Item],
        digests: Collection[str],
        files: Mapping[str, bytes],
    ) -> bool:
        body = json.dumps(response).encode()
        asked, said = json.dumps(list(items)).encode(), json.dumps(response["output"]).encode()
        with self._changing() as session:
            owner = owner_key(owner)
            known = session.get(Responses, response_id)
            if known is not None and known.owner != owner:
                return False
            if len(body) + len(asked) > self._max_response_bytes:
                if known is not None:
                    delete(session, known)
                return False
            parent = None
            if previous_id is not None:
                try:
                    parent = self._find(session, owner, previous_id).segment_id
                except NotFoundError:
                    asked = json.dumps([*before, *items]).encode()
            now = self._now()
            if known is None:
                first = add(session, owner, parent, asked, now)
                created_at = now
                if digests:
                    media.keep(session.connection(), owner, digests, files, now, segment_id=first)
            else:
                first, created_at = known.input_id, known.created_at
            last = add(session, owner, first, said, now)
            status = str(response["status"])
            row = Responses(
                id=response_id,
                owner=owner,
                status=status,
                body=body,
                size=len(body),
                segment_id=last,
                input_id=first,
                writer=self._writer if status == IN_PROGRESS else None,
                created_at=created_at,
                **self._used(),
            )
            hold(session, last)
            if known is not None:
                delete(session, known)
            session.add(row)
            session.flush()
            self._make_room(session, row)
            return session.get(Responses, response_id) is not None

    def delete(self, owner: str, response_id: str) -> None:
        """Forget a response; the ones that continue it keep its items."""
        with self._changing() as session:
            delete(session, self._find(session, owner, response_id))
        self.give_up(response_id)

    def count(self, owner: str | None = None) -> int:
        """How many there are, of an owner or of all."""
        with self._database.reading() as session:
            return count(session, None if owner is None else owner_key(owner))

    def num_bytes(self, owner: str | None = None) -> int:
        """Their size in bytes, of an owner or of all."""
        with self._database.reading() as session:
            return num_bytes(session, None if owner is None else owner_key(owner))

    def give_up(self, response_id: str) -> None:
        """Renew a response in progress no longer: it has failed before long."""
        self._under_way.discard(response_id)

    def renew(self) -> None:
        """Say that this process still computes its responses; at least every 20 s."""
        ids = list(self._under_way)
        with self._changing() as session:
            for first in range(0, len(ids), RENEWED):
                some = Responses.id.in_(ids[first : first + RENEWED])
                mine = some, Responses.writer == self._writer, Responses.status == IN_PROGRESS
                session.execute(sa.update(Responses).where(*mine).values(used_at=self._now()))

    def recover(self) -> int:
        """Let responses in progress whose process is gone be failed; how many."""
        count = 0
        with self._changing() as session:
            query = sa.select(Responses).where(Responses.status == IN_PROGRESS)
            for row in session.scalars(query).all():
                if row.writer and not is_gone(row.writer, row.used_at, self._now()):
                    continue
                body = json.loads(row.body)
                error = {"code": "server_error", "message": "The server ended before the answer."}
                body = {**body, "status": "failed", "error": error}
                row.status, row.writer = "failed", None
                row.body = json.dumps(body).encode()
                row.size = len(row.body)
                count += 1
        return count

    def remove_expired(self) -> int:
        """Delete what has expired; how many."""
        with self._changing() as session:
            expired = session.scalars(
                sa.select(Responses).where(Responses.expires_at <= self._now())
            ).all()
            for row in expired:
                delete(session, row)
            return len(expired)

    def _find(self, session: Session, owner: str, response_id: str) -> Responses:
        row = session.get(Responses, storable(response_id))
        if (
            row is None
            or row.owner != owner_key(owner)
            or (row.expires_at is not None and row.expires_at <= self._now())
        ):
            raise NotFoundError(
                f"there is no stored response {response_id!r:.100}: it was never stored, was "
                "deleted, or has expired."
            )
        return row

    def _used(self) -> dict[str, float | None]:
        now = self._now()
        return {"used_at": now, "expires_at": None if self._ttl_s is None else now + self._ttl_s}

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Session]:
        """A session to write with, one at a time in PostgreSQL as well: chains are shared."""
        with self._database.writing() as session:
            if session.get_bind().dialect.name == "postgresql":
                session.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
            yield session

    def _make_room(self, session: Session, newest: Responses) -> None:
        """Delete the least recently used of an owner with too many bytes, then of whoever has most.

        Others in progress stay: if nothing else can make way, the newest does.
        """
        owner = newest.owner
        bounds: list[tuple[Callable[[], bool], Callable[[], Sequence[str]]]] = [
            (lambda: num_bytes(session, owner) > self._max_owner_bytes, lambda: [owner]),
            (lambda: count(session) > self._max_kept, lambda: owners_by_count(session)),
            (lambda: num_bytes(session) > self._max_bytes, lambda: owners_by_size(session)),
        ]
        for is_exceeded, owners in bounds:
            while is_exceeded():
                if not delete_one(session, owners(), newest):
                    delete(session, newest)
                    return
