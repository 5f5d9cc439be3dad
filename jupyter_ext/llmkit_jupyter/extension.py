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
from traitlets import Bool, Float, Int, Unicode

from llmkit.gateway.access.deadlines import Deadlines
from llmkit.gateway.access.overload import Overload
from llmkit.gateway.app import Gateway
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.ops.metrics import Metrics
from llmkit.gateway.ops.telemetry import start_telemetry
from llmkit.gateway.pipeline import Observer, Stage
from llmkit.gateway.rules import Rules
from llmkit.gateway.sources import ConnectionFiles
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient
from llmkit_jupyter.handler import JupyterGatewayHandler

if TYPE_CHECKING:
    from llmkit.gateway.ops.tracing import Tracer

__all__ = ["LLMKitExtension"]


class LLMKitExtension(ExtensionApp):
    """Serves the models of this server's kernels to other programs."""

    name = "llmkit_jupyter"
    default_url = "/lab"
    load_other_extensions = True

    default_model = Unicode(
        None,
        allow_none=True,
        help='The model behind the name "default". None: the most recently loaded.',
    ).tag(config=True)

    strict = Bool(False, help="Refuse request fields that are otherwise accepted and ignored.").tag(
        config=True
    )

    max_queue = Int(
        None,
        allow_none=True,
        help="Requests that may wait, of all users together. None: as many as each model takes.",
    ).tag(config=True)

    max_concurrent = Int(
        None, allow_none=True, help="Requests at once of each user. None: without a limit."
    ).tag(config=True)

    request_timeout_s = Float(
        None, allow_none=True, help="Longest time for a request, in seconds. None: without end."
    ).tag(config=True)

    metrics = Bool(
        True, help="Count requests and tokens for Prometheus, at /llmkit/metrics and /metrics."
    ).tag(config=True)

    otlp_endpoint = Unicode(
        None,
        allow_none=True,
        help="Collector of OpenTelemetry to send traces to, such as http://localhost:4318. "
        "None: as the OTEL_ variables say.",
    ).tag(config=True)

    _metrics: Metrics | None = None
    _tracer: Tracer | None = None

    def initialize_handlers(self) -> None:
        self._directory = EngineDirectory(
            [ConnectionFiles(self._is_ours)], default=self.default_model
        )
        gateway = Gateway(
            self._directory,
            self._note_use,
            self._places,
            strict=self.strict,
            stages=self._bounds(),
            observers=[*self._measuring(), *self._tracing()],
            routes=self._metrics.routes() if self._metrics is not None else (),
        )
        self.handlers.append((r"/llmkit(?:/(.*))?", JupyterGatewayHandler, {"gateway": gateway}))

    def _bounds(self) -> list[Stage]:
        overload = Overload(
            self._directory, max_queue=self.max_queue, max_concurrent=self.max_concurrent
        )
        deadlines = Deadlines(self.request_timeout_s, overload.retry_after)
        return [deadlines.stage, overload.stage, Rules(overload=overload).stage]

    def _measuring(self) -> list[Observer]:
        """Metrics at this mount, and in Jupyter's own registry, which it serves at ``/metrics``."""
        if not self.metrics:
            return []
        self._metrics = Metrics(self._directory)
        try:
            REGISTRY.register(self._metrics)
        except ValueError as error:  # another server in this process has them there
            self.log.warning("the metrics of llmkit are not in Jupyter's /metrics: %s", error)
        return [self._metrics.observer]

    def _tracing(self) -> list[Observer]:
        self._tracer = start_telemetry(self.otlp_endpoint)
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
        self._directory.close()
        if self._metrics is not None:
            with contextlib.suppress(KeyError):  # never registered
                REGISTRY.unregister(self._metrics)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
