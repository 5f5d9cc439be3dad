"""Conversations, their messages and running replies; stored responses and their items."""

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "downgrade", "revision", "upgrade"]

revision = "v0002"
down_revision = "v0001"


def upgrade() -> None:
    """Make their tables."""
    op.create_table(
        "llmkit_conversations",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("settings", sa.JSON, nullable=False),
        sa.Column("pruning", sa.String(16), nullable=False),
        sa.Column("head", sa.String(32)),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("num_messages", sa.BigInteger, nullable=False),
        sa.Column("num_chars", sa.BigInteger, nullable=False),
        sa.Column("ttl_s", sa.Float(53)),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("updated_at", sa.Float(53), nullable=False),
        sa.Column("used_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
    )
    op.create_index("llmkit_conversations_used", "llmkit_conversations", ["owner", "used_at", "id"])
    op.create_index("llmkit_conversations_expires", "llmkit_conversations", ["expires_at"])
    op.create_table(
        "llmkit_messages",
        sa.Column("id", sa.String(32), primary_key=True),
        _conversation(),
        sa.Column("parent_id", sa.String(32)),
        sa.Column("number", sa.BigInteger, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("parts", sa.JSON),
        sa.Column("reasoning", sa.Text),
        sa.Column("tool_calls", sa.JSON),
        sa.Column("tool_call_id", sa.Text),
        sa.Column("name", sa.Text),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("finish_reason", sa.String(64)),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("usage", sa.JSON),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_index(
        "llmkit_messages_order", "llmkit_messages", ["conversation_id", "number"], unique=True
    )
    op.create_table(
        "llmkit_replies",
        sa.Column("message_id", sa.String(32), primary_key=True),
        _conversation(),
        sa.Column("stem_id", sa.String(32)),
        sa.Column("before_id", sa.String(32)),
        sa.Column("writer", sa.String(128), nullable=False),
        sa.Column("renewed_at", sa.Float(53), nullable=False),
    )
    op.create_index("llmkit_replies_conversation", "llmkit_replies", ["conversation_id"])
    op.create_table(
        "llmkit_responses",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("segment_id", sa.String(32), nullable=False),
        sa.Column("input_id", sa.String(32), nullable=False),
        sa.Column("writer", sa.String(128)),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("used_at", sa.Float(53), nullable=False),
        sa.Column("expires_at", sa.Float(53)),
    )
    op.create_index("llmkit_responses_used", "llmkit_responses", ["owner", "used_at"])
    op.create_index("llmkit_responses_expires", "llmkit_responses", ["expires_at"])
    op.create_table(
        "llmkit_segments",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("owner", sa.String(255), nullable=False),
        sa.Column("parent_id", sa.String(32)),
        sa.Column("data", sa.LargeBinary, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("holders", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_index("llmkit_segments_owner", "llmkit_segments", ["owner", "size"])


def _conversation() -> sa.Column[str]:
    return sa.Column(
        "conversation_id",
        sa.String(32),
        sa.ForeignKey("llmkit_conversations.id", ondelete="CASCADE"),
        nullable=False,
    )


def downgrade() -> None:
    """Drop them."""
    for table in ("segments", "responses", "replies", "messages", "conversations"):
        op.drop_table(f"llmkit_{table}")
