"""Fixture: a gateway over a model that draws without the library, and the stock client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from drawing import FakePainter
from gateway_client import Api, serve

from llmkit.gateway.directory import EngineDirectory
from llmkit.models.registry import ModelSpec
from llmkit.runtime.images import LocalImages
from llmkit.settings.options import EngineOptions


class Drawn:
    """A gateway over a model that draws, and its client."""

    def __init__(self, api: Api, painter: FakePainter, engine: LocalImages) -> None:
        self.api, self.painter, self.engine = api, painter, engine
        self.client = openai.AsyncOpenAI(base_url=api.url + "/v1", api_key="k", max_retries=0)

    async def draw(self, **options: Any) -> Any:
        fields = {"model": "fake", "prompt": "a cat", **options}
        more = {k: fields.pop(k) for k in ("seed", "steps", "cfg_scale") if k in fields}
        return await self.client.images.generate(**fields, extra_body=more)


@pytest.fixture
async def drawn(tmp_path: Path) -> AsyncIterator[Drawn]:
    painter = FakePainter()
    spec = ModelSpec("fake", tmp_path / "fake.safetensors")
    engine = LocalImages(spec, painter, EngineOptions())

    class Source:
        def find(self) -> dict[Any, Any]:
            return {"only": lambda: engine}

    async for api in serve(None, directory=EngineDirectory([Source()])):
        drawn = Drawn(api, painter, engine)
        yield drawn
        await drawn.client.close()
    engine.close()
