"""Whether the server lives, and whether it can be used: for load balancers and orchestrators.

No key is needed, so a stranger learns the state and nothing else. Tornado loop only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llmkit.errors import EngineGoneError
from llmkit.gateway.access.authenticator import ANONYMOUS
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.openapi import Route

if TYPE_CHECKING:
    from llmkit.workers.place import ModelStatus

__all__ = ["PATHS", "HealthRoutes", "is_quiet"]

PATHS = ("/health", "/v1/health", "/health/live", "/health/ready", "/readiness")
QUIET = frozenset(
    (
        *PATHS,
        "/",
        "/chat",
        "/engine",
        "/metrics",
        "/status",
        "/usage",
        "/usage/all",
        "/docs",
        "/swagger-ui",
        "/openapi.json",
    )
)
REASONS = {
    "draining": "The server is shutting down.",
    "loading": "A model is being loaded.",
    "unavailable": "No model is loaded.",
}


def is_quiet(path: str) -> bool:
    """Whether it is asked for all the time by those who look.

    That is logged at the level "debug", and neither traced nor shown.
    """
    return path in QUIET or path.startswith("/assets/")


class HealthRoutes:
    """Health of a gateway: alive once it answers, ready while a model can be used.

    A model that the first request loads counts as usable, else nobody would send that request.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        is_draining: Callable[[], bool],
        offered: Callable[[], Sequence[ModelStatus]] = tuple,
    ) -> None:
        self._directory, self._is_draining, self._offered = directory, is_draining, offered

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/health", self.health, "Whether a model is loaded"),
            Route("GET", "/health/live", self.live, "Whether the server answers"),
            Route(
                "GET",
                "/health/ready",
                self.ready,
                "Whether a model can be used",
                also=("/readiness",),
            ),
        ]

    @property
    def state(self) -> str:
        """ready, draining, loading or unavailable."""
        if self._is_draining():
            return "draining"
        engines = {entry.client.state.phase for entry in self._directory.entries()}
        if engines & {"ready", "draining"}:
            return "ready"
        phases = {status.phase for status in self._offered()} | engines
        if "unloaded" in phases:
            return "ready"
        # A model that is ready is found by the directory a moment later.
        return "loading" if phases & {"loading", "restarting", "ready"} else "unavailable"

    async def health(self, exchange: Exchange) -> None:
        """200 if the default model is loaded, else 503; the reason is for known callers."""
        try:
            self._directory.lookup("default")
        except EngineGoneError:
            if exchange.identity != ANONYMOUS:
                raise
            raise EngineGoneError("No model is ready.") from None
        exchange.send_json({"status": "ok"})

    async def live(self, exchange: Exchange) -> None:
        exchange.send_json({"status": "ok"})

    async def ready(self, exchange: Exchange) -> None:
        state = self.state
        if state == "ready":
            exchange.send_json({"status": "ready"})
            return
        exchange.record.error = state
        exchange.send_json({"status": state, "reason": REASONS[state]}, 503)
