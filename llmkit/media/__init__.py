"""Pictures and sounds as files: what they are, and their pixels and samples."""

__all__: list[str] = []
