"""Models in other processes."""

__all__: list[str] = []
