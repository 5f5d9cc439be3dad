"""How other programs reach a model: a bridge to other processes, and an HTTP endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmkit.errors import InvalidRequestError
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    from llmkit.bridge.server import BridgeServer
    from llmkit.notebook.serving import Endpoint

__all__ = ["Sharing"]


class Sharing:
    """The bridge and the endpoint of one engine; ``close()`` ends both."""

    def __init__(self, bridge: BridgeServer | None) -> None:
        self.bridge = bridge
        self._endpoint: Endpoint | None = None

    def start(self, engine: EngineClient, kernel_id: str | None) -> None:
        """Start the bridge."""
        from llmkit.bridge.server import BridgeServer

        self.bridge = BridgeServer(engine, kernel_id)

    def serve(self, engine: EngineClient, port: int) -> Endpoint:
        """The endpoint of the engine; reused while it is alive and ``port`` is 0 or its own.

        Raises `InvalidRequestError` for a model that is not shared.
        """
        from llmkit.notebook import serving

        origin = engine.origin if self.bridge is None else self.bridge.connection.origin
        if origin.kind == "url":
            raise InvalidRequestError(
                f"this model is served already: other programs reach it at {origin.url}/v1."
            )
        if not origin.shared:
            raise InvalidRequestError(
                "this model was loaded with share=False; load it with share=True to serve it.",
                "share",
            )
        if self._endpoint is not None and port not in (0, self._endpoint.port):
            self._endpoint.close()
            self._endpoint = None
        # The name in Jupyter's gateway changes when another kernel loads a model of that name.
        found = self._endpoint
        if found is None or not found.alive or found.in_jupyter:
            found = serving.find_or_start(engine.description, origin, port, known=found)
            self._endpoint = found
        return found

    def close(self) -> None:
        """End the endpoint, then the bridge."""
        if self._endpoint is not None:
            self._endpoint.close()
        if self.bridge is not None:
            self.bridge.close()
