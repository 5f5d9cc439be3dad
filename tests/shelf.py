"""Engines that come and go, and the states of models."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from llmkit.protocol.client import EngineClient
from llmkit.workers.place import ModelStatus


class Shelf:
    """A source of engines that come and go."""

    def __init__(self) -> None:
        self.engines: list[Any] = []

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        return {id(engine): (lambda e=engine: e) for engine in self.engines}


def status(phase: str, **more: Any) -> ModelStatus:
    return ModelStatus("m", phase, **more)  # type: ignore[arg-type]
