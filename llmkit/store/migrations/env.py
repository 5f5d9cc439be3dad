"""What alembic runs: the steps, in the transaction of whoever asked."""

from alembic import context

from llmkit.store.migrations import VERSION_TABLE

__all__: list[str] = []

if hasattr(context, "config"):  # only while alembic runs
    context.configure(
        connection=context.config.attributes["connection"], version_table=VERSION_TABLE
    )
    with context.begin_transaction():
        context.run_migrations()
