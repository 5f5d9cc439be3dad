"""What engines have counted, by model: sums that only grow, whichever engines come and go.

An engine that is loaded again counts from zero, and one that ends takes its counters along; a sum
that fell would look like a burst of work to Prometheus. Tornado loop only.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, fields

from llmkit.gateway.directory import EngineDirectory, Entry
from llmkit.gateway.ops.series import Names
from llmkit.protocol import EngineStats
from llmkit.protocol.client import EngineClient

__all__ = ["EngineTotals", "ModelTotals"]

COUNTED = tuple(f.name for f in fields(EngineStats) if f.name.endswith("_total"))
GAUGES = tuple(f.name for f in fields(EngineStats) if not f.name.endswith("_total"))
MAX_SEEN = 1000  # engines whose last counters are remembered
Key = tuple[str, str, int, str]


@dataclass(slots=True)
class ModelTotals:
    """One model: ``counted`` by all its engines ever seen, ``now`` by those that are there."""

    counted: dict[str, float]
    now: dict[str, float]
    is_here: bool = False


class EngineTotals:
    """Reads the counters of a directory's engines."""

    def __init__(self, directory: EngineDirectory, names: Names) -> None:
        self._directory, self._names = directory, names
        self._seen: OrderedDict[Key, list[float]] = OrderedDict()
        # Of the last reading: an engine that has ended since is read once more.
        self._clients: dict[Key, EngineClient] = {}
        self._models: dict[str, ModelTotals] = {}

    def read(self) -> tuple[dict[str, ModelTotals], list[Entry]]:
        """The totals by model, and the engines that are there."""
        entries = self._directory.entries()
        before, self._clients = self._clients, {_key(e.client): e.client for e in entries}
        for key, client in {**before, **self._clients}.items():
            self._count(key, client)
        for model in self._models.values():
            model.now, model.is_here = dict.fromkeys(GAUGES, 0), False
        for client in self._clients.values():
            model = self._model(client)
            model.is_here = True
            stats = client.stats()
            for name in GAUGES:
                model.now[name] += getattr(stats, name)
        return self._models, entries

    def _count(self, key: Key, client: EngineClient) -> None:
        stats = client.stats()
        last = self._seen.setdefault(key, [0.0] * len(COUNTED))
        self._seen.move_to_end(key)
        while len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        counted = self._model(client).counted
        for i, name in enumerate(COUNTED):
            # A connection made anew knows nothing yet: what was counted stays.
            more = getattr(stats, name) - last[i]
            if 0 < more < math.inf:
                counted[name] += more
                last[i] += more

    def _model(self, client: EngineClient) -> ModelTotals:
        name = self._names(client.description.name)
        return self._models.setdefault(
            name, ModelTotals(dict.fromkeys(COUNTED, 0.0), dict.fromkeys(GAUGES, 0))
        )


def _key(client: EngineClient) -> Key:
    """What tells an engine from all others, also from its successor in the same process."""
    model, origin = client.description, client.origin
    return (model.name, origin.label, model.created, origin.host)
