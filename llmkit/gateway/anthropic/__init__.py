"""Anthropic's dialect: messages and token counts."""

__all__: list[str] = []
