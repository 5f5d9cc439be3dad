"""The tables of the database. Their changes are in `migrations`."""

from __future__ import annotations

from datetime import date
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, Index, String
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Change", "Keys", "Table", "Usage"]


class Table(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {int: BigInteger, list[str]: JSON}


class Keys(Table):
    """An API key, by the SHA-256 of its secret. Revoked ones stay, so that usage has names."""

    __tablename__ = "llmkit_keys"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    sha256: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]]
    models: Mapped[list[str]]
    rate: Mapped[str | None] = mapped_column(String(64))
    concurrent: Mapped[int | None]
    tokens_per_day: Mapped[int | None]
    tokens_per_month: Mapped[int | None]
    weight: Mapped[float]
    created_at: Mapped[float]
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]


class Usage(Table):
    """What a caller used of a model in one day (UTC). Rows stay; gateways read those of a month."""

    __tablename__ = "llmkit_usage"
    __table_args__ = (Index("llmkit_usage_day", "day"),)

    caller: Mapped[str] = mapped_column(String(255), primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(String(255), primary_key=True)
    requests: Mapped[int]
    prompt_tokens: Mapped[int]
    cached_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    seconds: Mapped[float]


class Change(Table):
    """How often something was changed; running gateways look at it to notice."""

    __tablename__ = "llmkit_changes"

    what: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int]
