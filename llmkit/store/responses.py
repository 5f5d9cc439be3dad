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
from llmkit.store.conversation_records import new_id, storable
from llmkit.store.conversation_rows import owner_key
from llmkit.store.database import Database
from llmkit.store.media import TooMuchError
from llmkit.store.tables import Responses, Segments
from llmkit.store.writers import is_gone, new_writer

__all__ = ["ResponseStore", "StoredResponse"]

MAX_KEPT, MAX_KEPT_BYTES, MAX_OWNER_BYTES, MAX_RESPONSE_BYTES = 1000, 64 << 20, 16 << 20, 1 << 20
MAX_REFERENCES = 1024  # in one request
MAX_CHAIN = 100_000
ADVISORY_LOCK = 0x6C6C6D72  # of PostgreSQL
IN_PROGRESS = "in_progress"
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
            return [item for data in _chain(session, row.segment_id) for item in json.loads(data)]

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
            return self._put(
                owner, response_id, response, items, previous_id, before, digests, files
            )
        except TooMuchError:
            return False

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
                    _delete(session, known)
                return False
            parent = None
            if previous_id is not None:
                try:
                    parent = self._find(session, owner, previous_id).segment_id
                except NotFoundError:
                    asked = json.dumps([*before, *items]).encode()
            now = self._now()
            if known is None:
                first = _add(session, owner, parent, asked, now)
                created_at = now
                if digests:
                    media.keep(session.connection(), owner, digests, files, now, segment_id=first)
            else:
                first, created_at = known.input_id, known.created_at
            last = _add(session, owner, first, said, now)
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
            _hold(session, last)
            if known is not None:
                _delete(session, known)
            session.add(row)
            session.flush()
            self._make_room(session, row)
            return session.get(Responses, response_id) is not None

    def delete(self, owner: str, response_id: str) -> None:
        """Forget a response; the ones that continue it keep its items."""
        with self._changing() as session:
            _delete(session, self._find(session, owner, response_id))

    def count(self, owner: str | None = None) -> int:
        """How many there are, of an owner or of all."""
        with self._database.reading() as session:
            query = sa.select(sa.func.count()).select_from(Responses)
            where = [] if owner is None else [Responses.owner == owner_key(owner)]
            return session.scalar(query.where(*where)) or 0

    def num_bytes(self, owner: str | None = None) -> int:
        """Their size in bytes, of an owner or of all."""
        with self._database.reading() as session:
            return _num_bytes(session, None if owner is None else owner_key(owner))

    def renew(self) -> None:
        """Say that this process still computes its responses; at least every 20 s."""
        with self._changing() as session:
            mine = Responses.writer == self._writer, Responses.status == IN_PROGRESS
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
                _delete(session, row)
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
        """Delete the least recently used of an owner with too many bytes, then of all."""
        owner = newest.owner
        while _num_bytes(session, owner) > self._max_owner_bytes:
            _delete(session, _oldest(session, owner))
        excess = (session.scalar(sa.select(sa.func.count(Responses.id))) or 0) - self._max_kept
        for _ in range(excess):
            _delete(session, _oldest(session, None))
        while _num_bytes(session, None) > self._max_bytes:
            _delete(session, _oldest(session, None))


def _oldest(session: Session, owner: str | None) -> Responses:
    where = [] if owner is None else [Responses.owner == owner]
    query = sa.select(Responses).where(*where).order_by(Responses.used_at, Responses.id).limit(1)
    return session.scalars(query).one()


def _num_bytes(session: Session, owner: str | None) -> int:
    total = 0
    for table in (Responses, Segments):
        query = sa.select(sa.func.sum(table.size))
        query = query if owner is None else query.where(table.owner == owner)
        total += int(session.scalar(query) or 0)
    return total


def _add(session: Session, owner: str, parent_id: str | None, data: bytes, now: float) -> str:
    """A segment after another, which it holds."""
    segment_id = new_id("seg")
    values = {"parent_id": parent_id, "data": data, "size": len(data), "holders": 0}
    session.execute(
        sa.insert(Segments), {"id": segment_id, "owner": owner, "created_at": now, **values}
    )
    if parent_id is not None:
        _hold(session, parent_id)
    return segment_id


def _hold(session: Session, segment_id: str) -> None:
    where = Segments.id == segment_id
    session.execute(sa.update(Segments).where(where).values(holders=Segments.holders + 1))


def _delete(session: Session, row: Responses) -> None:
    """Delete a response, and the segments that nothing else holds."""
    segment_id: str | None = row.segment_id
    session.execute(sa.delete(Responses).where(Responses.id == row.id))
    session.expunge(row)
    while segment_id is not None:
        where = Segments.id == segment_id
        session.execute(sa.update(Segments).where(where).values(holders=Segments.holders - 1))
        query = sa.select(Segments.holders, Segments.parent_id).where(where)
        left, parent_id = session.execute(query).one()
        if left > 0:
            return
        session.execute(sa.delete(Segments).where(where))
        segment_id = parent_id


def _chain(session: Session, segment_id: str) -> list[bytes]:
    """The data of a segment and those before it, oldest first."""
    found = (
        sa.select(Segments.id, Segments.parent_id, sa.literal(1).label("depth"))
        .where(Segments.id == segment_id)
        .cte("found", recursive=True)
    )
    found = found.union_all(
        sa.select(Segments.id, Segments.parent_id, found.c.depth + 1)
        .join(found, Segments.id == found.c.parent_id)
        .where(found.c.depth < MAX_CHAIN)
    )
    query = sa.select(Segments.data).join(found, Segments.id == found.c.id)
    return list(session.scalars(query.order_by(found.c.depth.desc())))
