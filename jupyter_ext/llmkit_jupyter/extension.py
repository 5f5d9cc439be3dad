"""The Jupyter Server extension: `llmkit.gateway` for this server's kernels and users."""

from __future__ import annotations

from typing import Any

from jupyter_core.utils import ensure_async
from jupyter_server._tz import utcnow
from jupyter_server.extension.application import ExtensionApp
from jupyter_server.serverapp import ServerApp
from traitlets import Bool, Unicode

from llmkit.gateway.app import Gateway
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.sources import ConnectionFiles
from llmkit.protocol import Origin
from llmkit.protocol.client import EngineClient
from llmkit_jupyter.handler import JupyterGatewayHandler

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

    def initialize_handlers(self) -> None:
        self._directory = EngineDirectory(
            [ConnectionFiles(self._is_ours)], default=self.default_model
        )
        gateway = Gateway(self._directory, self._note_use, self._places, strict=self.strict)
        self.handlers.append((r"/llmkit(?:/(.*))?", JupyterGatewayHandler, {"gateway": gateway}))

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
