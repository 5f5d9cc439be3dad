"""Ray Serve starts, places, watches, drains and scales engines; tokens never pass through it.

A replica is an actor that starts `llmkit engine --join` as its child, so that what ends llama.cpp
ends no actor. The engine announces itself to the gateways, which know nothing of Ray. Runs on the
nodes of a cluster, in Ray's environment: of llmkit it needs this package alone, nothing it depends
on. `llmkit.cluster.ray_file` makes the configuration that names `build`.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from llmkit.cluster.child import EngineChild

__all__ = ["DEPLOYMENT", "Replica", "build", "desired"]

DEPLOYMENT = "engine"
LOOK_S = 0.05
SPARE_S = 5.0  # after its own limit, an engine is not asked but ended


class Replica:
    """One engine of a deployment. Its methods are those that Ray Serve calls by name."""

    _engine: EngineChild | None = None

    async def __init__(self, command: Sequence[str], drain_s: float, program: str | None) -> None:  # type: ignore[misc]
        """Returns when the engine is ready. Raises `EngineGoneError` if it ends before: what it
        said last stands in the deployment's status."""
        import ray

        started = [program] if program else [sys.executable, "-m", "llmkit"]
        own_address = ["--listen", f"tcp://{ray.util.get_node_ip_address()}"]
        self._drain_s = drain_s
        self._engine = EngineChild([*started, *command, *own_address, "--drain-s", f"{drain_s:g}"])
        while not self._engine.ready:
            await asyncio.sleep(LOOK_S)

    async def __call__(self) -> Mapping[str, Any]:
        """What the engine reported last. Nobody needs it but who looks by hand."""
        return {} if self._engine is None else dict(self._engine.report)

    def check_health(self) -> None:
        """Raises `EngineGoneError` if the engine has ended: Serve then starts a new replica."""
        assert self._engine is not None
        self._engine.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """The engine's queue, running requests included."""
        report = {} if self._engine is None else self._engine.report
        return {"queue": float(report.get("running", 0) + report.get("waiting", 0))}

    async def __del__(self) -> None:
        """Serve awaits this before it ends the actor: the engine finishes what runs."""
        engine = self._engine
        if engine is None or engine.ended:
            return
        engine.drain()
        until = time.monotonic() + self._drain_s + SPARE_S
        while not engine.ended and time.monotonic() < until:
            await asyncio.sleep(LOOK_S)
        engine.kill()


def build(args: Mapping[str, Any]) -> Any:
    """The Serve application of one model. The configuration sets how many replicas, and where."""
    from ray import serve

    kind = serve.deployment(Replica, name=DEPLOYMENT)
    return kind.bind(args["command"], args["drain_s"], args.get("program"))


def desired(context: Any) -> tuple[float, dict[str, Any]]:
    """How many replicas Serve shall aim at: as many as keep `target_ongoing_requests` each.

    Serve applies the bounds and delays. It counts the requests that it routes itself, which are
    none here; so this counts those that the engines report. Before any has, nothing changes.
    """
    queues = (context.aggregated_metrics or {}).get("queue") or {}
    if not queues:
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(queues.values()) / context.config.target_ongoing_requests)), {}
