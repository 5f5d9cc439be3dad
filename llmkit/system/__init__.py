"""The foundation: files, threads and processes. Knows nothing of models."""

__all__: list[str] = []
