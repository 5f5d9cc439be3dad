"""Tokens by half hour, for quotas of windows that roll."""

import sqlalchemy as sa
from alembic import op

__all__ = ["down_revision", "downgrade", "revision", "upgrade"]

revision = "v0004"
down_revision = "v0003"
TABLE, INDEX = "llmkit_half_hours", "llmkit_half_hours_number"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        TABLE,
        sa.Column("caller", sa.String(255), primary_key=True),
        sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
    )
    op.create_index(INDEX, TABLE, ["number"])


def downgrade() -> None:
    """Drop it."""
    op.drop_table(TABLE)
