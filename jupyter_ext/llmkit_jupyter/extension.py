"""The Jupyter Server extension: `llmkit.gateway` for this server's kernels and users."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from jupyter_core.utils import ensure_async
from jupyter_server._tz import utcnow
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from prometheus_client import REGISTRY
from traitlets import Bool, Float, Int, TraitType, Unicode

from llmkit.gateway.access.deadlines import Deadlines
from llmkit.gateway.access.overload import Overload
from llmkit.gateway.app import Gateway
from llmkit.gateway.conversations.shelf import Shelf
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.ops.metrics import Metrics
from llmkit.gateway.ops.telemetry import start_telemetry
from llmkit.gateway.ops.unloading import UnloadRoutes
from llmkit.gateway.pipeline import Observer, Stage
from llmkit.gateway.rules import Rules
from llmkit.gateway.sources import ConnectionFiles
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient
from llmkit.settings.gateway import GATEWAY_OPTIONS, GatewayOptions
from llmkit_jupyter.handler import JupyterAssetHandler, JupyterGatewayHandler
from llmkit_jupyter.socket import SOCKET_ROUTE, JupyterChatSocket

if TYPE_CHECKING:
    from llmkit.gateway.ops.tracing import Tracer

__all__ = ["LLMKitExtension"]


def _trait(kind: type[TraitType[Any, Any]], name: str, more: str = "") -> Any:
    """A trait for an option of gateways, with its default and sentence, and what is so here."""
    row = GATEWAY_OPTIONS[name]
    words = f"{row.help} {more}".strip()
    return kind(row.default, allow_none=row.default is None, help=words).tag(config=True)


class LLMKitExtension(ExtensionApp):
    """Serves the models of this server's kernels to other programs.

    Raises `InvalidRequestError` naming an option that is wrong.
    """

    name = "llmkit_jupyter"
    default_url = "/lab"
    load_other_extensions = True

    default_model = _trait(Unicode, "default_model", "The first is the one loaded last.")
    strict = _trait(Bool, "strict")
    max_queue = _trait(Int, "max_queue")
    max_concurrent = _trait(Int, "max_concurrent")
    request_timeout_s = _trait(Float, "request_timeout_s")
    sessions = _trait(Bool, "sessions", "The database is a file in your data folder.")
    max_sessions = _trait(Int, "max_sessions")
    session_ttl_s = _trait(Float, "session_ttl_s")
    metrics = _trait(Bool, "metrics", "Jupyter's own /metrics has them too.")
    otlp_endpoint = _trait(Unicode, "otlp_endpoint", "By default as the OTEL_ variables say.")
    service_name = _trait(Unicode, "service_name")

    _metrics: Metrics | None = None
    _tracer: Tracer | None = None

    def _options(self) -> GatewayOptions:
        """What the traits say, checked."""
        names = self.class_own_traits(config=True)
        return GatewayOptions(**{name: getattr(self, name) for name in names})

    def initialize_handlers(self) -> None:
        options = self._options()
        self._directory = EngineDirectory(
            [ConnectionFiles(self._is_ours)], default=options.default_model
        )
        gateway = Gateway(
            self._directory,
            self._note_use,
            self._places,
            strict=options.strict,
            stages=self._bounds(options),
            observers=[*self._measuring(options), *self._tracing(options)],
            routes=[
                *UnloadRoutes(self._directory).routes(),
                *(self._metrics.routes() if self._metrics is not None else ()),
            ],
            sessions=Shelf.of(options),
            home="status",
            admin=True,  # for the owner of the kernels, see `JupyterGatewayHandler`
        )
        self._sockets, self._turns = gateway.sockets, gateway.turns
        self.handlers.append((SOCKET_ROUTE, JupyterChatSocket, {"gateway": gateway}))
        self.handlers.append((r"/llmkit/(assets/.*)", JupyterAssetHandler, {"gateway": gateway}))
        self.handlers.append((r"/llmkit(?:/(.*))?", JupyterGatewayHandler, {"gateway": gateway}))

    def _bounds(self, options: GatewayOptions) -> list[Stage]:
        overload = Overload(
            self._directory,
            max_queue=options.max_queue,
            max_concurrent=options.max_concurrent,
        )
        deadlines = Deadlines(options.request_timeout_s, overload.retry_after)
        return [deadlines.stage, overload.stage, Rules(overload=overload).stage]

    def _measuring(self, options: GatewayOptions) -> list[Observer]:
        """Metrics at this mount, and in Jupyter's own registry, which it serves at ``/metrics``."""
        if not options.metrics:
            return []
        self._metrics = Metrics(self._directory)
        try:
            REGISTRY.register(self._metrics)
        except ValueError as error:  # another server in this process has them there
            self.log.warning("the metrics of llmkit are not in Jupyter's /metrics: %s", error)
        return [self._metrics.observer]

    def _tracing(self, options: GatewayOptions) -> list[Observer]:
        self._tracer = start_telemetry(options.otlp_endpoint, service_name=options.service_name)
        return [] if self._tracer is None else [self._tracer.observer]

    @property
    def _server(self) -> ServerApp:
        assert self.serverapp is not None
        return self.serverapp

    def _is_ours(self, origin: Origin) -> bool:
        return origin.kernel_id is not None and origin.kernel_id in self._server.kernel_manager

    async def _places(self) -> dict[str, str]:
        """The notebook of each kernel, by kernel id."""
        sessions: Any = await ensure_async(self._server.session_manager.list_sessions())
        return {
            s["kernel"]["id"]: str(s.get("path") or s.get("name") or "")
            for s in sessions
            if s.get("kernel")
        }

    def _note_use(self, engine: EngineClient) -> None:
        """A kernel whose model is in use is not idle, for the cullers of Jupyter and JupyterHub."""
        now = utcnow()
        self._server.web_app.settings["last_activity_times"]["llmkit"] = now
        kernel_id = engine.origin.kernel_id
        if kernel_id is not None and kernel_id in self._server.kernel_manager:
            kernel: Any = self._server.kernel_manager.get_kernel(kernel_id)
            kernel.last_activity = now

    async def _start_jupyter_server_extension(self, serverapp: ServerApp) -> None:
        """Called once the server listens and its port is known (``--port=0``)."""
        self.log.info("llmkit gateway at %sllmkit/v1", serverapp.connection_url)

    async def stop_extension(self) -> None:
        self._sockets.drain()
        await self._turns.close()
        await self._sockets.close()
        self._directory.close()
        if self._metrics is not None:
            with contextlib.suppress(KeyError):  # never registered
                REGISTRY.unregister(self._metrics)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
