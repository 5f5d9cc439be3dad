"""The LoRA adapters of requests that name none. Tornado loop only."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from llmkit.protocol.client import EngineClient

__all__ = ["Adapters", "Scales"]

Scales = tuple[tuple[str, float], ...]  # by the adapter's name


class Adapters:
    """The scales that administrators have set; a model that is loaded again has its own."""

    def __init__(self) -> None:
        self._scales: WeakKeyDictionary[EngineClient, Scales] = WeakKeyDictionary()

    def of(self, engine: EngineClient) -> Scales | None:
        """None: as they were loaded."""
        return self._scales.get(engine)

    def set(self, engine: EngineClient, scales: Scales) -> None:
        self._scales[engine] = scales
