"""Rows of stored responses: their chains of segments, how much they are, and who makes way.

Functions of a transaction. Owners are keys, see `owner_key`.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.orm import Session

from llmkit.store.conversation_records import new_id
from llmkit.store.tables import Responses, Segments

__all__ = [
    "IN_PROGRESS",
    "add",
    "chain",
    "count",
    "delete",
    "delete_one",
    "hold",
    "num_bytes",
    "owners_by_count",
    "owners_by_size",
]

IN_PROGRESS = "in_progress"
MAX_CHAIN = 100_000


def count(session: Session, owner: str | None = None) -> int:
    """How many there are, or an owner has."""
    query = sa.select(sa.func.count(Responses.id))
    query = query if owner is None else query.where(Responses.owner == owner)
    return session.scalar(query) or 0


def owners_by_count(session: Session) -> Sequence[str]:
    """Whoever has most responses first."""
    most = sa.func.count(Responses.id).desc(), sa.func.min(Responses.used_at)
    query = sa.select(Responses.owner).group_by(Responses.owner).order_by(*most)
    return session.scalars(query).all()


def owners_by_size(session: Session) -> Sequence[str]:
    """Whoever has most bytes first."""
    sizes = sa.union_all(*(sa.select(t.owner, t.size) for t in (Responses, Segments))).subquery()
    most = sa.func.sum(sizes.c.size).desc(), sizes.c.owner
    return session.scalars(sa.select(sizes.c.owner).group_by(sizes.c.owner).order_by(*most)).all()


def delete_one(session: Session, owners: Sequence[str], newest: Responses) -> bool:
    """Delete the least recently used of the first owner who has one that is over, beside the
    newest; whether there was any."""
    for owner in owners:
        where = (
            Responses.owner == owner,
            Responses.status != IN_PROGRESS,
            Responses.id != newest.id,
        )
        query = sa.select(Responses).where(*where).order_by(Responses.used_at, Responses.id)
        if (row := session.scalars(query.limit(1)).one_or_none()) is not None:
            delete(session, row)
            return True
    return False


def num_bytes(session: Session, owner: str | None = None) -> int:
    """The size of all, or of an owner's."""
    total = 0
    for table in (Responses, Segments):
        query = sa.select(sa.func.sum(table.size))
        query = query if owner is None else query.where(table.owner == owner)
        total += int(session.scalar(query) or 0)
    return total


def add(session: Session, owner: str, parent_id: str | None, data: bytes, now: float) -> str:
    """A segment after another, which it holds."""
    segment_id = new_id("seg")
    values = {"parent_id": parent_id, "data": data, "size": len(data), "holders": 0}
    session.execute(
        sa.insert(Segments), {"id": segment_id, "owner": owner, "created_at": now, **values}
    )
    if parent_id is not None:
        hold(session, parent_id)
    return segment_id


def hold(session: Session, segment_id: str) -> None:
    where = Segments.id == segment_id
    session.execute(sa.update(Segments).where(where).values(holders=Segments.holders + 1))


def delete(session: Session, row: Responses) -> None:
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


def chain(session: Session, segment_id: str) -> list[bytes]:
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
