"""Conversations, tools, and the running requests of a handle."""

__all__: list[str] = []
