"""Alembic's steps from one form of the database to the next. Run by `llmkit.store.database`."""

__all__ = ["HEAD", "VERSION_TABLE"]

HEAD = "v0005"  # the newest step: looking it up in the files would import alembic at each start
VERSION_TABLE = "llmkit_version"
