"""What outlives a process: keys and usage, in SQLite or PostgreSQL."""

__all__: list[str] = []
