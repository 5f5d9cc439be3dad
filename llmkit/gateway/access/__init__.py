"""Access: keys, identities and limits of callers."""

__all__: list[str] = []
