"""The state of the gateway as JSON, and as the part of the page that shows it.

Tornado loop only. Shows only what the gateway knows anyway; it asks no engine.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llmkit.cluster.pool import ReplicaPool
from llmkit.gateway.access.identity import ADMIN
from llmkit.gateway.access.permission import may_use
from llmkit.gateway.directory import EngineDirectory, Entry
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.health import is_quiet
from llmkit.gateway.ops.machine import pids_of, resident
from llmkit.gateway.web import status_part
from llmkit.protocol.client import EngineClient
from llmkit.version import __version__

if TYPE_CHECKING:
    from llmkit.workers.place import ModelStatus

__all__ = ["StatusRoutes"]

MAX_CALLERS, MAX_SHOWN, MAX_GONE, MAX_REPLICAS = 200, 50, 20, 64
# What all callers see of an offered model. The rest tells of others' work, or of this host.
SEEN = frozenset({"name", "phase", "loaded", "is_default", "aliases", "replicas", "replicas_ready"})
REASONS = {
    "failed": "it cannot be loaded, or crashed again and again; the server's log says why",
    "restarting": "its process has ended and is being started again",
    "draining": "it is being unloaded",
    "stopping": "it is being unloaded",
}
GONE = "it has ended, was unloaded, or cannot be reached; the server's log says why"


@dataclass(slots=True)
class Running:
    """A request in progress."""

    caller: str
    route: str
    started: float


class StatusRoutes:
    """Models, memory and requests of a gateway.

    ``places`` gives notebooks by kernel id, ``offered`` the models of a `ModelManager`, ``actions``
    the paths of what administrators may do. Callers without the scope ``admin`` see these not, nor
    processes and hosts, nor the requests of anybody else, nor how much a model is used or why it
    failed: that is null, and a reason says what its phase means.
    """

    def __init__(
        self,
        directory: EngineDirectory,
        places: Callable[[], Awaitable[dict[str, str]]] | None = None,
        offered: Callable[[], Sequence[ModelStatus]] = tuple,
        actions: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._directory, self._places, self._offered = directory, places, offered
        self._actions = actions
        self._running: dict[int, Running] = {}
        self._callers: Counter[str] = Counter()
        self._started = time.time()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @contextlib.contextmanager
    def watching(self, exchange: Exchange) -> Iterator[None]:
        """Counts a request while it runs."""
        if is_quiet(exchange.path):
            yield
            return
        if exchange.caller in self._callers or len(self._callers) < MAX_CALLERS:
            self._callers[exchange.caller] += 1
        self._running[id(exchange)] = Running(
            exchange.caller, f"{exchange.method} {exchange.path:.100}", time.monotonic()
        )
        try:
            yield
        finally:
            del self._running[id(exchange)]

    async def state(self, exchange: Exchange) -> dict[str, Any]:
        """Models, requests and callers that this caller may see."""

        is_admin = ADMIN in exchange.identity.scopes

        def is_seen(caller: str) -> bool:
            return is_admin or caller == exchange.caller

        places = await self._places() if self._places is not None else {}
        now = time.monotonic()
        return {
            "version": __version__,
            "up_s": round(time.time() - self._started, 1),
            "models": [self._model(entry, places, is_admin) for entry in self._directory.entries()],
            "offered": [_offer(each, is_admin) for each in self._offered() if may_use(each.name)],
            "actions": list(self._actions()) if is_admin else [],
            "gone": [
                {"id": name, "reason": reason if is_admin else GONE}
                for name, reason in self._directory.gone.items()
                if "@" not in name
            ][-MAX_GONE:],
            "requests": [
                {"caller": r.caller, "route": r.route, "seconds": round(now - r.started, 1)}
                for r in self._running.values()
                if is_seen(r.caller)
            ],
            "callers": [
                {"caller": caller, "requests": count}
                for caller, count in self._callers.most_common(MAX_CALLERS)
                if is_seen(caller)
            ][:MAX_SHOWN],
        }

    @staticmethod
    def _model(entry: Entry, places: dict[str, str], is_admin: bool) -> dict[str, Any]:
        model, stats, origin = entry.client.description, entry.client.stats(), entry.client.origin
        rss = sum(map(resident, pids_of(entry.client)))
        return {
            "id": entry.model_id,
            "quantization": model.quantization,
            "device": model.device,
            "generates": model.use == "generate",
            "inputs": model.senses,
            "gpus": model.gpu_bytes,
            "n_ctx": model.n_ctx,
            "kernel": origin.kernel_id,
            "place": places.get(origin.kernel_id or "", ""),
            "pid": origin.pid if is_admin else None,
            "replicas": _replicas(entry.client) if is_admin else [],
            "weights_bytes": model.weights_bytes,
            "kv_bytes": model.kv_bytes,
            "rss_bytes": rss,
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "num_slots": stats.num_slots,
            "kv_usage": round(stats.kv_usage, 4),
            "requests_total": stats.requests_total,
            "prompt_tokens_total": stats.prompt_tokens_total,
            "cached_tokens_total": stats.cached_tokens_total,
            "generation_tokens_total": stats.generation_tokens_total,
        }

    async def status(self, exchange: Exchange) -> None:
        state = await self.state(exchange)
        if exchange.query("part"):
            exchange.send_page(fragment(state))
        else:
            exchange.send_json(state)


def _offer(status: ModelStatus, is_admin: bool) -> dict[str, Any]:
    """The same fields for everybody."""
    every = asdict(status)
    if is_admin:
        return every
    seen = {name: value if name in SEEN else None for name, value in every.items()}
    return {**seen, "reason": REASONS.get(status.phase, ""), "pids": []}


def _replicas(client: EngineClient) -> list[dict[str, Any]]:
    """Those of a pool. ``requests`` are this gateway's own, counted as they come and go; the other
    numbers are an engine's of all gateways, up to half a second old."""
    if not isinstance(client, ReplicaPool):
        return []
    shown = client.members[:MAX_REPLICAS]
    return [
        {
            "name": member.client.origin.label,
            "phase": member.client.state.phase,
            "requests": member.num_requests,
            "num_running": member.client.stats().num_running,
            "num_waiting": member.client.stats().num_waiting,
        }
        for member in shown
    ]


def fragment(state: dict[str, Any]) -> str:
    """The part of the page that changes; everything from outside is escaped."""
    return status_part(state)
