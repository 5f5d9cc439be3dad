"""The API keys in the database: added, listed, revoked, rotated. Any thread."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.orm import Session

from llmkit.errors import InvalidRequestError
from llmkit.store.database import Database
from llmkit.store.noticing import Notice
from llmkit.store.records import KeyRecord
from llmkit.store.tables import Change, Keys

__all__ = ["KeyStore"]

KEYS = "keys"


class KeyStore:
    """Keys by name. Each change also counts up ``version``, which gateways watch.

    Raises `InvalidRequestError` for a name that is unknown or taken, and `StoreError`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def notice(self) -> Notice:
        """Whether there may be another version, for a watcher that looks often."""
        return Notice(self._database)

    def version(self) -> int:
        """Another number after each change, by whichever process."""
        with self._database.reading() as session:
            return session.scalar(sa.select(Change.number).where(Change.what == KEYS)) or 0

    def all(self) -> list[KeyRecord]:
        """Every key, also expired and revoked ones, by name."""
        with self._database.reading() as session:
            return [_record(row) for row in session.scalars(sa.select(Keys).order_by(Keys.name))]

    def add(self, record: KeyRecord) -> None:
        """Keep a new key. The name of one that was revoked or has expired may be used again."""
        with self._database.writing() as session:
            known = session.get(Keys, record.name)
            if known is not None and _record(known).state(record.created_at) == "active":
                raise InvalidRequestError(
                    f"there is a key {record.name!r} already; rotate or revoke it, or take "
                    "another name.",
                    "name",
                )
            session.merge(_row(record))
            _count(session)

    def revoke(self, name: str, now: float) -> KeyRecord:
        """End a key for good."""
        with self._database.writing() as session:
            row = _find(session, name)
            row.revoked_at = now
            _count(session)
            return _record(row)

    def rotate(
        self, name: str, sha256: str, now: float, expires_at: float | None = None
    ) -> KeyRecord:
        """Another secret for a key, in place of the old one; the rest stays, unless it gets another
        end. One that has expired needs that."""
        with self._database.writing() as session:
            row = _find(session, name)
            row.expires_at = row.expires_at if expires_at is None else expires_at
            if _record(row).state(now) == "expired":
                raise InvalidRequestError(
                    f"the key {name!r:.80} has expired; give the new one a later end with "
                    f"--expires, or make another with `llmkit keys add {name:.80}`.",
                    "expires",
                )
            row.sha256, row.last_used_at = sha256, None
            _count(session)
            return _record(row)

    def note_use(self, times: dict[str, float]) -> None:
        """When keys were last used, by `KeyRecord.sha256`. Not a change."""
        with self._database.writing() as session:
            for sha256, time in times.items():
                session.execute(
                    sa.update(Keys).where(Keys.sha256 == sha256).values(last_used_at=time)
                )


def _find(session: Session, name: str) -> Keys:
    row = session.get(Keys, name)
    if row is None or row.revoked_at is not None:
        state = "was revoked before" if row is not None else "is not known"
        raise InvalidRequestError(
            f"the key {name!r:.80} {state}; `llmkit keys list` shows what there is.", "name"
        )
    return row


def _count(session: Session) -> None:
    counter = session.get(Change, KEYS, with_for_update=True)
    if counter is None:
        session.add(Change(what=KEYS, number=1))
    else:
        counter.number += 1


def _record(row: Keys) -> KeyRecord:
    return KeyRecord(
        row.name,
        row.sha256,
        scopes=tuple(row.scopes),
        models=tuple(row.models),
        rate=row.rate,
        concurrent=row.concurrent,
        tokens_per_day=row.tokens_per_day,
        tokens_per_month=row.tokens_per_month,
        weight=row.weight,
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
        last_used_at=row.last_used_at,
    )


def _row(record: KeyRecord) -> Keys:
    return Keys(
        name=record.name,
        sha256=record.sha256,
        scopes=list(record.scopes),
        models=list(record.models),
        rate=record.rate,
        concurrent=record.concurrent,
        tokens_per_day=record.tokens_per_day,
        tokens_per_month=record.tokens_per_month,
        weight=record.weight,
        created_at=record.created_at,
        expires_at=record.expires_at,
        revoked_at=record.revoked_at,
        last_used_at=record.last_used_at,
    )
