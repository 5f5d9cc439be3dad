"""What all handles have: the model behind them, sharing it, and unloading it.

A handle composes the layers below it and owns no memory itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Self

from llmkit.errors import InvalidRequestError, ModelUnloadedError
from llmkit.notebook.sharing import Sharing
from llmkit.protocol import EngineStats, ModelDescription
from llmkit.protocol.client import EngineClient
from llmkit.settings.options import EngineOptions
from llmkit.system.waiting import uninterrupted

if TYPE_CHECKING:
    from llmkit.bridge.server import BridgeServer
    from llmkit.notebook.serving import Endpoint

__all__ = ["Handle"]


class Handle:
    """A loaded model, as people hold it. ``options`` are those that it was loaded with."""

    def __init__(
        self,
        client: EngineClient,
        bridge: BridgeServer | None = None,
        options: EngineOptions | None = None,
        on_unload: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._client: EngineClient | None = client
        self._description = client.description
        self._sharing = Sharing(bridge)
        self._options = options or EngineOptions()
        self._on_unload, self._unload_lock = on_unload, threading.Lock()

    def check_same(
        self,
        options: EngineOptions,
        name: str | None,
        given: Collection[str] | None = None,
        share: bool | None = None,
    ) -> None:
        """Raises `InvalidRequestError` if a second load asks for other settings.

        ``given`` names the options that count (None: all).
        """
        mine = self._options.as_dict()
        other = {
            k: v
            for k, v in options.as_dict().items()
            if v != mine[k] and (given is None or k in given)
        }
        if name is not None and name != self.name:
            other["name"] = name
        isolated = self._options.isolated  # then its process shares it, or never does
        shared = self.engine.origin.shared if isolated else self._sharing.bridge is not None
        if (share is False and shared) or (share and isolated and not shared):
            other["share"] = share
        if other:
            wanted = ", ".join(f"{k}={v!r}" for k, v in other.items())
            raise InvalidRequestError(
                f"{self.name!r} is loaded in this process with other settings than {wanted}; "
                "unload() it first to change them."
            )

    def share(self, kernel_id: str | None) -> None:
        """Share a model loaded with ``share=False`` with other processes of this user."""
        if self._sharing.bridge is None and not self._options.isolated:
            self._sharing.start(self.engine, kernel_id)

    @property
    def model(self) -> ModelDescription:
        """Name, sizes and limits; of a model that hears or speaks, languages and voices."""
        return self._description

    @property
    def name(self) -> str:
        """The name that callers use."""
        return self._description.name

    @property
    def closed(self) -> bool:
        """Whether the model was unloaded, or its engine has ended."""
        client = self._client  # another thread may unload it
        return client is None or client.state.is_gone

    @property
    def stats(self) -> EngineStats:
        """The engine's current counters."""
        return self.engine.stats()

    @property
    def engine(self) -> EngineClient:
        """The engine client; the engine runs here or in another process."""
        client = self._client
        if client is None:
            raise ModelUnloadedError.of(self.name)
        return client

    def serve(self, port: int = 0) -> Endpoint:
        """Serve this model to other programs, through the Jupyter server's gateway if there is one.

        Otherwise starts a loopback gateway (on ``port``; 0 takes a free one). Shows the URL and how
        to use it, never the secret.
        """
        return self._sharing.serve(self.engine, port)

    def unload(self) -> None:
        """Free the memory; idempotent. Running requests end with `ModelUnloadedError`."""
        with self._unload_lock:
            client, self._client = self._client, None
        if client is None:
            return
        try:
            self._on_unload(self)
        finally:
            uninterrupted(lambda: self._close(client))

    def _close(self, client: EngineClient) -> None:
        self._sharing.close()
        client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()
