"""The chat over a WebSocket: its messages, the state of a connection, and Tornado's adapter."""

__all__: list[str] = []
