"""Parsers of tool calls and reasoning, one module per form that models write them in."""

__all__: list[str] = []
