"""Conversations kept by the gateway: turns, their events, and the routes of sessions."""

__all__: list[str] = []
