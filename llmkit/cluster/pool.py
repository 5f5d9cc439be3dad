"""Several engines of one model as one `EngineClient`: replicas that come, drain, die and go.

Any thread. One thread of a pool's own looks at its members four times a second, as long as it is
used; there is none for a request.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from llmkit.cluster.asking import Asking, all_of, merged
from llmkit.cluster.prefixes import PrefixChain, chain_of
from llmkit.cluster.quarantine import Quarantine
from llmkit.cluster.relay import LOSSES, Leg, Relay
from llmkit.cluster.routing import Figures, Router, Ticket
from llmkit.errors import DrainingError, EngineDiedError, EngineGoneError
from llmkit.protocol import (
    READY,
    Completion,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream

__all__ = ["Member", "ReplicaPool"]

Answer = TypeVar("Answer")

LOOK_S = 0.25
PATIENCE_S = 10.0  # requests that have lost their replica wait so long for another
COUNTED = tuple(f.name for f in fields(EngineStats) if f.name.endswith("_total"))
AVERAGED = ("prompt_token_s", "decode_step_s")
SUMMED = tuple(f.name for f in fields(EngineStats) if f.name not in AVERAGED)


@dataclass(slots=True, eq=False)
class Member:
    """A replica; ``drained``: it said that it would end."""

    name: str
    client: EngineClient
    stats: EngineStats
    drained: bool = False
    away: bool = False  # gone, or not to be used any more


class ReplicaPool:
    """An `EngineClient` over engines of one model, which it owns from `update` on.

    A request goes where it is expected to be answered soonest (`Router`). When its replica is
    lost, another goes on from the last token: nothing is sent twice, and nothing is left out.
    After two deaths under one request it fails with `EngineDiedError`, as does its prompt for a
    minute. Without any replica, requests that are under way wait ten seconds for one.
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
        self._rng = rng or random.Random()
        self._lock = threading.RLock()
        self._router = Router(self._rng)
        self._quarantine = quarantine or Quarantine()
        self._members: dict[str, Member] = {}
        self._departed = EngineStats()
        self._description: ModelDescription | None = None
        self._reason = f"no replica of {name!r} is there"
        self._relays: dict[str, Relay] = {}
        self._parked: list[Relay] = []
        self._moves = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.update(members or {})

    def update(self, members: Mapping[str, EngineClient]) -> None:
        """The engines there are now, newest first, by names that never come again."""
        with self._lock:
            for name, client in members.items():
                if name not in self._members:
                    self._members[name] = Member(name, client, client.stats())
                    self._router.add(name, _home(client.origin))
                    self._router.report(name, _figures(client.stats()))
            first = next(iter(members.values()), None)
            if first is not None:
                self._description = first.description
            left = [m for name, m in self._members.items() if name not in members]
            for member in left:
                self._part(member)
        for member in left:  # what they still had moves
            member.client.close()
        self._look()

    @property
    def members(self) -> tuple[Member, ...]:
        """The replicas."""
        with self._lock:
            return tuple(self._members.values())

    @property
    def is_closed(self) -> bool:
        """Whether it will have no members again."""
        return self._closed.is_set()

    @property
    def num_moves(self) -> int:
        """How often a request went on at another replica."""
        return self._moves

    @property
    def description(self) -> ModelDescription:
        """The newest replica's, with the slots of all."""
        members = self.members
        if self._description is None:
            raise EngineGoneError(self._reason)
        slots = sum(m.client.description.n_slots for m in members if not m.away)
        return replace(self._description, n_slots=slots or self._description.n_slots)

    @property
    def state(self) -> EngineState:
        if self._closed.is_set():
            return EngineState("gone", self._reason)
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
            return EngineState("loading", f"{self._reason}; requests wait for another")
        return EngineState("gone", next((s.reason for s in states if s.reason), self._reason))

    @property
    def origin(self) -> Origin:
        kinds = {m.client.origin.kind for m in self.members}
        return Origin("process" if kinds <= {"process", "kernel"} else "host", host="pool")

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        chain = chain_of(request)
        refusal = self.refused(chain)
        if refusal is not None:
            raise refusal
        self._begin()
        relays = [Relay(choice, chain, self, self.abort) for choice in request.choices()]
        legs = self._first_legs(request, chain, len(relays))
        with self._lock:
            self._relays.update((r.request_id, r) for r in relays)
        for relay, leg in zip(relays, legs, strict=True):
            relay.start(leg)
        return [Stream(relay.channel) for relay in relays]

    def _first_legs(self, request: GenerationRequest, chain: PrefixChain, n: int) -> list[Leg]:
        """All choices at one replica, which computes their prompt once. Raises as ``submit``."""
        avoid: set[str] = set()
        while True:
            leg = self.choose(chain, 0, avoid)
            if leg is None or leg.member in avoid:
                if leg is not None:
                    self.leave(leg)
                raise EngineGoneError(self.state.reason or self._reason)
            try:
                streams = leg.client.submit_choices(replace(request, show_tokens=True))
            except LOSSES as error:
                self.leave(leg)
                self.lost(leg, error)
                if isinstance(error, EngineDiedError):
                    raise
                avoid.add(leg.member)
                continue
            except BaseException:
                self.leave(leg)
                raise
            with self._lock:
                more = [self._router.beside(leg.ticket) for _ in range(n - 1)]
            return [
                Leg(leg.member, leg.client, ticket, stream, leg.source)
                for ticket, stream in zip((leg.ticket, *more), streams, strict=True)
            ]

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        return self._ask(lambda client: client.embed(request))

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        merge = merged(inquiry.question)
        if merge is not None:
            clients = [m.client for m in self.members if not m.client.state.is_gone]
            return all_of(clients, lambda client: client.inquire(inquiry), merge)
        return self._ask(lambda client: client.inquire(inquiry))

    def _ask(self, ask: Callable[[EngineClient], Future[Any]]) -> Future[Any]:
        """Anybody's single answer; asked again elsewhere when a replica is lost meanwhile."""
        self._begin()
        return Asking(self, ask).begin()

    def any_leg(self, avoid: set[str]) -> Leg | None:
        """A replica for something that leaves no prefix."""
        with self._lock:
            return self._leg(self._router.spread(avoid))

    def abort(self, request_id: str) -> None:
        relay = self._relays.get(request_id)
        if relay is not None:
            relay.abort()

    def stats(self) -> EngineStats:
        """The sum of all replicas, with what those counted that have left; costs are means."""
        with self._lock:
            each = [m.client.stats() for m in self._members.values()]
            departed = self._departed
        total = {name: sum(getattr(s, name) for s in (*each, departed)) for name in SUMMED}
        for name in AVERAGED:
            known = [getattr(s, name) for s in each if getattr(s, name) > 0]
            total[name] = sum(known) / len(known) if known else 0.0
        return EngineStats(**total)

    def close(self) -> None:
        """Disconnect from all replicas; what still runs fails."""
        self._reason = f"the connection to the replicas of {self._name!r} was closed"
        self._closed.set()
        with self._lock:
            members = list(self._members.values())
        for member in members:
            member.client.close()
        for relay in list(self._relays.values()):
            relay.give_up(EngineGoneError(self._reason))

    def choose(self, chain: PrefixChain, answered: int, avoid: set[str]) -> Leg | None:
        with self._lock:
            return self._leg(self._router.route(chain, answered=answered, avoid=avoid))

    def leave(self, leg: Leg, completion: Completion | None = None) -> None:
        with self._lock:
            if completion is None:
                self._router.ended(leg.ticket)
                return
            usage = completion.usage
            self._router.ended(
                leg.ticket,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                answer_tokens=usage.completion_tokens,
            )

    def started(self, leg: Leg) -> None:
        with self._lock:
            self._router.started(leg.ticket)

    def lost(self, leg: Leg, failure: Exception) -> bool:
        member, state = leg.source, leg.client.state
        assert isinstance(member, Member)
        with self._lock:
            self._moves += 1
            if isinstance(failure, DrainingError):
                member.drained = True
                self._router.close(member.name)
                return False
            if not state.is_gone:
                return False
            self._retire(member)
            return not (member.drained or state.expected)

    def condemn(self, relay: Relay) -> None:
        with self._lock:
            self._quarantine.add(relay.chain, time.monotonic())

    def refused(self, chain: PrefixChain) -> EngineDiedError | None:
        with self._lock:
            left = self._quarantine.left(chain, time.monotonic())
        if not left:
            return None
        return EngineDiedError(
            "this prompt is refused: two engines ended while they computed it. "
            f"Try again in {left:.0f} s, after looking at their logs."
        )

    def park(self, relay: Relay) -> None:
        with self._lock:
            self._parked.append(relay)

    def forget(self, relay: Relay) -> None:
        self._relays.pop(relay.request_id, None)

    def _leg(self, ticket: Ticket | None) -> Leg | None:
        if ticket is None or self._closed.is_set():
            return None
        member = self._members[ticket.replica]
        return Leg(member.name, member.client, ticket, source=member)

    def _begin(self) -> None:
        if self._closed.is_set():
            raise EngineGoneError(self._reason)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=self._watch, name="llmkit-pool", daemon=True
                    )
                    self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            with contextlib.suppress(Exception):  # a member's fault must not end the watch
                self._look()

    def _look(self) -> None:
        """Learn what the members say of themselves, and place what waits for one."""
        with self._lock:
            for member in list(self._members.values()):
                self._hear(member)
            parked, self._parked = self._parked, []
            has_place = self._router.num_open > 0
        now = time.monotonic()
        for relay in parked:
            waited = now - (relay.parked_at or now)
            if has_place or relay.is_aborted:
                relay.place()
            elif waited > self._patience_s:
                relay.give_up(
                    EngineGoneError(
                        f"{self._reason}, and none came within {self._patience_s:.0f} s; "
                        "send the request again."
                    )
                )
            else:
                self.park(relay)

    def _hear(self, member: Member) -> None:
        state, stats = member.client.state, member.client.stats()
        if member.away:
            return
        if state.is_gone:
            self._retire(member)
            return
        if state.phase == "ready":
            self._router.open(member.name)
        else:
            member.drained = member.drained or state.phase == "draining"
            self._router.close(member.name)
        if stats is not member.stats:
            member.stats = stats
            self._router.report(member.name, _figures(stats))

    def _retire(self, member: Member) -> None:
        """It takes nothing any more."""
        if not member.away:
            member.away = True
            self._reason = member.client.state.reason or self._reason
        self._router.remove(member.name)

    def _part(self, member: Member) -> None:
        """It is no member any more; what it counted stays."""
        self._retire(member)
        del self._members[member.name]
        last = member.client.stats()
        counted = {n: getattr(self._departed, n) + getattr(last, n) for n in COUNTED}
        self._departed = EngineStats(**counted)


def _figures(stats: EngineStats) -> Figures:
    slots = max(1, stats.num_slots)
    return Figures(
        stats.prompt_token_s,
        stats.decode_step_s,
        slots,
        slots + stats.num_parked,
        stats.num_running + stats.num_waiting,
    )


def _home(origin: Origin) -> str:
    """What all gateways call it."""
    return f"{origin.host} {origin.url} {origin.label}"
