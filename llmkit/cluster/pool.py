"""Several engines of one model as one `EngineClient`: replicas that come, drain, die and go.

Any thread. One thread of a pool's own looks at its members four times a second, as long as it is
used, and moves requests; there is none for a request.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from llmkit.cluster.asking import Asking, all_of, merged
from llmkit.cluster.blame import Suspect
from llmkit.cluster.members import LOSSES, Leg, Member
from llmkit.cluster.prefixes import PrefixChain, chain_of
from llmkit.cluster.quarantine import Quarantine
from llmkit.cluster.relay import MAX_FULL, Relay
from llmkit.cluster.roster import Roster
from llmkit.errors import EngineDiedError, EngineGoneError, QueueFullError
from llmkit.protocol import (
    READY,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
    check_drawing,
    check_size,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["ReplicaPool"]

Answer = TypeVar("Answer")

LOOK_S = 0.25
PATIENCE_S = 10.0  # requests that have lost their replica wait so long for another


class ReplicaPool:
    """An `EngineClient` over engines of one model, which it owns from `update` on.

    A request goes where it is expected to be answered soonest (`Router`). When its replica is
    lost, another goes on from the last token: nothing is sent twice, and nothing is left out.
    A request that engines die of fails with `EngineDiedError` after the second, as does its prompt
    for a minute; while others ran beside it, it is first found out which one it is. Without any
    replica, requests that are under way wait ten seconds for one.
    """

    def __init__(
        self,
        name: str,
        members: Mapping[str, EngineClient] | None = None,
        *,
        rng: random.Random | None = None,
        quarantine: Quarantine | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._name, self._patience_s = name, patience_s
        self._lock = threading.RLock()
        self._roster = Roster(
            f"no replica of {name!r} is there", rng or random.Random(), quarantine or Quarantine()
        )
        self._description: ModelDescription | None = None
        self._relays: dict[str, Relay] = {}
        self._parked: list[Relay] = []
        self._closed = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self.update(members or {})

    def update(self, members: Mapping[str, EngineClient]) -> None:
        """The engines there are now, newest first, by names that never come again."""
        first = next(iter(members.values()), None)
        if first is not None:
            self._description = first.description
        left = self._roster.update(members)
        for member in left:  # what they still had moves
            member.client.close()
        self._roster.mourn(left)
        self._roster.hear()
        self._wake.set()

    @property
    def members(self) -> tuple[Member, ...]:
        """The replicas."""
        return self._roster.members

    @property
    def num_ready_slots(self) -> int:
        """How many requests its ready replicas compute at once."""
        ready = (m.client for m in self.members if m.client.state.phase == "ready")
        return sum(client.description.n_slots for client in ready)

    @property
    def is_closed(self) -> bool:
        """Whether it will have no members again."""
        return self._closed

    @property
    def num_moves(self) -> int:
        """How often a request went on at another replica."""
        return self._roster.num_moves

    @property
    def description(self) -> ModelDescription:
        """The newest replica's, with the slots of all."""
        if self._description is None:
            raise EngineGoneError(self._roster.reason)
        slots = sum(m.client.description.n_slots for m in self.members if not m.away)
        return replace(self._description, n_slots=slots or self._description.n_slots)

    @property
    def state(self) -> EngineState:
        reason = self._roster.reason
        if self._closed:
            return EngineState("gone", reason)
        states = []
        for member in self.members:
            state = member.client.state
            if state.phase == "ready":
                return READY
            states.append(state)
        for phase in ("draining", "loading"):
            found = next((s for s in states if s.phase == phase), None)
            if found is not None:
                return found
        if self._relays:
            return EngineState("loading", f"{reason}; requests wait for another")
        return EngineState("gone", next((s.reason for s in states if s.reason), reason))

    @property
    def origin(self) -> Origin:
        kinds = {m.client.origin.kind for m in self.members}
        return Origin("process" if kinds <= {"process", "kernel"} else "host", host="pool")

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        self._begin()
        if self._description is not None:  # before it is noted for a replica
            check_size(request, self._description.n_ctx)
            check_drawing(request, self._description.inputs)
        chain = chain_of(request)
        refusal = self._roster.refused(chain)
        if refusal is not None:
            raise refusal
        suspect = Suspect(chain.whole)
        relays = [Relay(choice, chain, suspect, self._roster, self) for choice in request.choices()]
        legs = self._first_legs(request, chain, suspect)
        with self._lock:
            self._relays.update((r.request_id, r) for r in relays)
        for relay, leg in zip(relays, legs, strict=True):
            relay.start(leg)
        return [Stream(relay.channel) for relay in relays]

    def _first_legs(
        self, request: GenerationRequest, chain: PrefixChain, suspect: Suspect
    ) -> list[Leg]:
        """All choices at one replica, which computes their prompt once. Raises as ``submit``."""
        avoid: set[str] = set()
        full: list[QueueFullError] = []
        wanted = replace(request, show_tokens=True)
        while True:
            leg = self._choose(chain, suspect, avoid)
            if leg is None or leg.member.name in avoid or len(full) >= MAX_FULL:
                failure = (
                    full[-1] if full else EngineGoneError(self.state.reason or self._roster.reason)
                )
                if leg is not None:
                    self._roster.leave(leg, failure=failure)
                raise failure
            try:
                streams = leg.client.submit_choices(wanted)
            except LOSSES as error:
                self._roster.lost(leg, error)
                if isinstance(error, EngineDiedError):
                    raise
                avoid.add(leg.member.name)
                continue
            except Exception as error:
                self._roster.leave(leg, failure=error)
                if not isinstance(error, QueueFullError):
                    raise
                full.append(error)
                avoid.add(leg.member.name)
                continue
            legs = [leg, *(self._roster.beside(leg) for _ in streams[1:])]
            for each, stream in zip(legs, streams, strict=True):
                each.stream = stream
            return legs

    def _choose(self, chain: PrefixChain, suspect: Suspect, avoid: set[str]) -> Leg | None:
        return None if self._closed else self._roster.choose(chain, suspect, avoid)

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        return self._ask(lambda client: client.embed(request), computes=True)

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        merge = merged(inquiry.question, self._moved_ids)
        if merge is not None:
            there = ("ready", "draining")  # who has not answered yet would be waited for
            clients = [m.client for m in self.members if m.client.state.phase in there]
            return all_of(clients, lambda client: client.inquire(inquiry), merge)
        return self._ask(lambda client: client.inquire(inquiry), computes=False)

    def _moved_ids(self) -> dict[str, str]:
        """Requests by their ids at another replica than the first."""
        with self._lock:
            relays = list(self._relays.values())
        return {r.id_there: r.request_id for r in relays if r.id_there is not None}

    def _ask(self, ask: Callable[[EngineClient], Future[Any]], *, computes: bool) -> Future[Any]:
        """Anybody's single answer; asked again elsewhere when a replica is lost meanwhile."""
        self._begin()
        return Asking(self._roster, ask, computes=computes).begin()

    def abort(self, request_id: str) -> None:
        relay = self._relays.get(request_id)
        if relay is not None:
            relay.abort()

    def stats(self) -> EngineStats:
        """The sum of all replicas, with what those counted that have left; costs are means."""
        return self._roster.stats()

    def close(self) -> None:
        """Disconnect from all replicas; what still runs fails."""
        if not self.state.is_gone:
            self._roster.reason = f"the connection to the replicas of {self._name!r} was closed"
        self._closed = True
        self._wake.set()
        failure = EngineGoneError(self._roster.reason)
        for member in self.members:
            member.client.close()
        with self._lock:
            relays = list(self._relays.values())
        for relay in relays:
            relay.give_up(failure)

    def park(self, relay: Relay) -> None:
        """Place it once it is due and there is a replica."""
        if self._closed:
            return relay.give_up(EngineGoneError(self._roster.reason))
        with self._lock:
            self._parked.append(relay)
        if relay.due <= time.monotonic():
            self._wake.set()

    def forget(self, relay: Relay) -> None:
        """It has ended."""
        self._relays.pop(relay.request_id, None)

    def _begin(self) -> None:
        if self._closed:
            raise EngineGoneError(self._roster.reason)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._watch, name="llmkit-pool", daemon=True
                    )
                    self._thread.start()

    def _watch(self) -> None:
        while not self._closed:
            self._wake.wait(LOOK_S)
            self._wake.clear()
            with contextlib.suppress(Exception):  # a member's fault must not end the watch
                self._roster.hear()
            self._place_parked()

    def _place_parked(self) -> None:
        """Place what waits for a replica, and give up what has waited too long."""
        with self._lock:
            parked, self._parked = self._parked, []
        waiting = []
        for relay in parked:
            now = time.monotonic()
            has_open = self._roster.has_open
            if relay.is_aborted or (has_open and now >= relay.due):
                relay.place()
            elif not has_open and now - relay.parked_at > self._patience_s:
                relay.give_up(
                    EngineGoneError(
                        f"{self._roster.reason}, and none came within {self._patience_s:.0f} s; "
                        "send the request again."
                    )
                )
            else:
                waiting.append(relay)
        with self._lock:
            self._parked += waiting
