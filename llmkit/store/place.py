"""Where the database is, without opening it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["default_path"]


def default_path() -> Path:
    """Where the database is unless ``db_url`` says otherwise."""
    import platformdirs

    return Path(platformdirs.user_data_dir("llmkit", appauthor=False)) / "llmkit.db"
