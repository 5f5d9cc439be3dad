"""Which conversations a client's title began; listing by the latest change."""

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "downgrade", "revision", "upgrade"]

revision = "v0003"
down_revision = "v0002"
TABLE, INDEX = "llmkit_conversations", "llmkit_conversations_updated"


def upgrade() -> None:
    """Add the column and the index."""
    begun = sa.Column("by_title", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column(TABLE, begun)
    op.create_index(INDEX, TABLE, ["owner", "updated_at", "id"])


def downgrade() -> None:
    """Take them away."""
    op.drop_index(INDEX, TABLE)
    op.drop_column(TABLE, "by_title")
