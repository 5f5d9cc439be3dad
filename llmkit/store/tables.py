"""The tables of the database. Their changes are in `migrations`."""

from __future__ import annotations

from datetime import date
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, LargeBinary, String, Text, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = [
    "Change",
    "Conversations",
    "HalfHours",
    "Keys",
    "Media",
    "MediaUses",
    "Messages",
    "Replies",
    "Responses",
    "Segments",
    "Table",
    "Usage",
]

CONVERSATION, SEGMENT = "llmkit_conversations.id", "llmkit_segments.id"


class Table(DeclarativeBase):
    """The base of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        int: BigInteger,
        list[str]: JSON,
        list[Any]: JSON(none_as_null=True),
        dict[str, Any]: JSON(none_as_null=True),
        bytes: LargeBinary,
    }


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


class HalfHours(Table):
    """A caller's tokens in half an hour, counted from the epoch: for windows that roll. Rows go
    after a day."""

    __tablename__ = "llmkit_half_hours"
    __table_args__ = (Index("llmkit_half_hours_number", "number"),)

    caller: Mapped[str] = mapped_column(String(255), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    tokens: Mapped[int]


class Change(Table):
    """How often something was changed; running gateways look at it to notice."""

    __tablename__ = "llmkit_changes"

    what: Mapped[str] = mapped_column(String(64), primary_key=True)
    number: Mapped[int]


class Conversations(Table):
    """A conversation: a tree of messages. ``head`` is the leaf that is shown.

    ``by_title``: a client's title began it, and nobody has changed it since.
    """

    __tablename__ = "llmkit_conversations"
    __table_args__ = (
        Index("llmkit_conversations_used", "owner", "used_at", "id"),
        Index("llmkit_conversations_updated", "owner", "updated_at", "id"),
        Index("llmkit_conversations_expires", "expires_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    title: Mapped[str] = mapped_column(Text)
    model: Mapped[str] = mapped_column(Text)
    settings: Mapped[dict[str, Any]]
    pruning: Mapped[str] = mapped_column(String(16))
    head: Mapped[str | None] = mapped_column(String(32))
    version: Mapped[int]
    num_messages: Mapped[int]
    num_chars: Mapped[int]
    ttl_s: Mapped[float | None]
    created_at: Mapped[float]
    updated_at: Mapped[float]
    used_at: Mapped[float]
    expires_at: Mapped[float | None]
    by_title: Mapped[bool] = mapped_column(server_default=false())


class Messages(Table):
    """A message. Its ``number`` is above its parent's. One that is not running never changes."""

    __tablename__ = "llmkit_messages"
    __table_args__ = (Index("llmkit_messages_order", "conversation_id", "number", unique=True),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey(CONVERSATION, ondelete="CASCADE"))
    parent_id: Mapped[str | None] = mapped_column(String(32))
    number: Mapped[int]
    role: Mapped[str] = mapped_column(String(16))
    content: Mapped[str] = mapped_column(Text)
    parts: Mapped[list[Any] | None]
    reasoning: Mapped[str | None] = mapped_column(Text)
    tool_calls: Mapped[list[Any] | None]
    tool_call_id: Mapped[str | None] = mapped_column(Text)
    name: Mapped[str | None] = mapped_column(Text)
    status: Mapped[str] = mapped_column(String(16))
    finish_reason: Mapped[str | None] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(Text)
    usage: Mapped[dict[str, Any] | None]
    created_at: Mapped[float]


class Replies(Table):
    """A reply that is being written, by the process ``writer``.

    ``stem_id`` is what its turn was said to, ``before_id`` the head until then.
    """

    __tablename__ = "llmkit_replies"
    __table_args__ = (Index("llmkit_replies_conversation", "conversation_id"),)

    message_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    conversation_id: Mapped[str] = mapped_column(ForeignKey(CONVERSATION, ondelete="CASCADE"))
    stem_id: Mapped[str | None] = mapped_column(String(32))
    before_id: Mapped[str | None] = mapped_column(String(32))
    writer: Mapped[str] = mapped_column(String(128))
    renewed_at: Mapped[float]


class Responses(Table):
    """A stored response of OpenAI's interface; its items end with ``segment_id``."""

    __tablename__ = "llmkit_responses"
    __table_args__ = (
        Index("llmkit_responses_used", "owner", "used_at"),
        Index("llmkit_responses_expires", "expires_at"),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    status: Mapped[str] = mapped_column(String(16))
    body: Mapped[bytes]
    size: Mapped[int]
    segment_id: Mapped[str] = mapped_column(String(32))
    input_id: Mapped[str] = mapped_column(String(32))
    writer: Mapped[str | None] = mapped_column(String(128))
    created_at: Mapped[float]
    used_at: Mapped[float]
    expires_at: Mapped[float | None]


class Segments(Table):
    """Items of a response, after those of ``parent_id``; ``holders`` counts what needs it."""

    __tablename__ = "llmkit_segments"
    __table_args__ = (Index("llmkit_segments_owner", "owner", "size"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(255))
    parent_id: Mapped[str | None] = mapped_column(String(32))
    data: Mapped[bytes]
    size: Mapped[int]
    holders: Mapped[int]
    created_at: Mapped[float]


class Media(Table):
    """A picture or sound of an owner, known by the SHA-256 of its bytes."""

    __tablename__ = "llmkit_media"

    owner: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    size: Mapped[int]
    added_at: Mapped[float]
    data: Mapped[bytes]


class MediaUses(Table):
    """What uses a file: a conversation, or a segment of a response; ``holder`` is its id."""

    __tablename__ = "llmkit_media_uses"
    __table_args__ = (
        Index("llmkit_media_uses_conversation", "conversation_id"),
        Index("llmkit_media_uses_segment", "segment_id"),
    )

    owner: Mapped[str] = mapped_column(String(255), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(32), primary_key=True)
    conversation_id: Mapped[str | None] = mapped_column(
        String(32), ForeignKey(CONVERSATION, ondelete="CASCADE")
    )
    segment_id: Mapped[str | None] = mapped_column(
        String(32), ForeignKey(SEGMENT, ondelete="CASCADE")
    )
