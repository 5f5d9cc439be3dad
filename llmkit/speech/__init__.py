"""Models that hear and speak, and sound as bytes. Nothing of it is imported at the start."""

__all__: list[str] = []
