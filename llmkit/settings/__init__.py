"""The table of options: what can be set, how it is checked, and where it comes from."""

__all__: list[str] = []
