"""Replicas as one model: a source of engines that makes a pool of those of one name and model.

Tornado loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import PurePath

from llmkit.cluster.fleet import FleetEngine
from llmkit.cluster.pool import ReplicaPool
from llmkit.cluster.quarantine import Quarantine
from llmkit.gateway.sources import EngineSource
from llmkit.protocol.client import EngineClient

__all__ = ["Pooled"]

LOOK_S = 0.5


class Pooled:
    """An `EngineSource` over others: each model that their engines have is one `ReplicaPool`.

    Engines are replicas of each other if they have one name and one model with the same options.
    Of several pools of one name, that with the most slots ready comes first, then the newest: in a
    rolling upgrade the first new engine does not get everything. Kernels are never pooled: there
    the newest of a name wins. Give their source to the directory as it is. What ``pools`` does not
    let in is found as it is, too.
    """

    def __init__(
        self,
        sources: Sequence[EngineSource],
        *,
        pools: Callable[[Hashable], bool] = lambda _: True,
    ) -> None:
        self._sources, self._is_pooled = sources, pools
        self._clients: dict[Hashable, EngineClient] = {}
        self._names: dict[Hashable, str] = {}
        self._pools: dict[Hashable, ReplicaPool] = {}
        self._quarantines: dict[Hashable, Quarantine] = {}
        self._made = 0
        self._timer: asyncio.TimerHandle | None = None

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        """Raises what the sources raise."""
        everything = {key: reach for s in self._sources for key, reach in s.find().items()}
        found = {key: reach for key, reach in everything.items() if self._is_pooled(key)}
        single = {key: reach for key, reach in everything.items() if key not in found}
        for key in [k for k, c in self._clients.items() if k not in found or c.state.is_gone]:
            del self._clients[key], self._names[key]
            found.pop(key, None)  # it may be reached again the next time
        for key, reach in found.items():
            if key not in self._clients:
                self._made += 1
                self._clients[key], self._names[key] = reach(), f"#{self._made}"
        groups: dict[Hashable, dict[str, EngineClient]] = {}
        for key in found:
            client = self._clients[key]
            groups.setdefault(_identity(client), {})[self._names[key]] = client
        self._update(groups)
        self._keep_looking()
        return {**{("pool", i): _held(self._pools[i]) for i in self._ordered(groups)}, **single}

    def _ordered(self, groups: Mapping[Hashable, object]) -> list[Hashable]:
        """Names in the order of their newest engine, within a name by ready slots; then pools that
        wait for engines."""
        newest: dict[str, int] = {}
        for place, identity in enumerate(groups):
            newest.setdefault(self._pools[identity].description.name, place)

        def order(identity: Hashable) -> tuple[int, int]:
            pool = self._pools[identity]
            return newest[pool.description.name], -pool.num_ready_slots

        return [*sorted(groups, key=order), *(i for i in self._pools if i not in groups)]

    def _update(self, groups: Mapping[Hashable, Mapping[str, EngineClient]]) -> None:
        """Make the pools these groups."""
        for identity, pool in list(self._pools.items()):
            if identity not in groups:
                pool.update({})
                if pool.state.is_gone:
                    pool.close()
                    del self._pools[identity]
        for identity, group in groups.items():
            known = self._pools.get(identity)
            if known is None or known.is_closed:
                name = next(iter(group.values())).description.name
                quarantine = self._quarantines.setdefault(identity, Quarantine())
                self._pools[identity] = ReplicaPool(name, group, quarantine=quarantine)
            else:
                known.update(group)
        now = time.monotonic()
        for identity in [i for i in self._quarantines if i not in self._pools]:
            if self._quarantines[identity].is_empty(now):
                del self._quarantines[identity]

    def _keep_looking(self) -> None:
        """Requests that wait for a replica cause no look themselves, and one that finds an engine
        for the first time would come before the engine has answered."""
        if self._timer is not None:
            return
        with contextlib.suppress(RuntimeError):  # no loop: somebody only asks what there is
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        with contextlib.suppress(OSError):
            self.find()


def _held(pool: ReplicaPool) -> Callable[[], EngineClient]:
    return lambda: pool


def _identity(client: EngineClient) -> Hashable:
    """Engines with the same answer the same."""
    model = client.description
    return (
        model.name,
        client.model_hash if isinstance(client, FleetEngine) else "",
        model.architecture,
        model.quantization,
        model.n_params,
        model.n_vocab,
        model.weights_bytes,
        model.n_ctx,
        model.embedding_size,
        model.ranks,
        tuple((PurePath(path).stem, scale) for path, scale in model.adapters),
        model.hears,
        model.voices,
        model.image_size,
        model.senses,
    )
