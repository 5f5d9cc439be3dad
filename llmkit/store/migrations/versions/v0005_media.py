"""Pictures and sounds of conversations and responses."""

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "downgrade", "revision", "upgrade"]

revision = "v0005"
down_revision = "v0004"
FILES, USES = "llmkit_media", "llmkit_media_uses"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        FILES,
        sa.Column("owner", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("added_at", sa.Float, nullable=False),
        sa.Column("data", sa.LargeBinary, nullable=False),  # last: SQLite reads a row in order
    )
    op.create_table(
        USES,
        sa.Column("owner", sa.String(255), primary_key=True),
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("holder", sa.String(32), primary_key=True),
        sa.Column(
            "conversation_id",
            sa.String(32),
            sa.ForeignKey("llmkit_conversations.id", ondelete="CASCADE"),
        ),
        sa.Column(
            "segment_id", sa.String(32), sa.ForeignKey("llmkit_segments.id", ondelete="CASCADE")
        ),
    )
    op.create_index("llmkit_media_uses_conversation", USES, ["conversation_id"])
    op.create_index("llmkit_media_uses_segment", USES, ["segment_id"])


def downgrade() -> None:
    """Drop them."""
    op.drop_table(USES)
    op.drop_table(FILES)
