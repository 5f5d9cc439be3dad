"""The replicas of a pool: which of them takes a request, and what becomes of those that fail.

Any thread; asks nobody and waits for nothing.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields

from llmkit.cluster.blame import Suspect, blame
from llmkit.cluster.members import LOSSES, Leg, Member, home_of
from llmkit.cluster.prefixes import PrefixChain
from llmkit.cluster.quarantine import Quarantine
from llmkit.cluster.routing import Router, Ticket
from llmkit.errors import DrainingError, EngineDiedError, EngineError, EngineGoneError
from llmkit.protocol import Completion, EngineStats, FinishReason
from llmkit.protocol.client import EngineClient

__all__ = ["Roster"]

COUNTED = tuple(f.name for f in fields(EngineStats) if f.name.endswith("_total"))
AVERAGED = ("prompt_token_s", "decode_step_s")
SUMMED = tuple(f.name for f in fields(EngineStats) if f.name not in AVERAGED)
OLD = (
    "the engine that computed this request has ended, and the others are of an older version, "
    "which cannot go on with it. Send it again."
)


class Roster:
    """Replicas, what the router knows of them, and the prompts that they died of.

    ``reason`` is why there may be none.
    """

    def __init__(self, reason: str, rng: random.Random, quarantine: Quarantine) -> None:
        self.reason = reason
        self._lock = threading.RLock()
        self._router = Router(rng)
        self._quarantine = quarantine
        self._members: dict[str, Member] = {}
        self._suspected: set[Leg] = set()  # of requests under which an engine has ended
        self._departed = EngineStats()
        self.num_moves = 0

    @property
    def members(self) -> tuple[Member, ...]:
        with self._lock:
            return tuple(self._members.values())

    @property
    def has_open(self) -> bool:
        """Whether a replica takes requests."""
        return self._router.num_open > 0

    def update(self, clients: Mapping[str, EngineClient]) -> list[Member]:
        """The replicas there are now. Returns those that are none any more."""
        with self._lock:
            for name, client in clients.items():
                if name not in self._members:
                    member = self._members[name] = Member(name, client, client.stats())
                    self._router.add(name, home_of(client))
                    if client.state.phase != "ready":
                        self._router.close(name)
                    self._router.report(name, member.figures)
            left = [m for name, m in self._members.items() if name not in clients]
            for member in left:
                member.parted = True
                self._retire(member)
                del self._members[member.name]
                last = member.client.stats()
                counted = {n: getattr(self._departed, n) + getattr(last, n) for n in COUNTED}
                self._departed = EngineStats(**counted)
            return left

    def hear(self) -> None:
        """Learn what the replicas say of themselves."""
        now = time.monotonic()
        with self._lock:
            for member in self._members.values():
                self._hear(member, now)
            if not self._router.num_open:  # one that fails is better than none
                for member in self._members.values():
                    if not member.away and member.client.state.phase == "ready":
                        self._router.open(member.name)

    def _hear_if_none_is_open(self) -> None:
        """One may have become ready just now."""
        if not self.has_open:
            self.hear()

    def _hear(self, member: Member, now: float) -> None:
        state, stats = member.client.state, member.client.stats()
        if member.away:
            return
        if state.is_gone:
            self._retire(member)
            return
        if state.phase == "ready" and member.breaker.allows(now):
            self._router.open(member.name)
        elif state.phase != "ready" or self._router.num_open > 1:
            member.drained = member.drained or state.phase == "draining"
            self._router.close(member.name)
        if stats is not member.stats:
            member.stats = stats
            self._router.report(member.name, member.figures)

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

    def choose(
        self,
        chain: PrefixChain,
        suspect: Suspect,
        avoid: Collection[str] = (),
        begun: Sequence[int] = (),
    ) -> Leg | None:
        """A replica for a request with so many tokens ``begun``, or None if there is none now.

        One under which engines have ended goes where no other such request is: if possible after
        one death, in any case after two. Raises `EngineGoneError` if the only replicas cannot go
        on with what others began.
        """
        self._hear_if_none_is_open()
        with self._lock:
            old = {m.name for m in self._members.values() if not m.resumes} if begun else set()
            crowded = self._crowded(suspect)
            for shunned in ({*avoid, *self._apart(suspect)}, crowded):
                ticket = self._router.route(
                    chain, answered=len(begun), avoid=shunned | crowded | old
                )
                if ticket is None:
                    return None
                if ticket.replica not in crowded | old:
                    return self._leg(self._members[ticket.replica], ticket, suspect)
                self._router.refused(ticket)
            if old and not crowded - old:
                raise EngineGoneError(OLD)
            return None

    def choose_any(
        self, suspect: Suspect, avoid: Collection[str], *, is_judged: bool
    ) -> Leg | None:
        """A replica for something that leaves no prefix; ``is_judged`` is as in `Leg`."""
        self._hear_if_none_is_open()
        with self._lock:
            ticket = self._router.spread({*avoid, *self._apart(suspect)})
            if ticket is None:
                return None
            return self._leg(self._members[ticket.replica], ticket, suspect, is_judged)

    def beside(self, leg: Leg) -> Leg:
        """Another answer to the same prompt, at the same replica."""
        with self._lock:
            return self._leg(leg.member, self._router.beside(leg.ticket), leg.suspect)

    def _apart(self, suspect: Suspect) -> set[str]:
        """Replicas to keep a request away from, if there are others."""
        if not self._suspected:
            return set()
        return {
            leg.member.name
            for leg in self._suspected
            if leg.suspect.prompt != suspect.prompt and (suspect.deaths or leg.suspect.goes_apart)
        }

    def _crowded(self, suspect: Suspect) -> set[str]:
        """Replicas where a request that goes apart may not be."""
        if not suspect.goes_apart:
            return set()
        return {
            leg.member.name
            for leg in self._suspected
            if leg.suspect.goes_apart and leg.suspect.prompt != suspect.prompt
        }

    def _leg(self, member: Member, ticket: Ticket, suspect: Suspect, is_judged: bool = True) -> Leg:
        leg = Leg(member, ticket, suspect, is_judged)
        member.legs[leg] = None
        if suspect.deaths:
            self._suspected.add(leg)
        if is_judged:
            now = time.monotonic()
            member.breaker.taken(now)
            self._close_if_tripped(member, now)
        return leg

    def _close_if_tripped(self, member: Member, now: float) -> None:
        if not member.breaker.allows(now) and self._router.num_open > 1:
            self._router.close(member.name)

    def leave(
        self,
        leg: Leg,
        completion: Completion | None = None,
        failure: Exception | None = None,
        *,
        answered: bool = False,
    ) -> None:
        """A request has left its replica; ``answered`` if it was, without a completion."""
        with self._lock:
            leg.member.legs.pop(leg, None)
            self._suspected.discard(leg)
            if leg.is_judged:
                self._judge(leg.member, completion, failure, answered)
            if failure is not None and leg.ticket.is_pending:
                self._router.refused(leg.ticket)
            elif completion is None:
                self._router.ended(leg.ticket)
            else:
                usage = completion.usage
                self._router.ended(
                    leg.ticket,
                    prompt_tokens=usage.prompt_tokens,
                    cached_tokens=usage.cached_tokens,
                    answer_tokens=usage.completion_tokens,
                )

    def _judge(
        self,
        member: Member,
        completion: Completion | None,
        failure: Exception | None,
        answered: bool,
    ) -> None:
        """What the end of a request says of its replica."""
        now = time.monotonic()
        if isinstance(failure, EngineError) and not isinstance(failure, LOSSES):
            member.breaker.failed(now)
            self._close_if_tripped(member, now)
        elif failure is None and (
            answered
            or (completion is not None and completion.finish_reason is not FinishReason.ABORT)
        ):
            member.breaker.succeeded()
        else:
            member.breaker.undecided()

    def started(self, leg: Leg) -> None:
        """Its first token is there."""
        with self._lock:
            self._router.started(leg.ticket)

    def lost(self, leg: Leg, failure: Exception) -> None:
        """A replica has failed or refused a request, which leaves it. Tells its `Suspect`."""
        member = leg.member
        with self._lock:
            self.num_moves += 1
            if isinstance(failure, DrainingError):
                member.drained = True
                self._router.close(member.name)
            elif member.client.state.is_gone:
                self._retire(member)
            self.leave(leg, failure=failure)

    def refused(self, chain: PrefixChain) -> EngineDiedError | None:
        """Why this prompt is refused now."""
        with self._lock:
            left = self._quarantine.left(chain.whole, time.monotonic())
        if not left:
            return None
        return EngineDiedError(
            "this prompt is refused: engines ended while they computed it. "
            f"Try again in {left:.0f} s, after looking at their logs."
        )

    def _retire(self, member: Member) -> None:
        """It takes nothing any more. What ran there is told if it was killed."""
        state = member.client.state
        member.away = True
        self._router.remove(member.name)
        if not state.is_gone or member.is_mourned:
            return
        member.is_mourned = True
        if not (member.parted and state.blameless):  # it was we who closed the connection
            self.reason = state.reason or self.reason
        if member.drained or state.blameless:
            return
        guilty = blame(leg.suspect for leg in member.legs)
        for suspect in guilty:
            if isinstance(suspect.prompt, int):
                self._quarantine.add(suspect.prompt, time.monotonic())

    def mourn(self, members: Iterable[Member]) -> None:
        """Their connections are closed: what is to be learnt of their ends."""
        with self._lock:
            for member in members:
                self._retire(member)
