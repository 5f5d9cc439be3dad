"""For operators: the status page, and the description of the routes."""

__all__: list[str] = []
