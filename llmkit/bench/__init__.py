"""Measurements: profiles, comparisons, tuning, text quality, and load on an endpoint."""

__all__: list[str] = []
