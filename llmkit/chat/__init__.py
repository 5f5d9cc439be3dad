"""Chat: templates, conversations, and the text of a model parsed into content and tool calls."""

__all__: list[str] = []
