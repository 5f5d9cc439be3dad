"""Many engines as one: routing, replicas, fleets."""

from __future__ import annotations

__all__: list[str] = []
