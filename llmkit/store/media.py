"""Pictures and sounds of conversations and responses: each file once for its owner.

Functions of a transaction, on any thread. What nothing uses any more goes a minute after it was
last added: whoever adds it at that moment, in another process, must still find it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from llmkit.errors import InvalidRequestError
from llmkit.store.tables import Media, MediaUses

__all__ = [
    "MAX_OWNER_BYTES",
    "MEDIA",
    "UNUSED_S",
    "USES",
    "TooMuchError",
    "keep",
    "num_bytes",
    "read",
    "remove_unused",
    "sizes",
]

MAX_OWNER_BYTES = 512 << 20
UNUSED_S = 60.0
MANY = 500  # digests in one question
MEDIA: Any = Media.__table__
USES: Any = MediaUses.__table__


class TooMuchError(InvalidRequestError):
    """An owner would have too much."""


def keep(
    connection: Connection,
    owner: str,
    digests: Collection[str],
    files: Mapping[str, bytes],
    now: float,
    *,
    conversation_id: str | None = None,
    segment_id: str | None = None,
) -> None:
    """Note that a conversation or a segment of a response uses these; ``files`` are added.

    Those that are neither there nor given are left out. Raises `TooMuchError`.
    """
    stored = set(sizes(connection, owner, digests))
    new = {digest: files[digest] for digest in digests if digest in files and digest not in stored}
    if new:
        remove_unused(connection, now, owner)
        more = sum(len(data) for data in new.values())
        if num_bytes(connection, owner) + more > MAX_OWNER_BYTES:
            raise TooMuchError(
                f"all sessions of a caller hold {MAX_OWNER_BYTES >> 20} MiB of pictures and sounds "
                "at most; delete some first.",
                "messages",
            )
    holder = conversation_id or segment_id
    for digest in sorted(stored | new.keys()):  # in order: two writers never lock up
        data = new.get(digest)
        added = {"owner": owner, "digest": digest, "added_at": now}
        if data is not None:
            row = _insert(connection, MEDIA).values(**added, data=data, size=len(data))
            change = row.on_conflict_do_update(
                index_elements=["owner", "digest"], set_={"added_at": now}
            )
            connection.execute(change)
        else:
            connection.execute(sa.update(MEDIA).where(_is(owner, digest)).values(added_at=now))
        use = _insert(connection, USES).values(
            owner=owner,
            digest=digest,
            holder=holder,
            conversation_id=conversation_id,
            segment_id=segment_id,
        )
        connection.execute(use.on_conflict_do_nothing())


def _insert(connection: Connection, table: Any) -> Any:
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    return dialect.insert(table)


def _is(owner: str, digest: str) -> Any:
    return sa.and_(MEDIA.c.owner == owner, MEDIA.c.digest == digest)


def read(connection: Connection, owner: str, digests: Collection[str]) -> dict[str, bytes]:
    """The files that are there."""
    found: dict[str, bytes] = {}
    for part in _parts(digests):
        where = (MEDIA.c.owner == owner, MEDIA.c.digest.in_(part))
        for row in connection.execute(sa.select(MEDIA.c.digest, MEDIA.c.data).where(*where)):
            found[row.digest] = bytes(row.data)
    return found


def sizes(connection: Connection, owner: str, digests: Collection[str]) -> dict[str, int]:
    """How large those files are, in bytes, that are there."""
    found: dict[str, int] = {}
    for part in _parts(digests):
        where = (MEDIA.c.owner == owner, MEDIA.c.digest.in_(part))
        for row in connection.execute(sa.select(MEDIA.c.digest, MEDIA.c.size).where(*where)):
            found[row.digest] = int(row.size)
    return found


def _parts(digests: Collection[str]) -> list[list[str]]:
    each = list(dict.fromkeys(digests))
    return [each[i : i + MANY] for i in range(0, len(each), MANY)]


def num_bytes(connection: Connection, owner: str) -> int:
    """The size of all files of an owner."""
    query = sa.select(sa.func.sum(MEDIA.c.size)).where(MEDIA.c.owner == owner)
    return int(connection.scalar(query) or 0)


def remove_unused(connection: Connection, now: float, owner: str | None = None) -> int:
    """Delete what nothing uses any more, of an owner or of all; how many files."""
    used = sa.exists().where(USES.c.owner == MEDIA.c.owner, USES.c.digest == MEDIA.c.digest)
    where = [~used, MEDIA.c.added_at < now - UNUSED_S]
    if owner is not None:
        where.append(MEDIA.c.owner == owner)
    return int(connection.execute(sa.delete(MEDIA).where(*where)).rowcount)
