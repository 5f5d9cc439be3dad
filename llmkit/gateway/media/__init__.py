"""Pictures and sounds of requests: read, fetched and bounded."""

__all__: list[str] = []
