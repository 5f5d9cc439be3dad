"""Models in this process."""

__all__: list[str] = []
