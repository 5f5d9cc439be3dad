"""One answer through a pool: the stream that its reader holds, whichever replica writes it.

Runs on the threads of the replicas' clients, which must not wait: a move to another replica is
left to the pool's own thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Protocol

from llmkit.cluster.blame import Suspect
from llmkit.cluster.members import LOSSES, Leg
from llmkit.cluster.prefixes import PrefixChain
from llmkit.cluster.roster import Roster
from llmkit.errors import (
    DrainingError,
    EngineDiedError,
    EngineGoneError,
    QueueFullError,
)
from llmkit.protocol import Completion, FinishReason, GenerationRequest, Resume
from llmkit.protocol.stream import Channel

__all__ = ["Owner", "Relay"]

MAX_LOSSES = 10  # of replicas, by one request, for whatever reason
MAX_FULL = 4  # replicas with a full queue are asked one after another
LATER_S = 0.25  # until one is looked for again where there was none
FULL_S = 1.0  # then those whose answer has begun are tried again after this
SHIFTED = (
    "the engine that computed this request has ended, and no other can go on with it: "
    "its context was shifted, or the engine is of an older version. Send it again."
)
IN_PART = (
    "the engine that computed this request has ended, and no other can go on with what was heard, "
    "spoken or drawn in part. Send it again."
)


class Owner(Protocol):
    """What keeps relays: a pool. Any thread."""

    def abort(self, request_id: str) -> None:
        """End one early."""
        ...

    def park(self, relay: Relay) -> None:
        """Call `place` once it is due and there is a replica."""
        ...

    def forget(self, relay: Relay) -> None:
        """It has ended."""
        ...


class Relay:
    """An answer on its way from a replica to its reader.

    Keeps the tokens and how much text was sent, from which another replica goes on. ``abort`` may
    be called by the garbage collector, anywhere: it takes no lock.
    """

    def __init__(
        self,
        request: GenerationRequest,
        chain: PrefixChain,
        suspect: Suspect,
        roster: Roster,
        owner: Owner,
    ) -> None:
        self.request, self.chain, self.suspect = request, chain, suspect
        self.channel = Channel(request.request_id, owner.abort, keeps_text=request.keeps_text)
        begun = request.resume
        self._tokens = [] if begun is None else list(begun.tokens)
        self._sent = 0 if begun is None else begun.sent_chars
        self._counted = len(self._tokens)
        self._roster, self._owner = roster, owner
        self._lock = threading.RLock()
        self._leg: Leg | None = None
        self._left: set[str] = set()  # replicas that were lost, or refused it
        self._full: set[str] = set()  # those without room for it, this time
        self._no_room: QueueFullError | None = None
        self._losses = self._tries = 0
        self._is_admitted = False
        self._aborted = False
        self._began, self._first_at, self._last_at = time.monotonic(), 0.0, 0.0
        self._gap = 0.0
        self.parked_at = self.due = 0.0

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def id_there(self) -> str | None:
        """What the replica calls it."""
        leg = self._leg
        return None if leg is None or leg.stream is None else leg.stream.request_id

    def start(self, leg: Leg) -> None:
        """Follow the stream of a replica that has the request."""
        with self._lock:
            self._follow(leg)
        self.channel.wake()

    def place(self) -> None:
        """Have a replica compute it from where it is, or be parked. Never raises."""
        with self._lock:
            if not self.channel.finished:
                try:
                    self._place()
                except Exception as error:
                    self._fail(error)
        self.channel.wake()

    def give_up(self, error: Exception) -> None:
        """Nobody took it in time."""
        with self._lock:
            if self._leg is None and not self.channel.finished:
                self._fail(error)
        self.channel.wake()

    @property
    def is_aborted(self) -> bool:
        return self._aborted

    def abort(self) -> None:
        """End it early, wherever it is."""
        self._aborted = True  # before the look: whoever places it looks after placing
        leg = self._leg
        stream = None if leg is None else leg.stream
        if leg is not None and stream is not None:
            leg.client.abort(stream.request_id)

    def _place(self) -> None:
        refusal = self._roster.refused(self.chain) if self.suspect.deaths else None
        if refusal is not None:
            return self._fail(refusal)
        while not self._aborted:
            leg = self._roster.choose(
                self.chain, self.suspect, self._left | self._full, self._tokens
            )
            if self._no_room is not None and (
                leg is None or leg.member.name in self._full or len(self._full) >= MAX_FULL
            ):
                if leg is not None:
                    self._roster.leave(leg, failure=self._no_room)
                return self._wait_for_room(self._no_room)
            if leg is None:
                return self._park(LATER_S)
            self._tries += 1
            try:
                leg.stream = leg.client.submit(self._rest())
            except LOSSES as error:
                self._lose(leg, error)
                continue
            except QueueFullError as error:
                self._is_full(leg, error)
                continue
            except Exception as error:
                self._roster.leave(leg, failure=error)
                raise
            return self._follow(leg)
        self._finish(self._cut(), None)

    def _park(self, seconds: float) -> None:
        self._leg = None
        self.parked_at = time.monotonic()
        self.due = self.parked_at + seconds
        self._owner.park(self)

    def _is_full(self, leg: Leg, error: QueueFullError) -> None:
        """This replica has no room for it; nothing was begun there."""
        self._roster.leave(leg, failure=error)
        self._full.add(leg.member.name)
        self._no_room = error

    def _wait_for_room(self, error: QueueFullError) -> None:
        """No replica has room. An answer that was begun waits, since it was admitted once."""
        self._full, self._no_room = set(), None
        if self._is_admitted:
            self._park(FULL_S)
        else:
            self._fail(error)

    def _follow(self, leg: Leg) -> None:
        assert leg.stream is not None
        self._leg = leg
        if self._aborted:
            leg.client.abort(leg.stream.request_id)
        leg.stream.listen(lambda: self._pump(leg))

    def _rest(self) -> GenerationRequest:
        """What is left to compute. Its id is new: the engine may still know the last one."""
        request_id = f"{self.request_id:.200}~{self._tries}"
        request = replace(self.request, request_id=request_id, show_tokens=True)
        if self._tokens:
            request = replace(request, resume=Resume(tuple(self._tokens), self._sent))
        return request

    def _pump(self, leg: Leg) -> None:
        """Pass on what a replica sent."""
        with self._lock:
            stream = leg.stream
            if leg is not self._leg or stream is None:
                return
            deltas, completion = stream.take()
            if deltas:
                now = time.monotonic()
                if self._last_at == 0.0:
                    self._first_at = now
                elif now - self._last_at > self._gap:
                    self._gap = now - self._last_at
                self._last_at = now
                if leg.ticket.is_pending:
                    self._roster.started(leg)
                    self._is_admitted = True
                    self._full, self._no_room = set(), None
                push, tokens = self.channel.push, self._tokens
                for delta in deltas:
                    tokens.extend(delta.tokens)
                    self._counted += delta.num_tokens
                    self._sent += len(delta.text)
                    push(delta)
            if completion is not None:
                self._ended(leg, completion)
        if deltas or completion is not None:
            self.channel.wake()

    def _ended(self, leg: Leg, completion: Completion) -> None:
        assert leg.stream is not None
        failure = leg.stream.failure
        try:
            if isinstance(failure, QueueFullError) and leg.ticket.is_pending:
                self._leg = None
                self._is_full(leg, failure)
                return self._park(0.0)
            if not isinstance(failure, LOSSES) or isinstance(failure, EngineDiedError):
                self._roster.leave(leg, completion, failure)
                return self._finish(self._whole(completion), failure)
            self._move(leg, failure)
        except Exception as error:  # this thread is the replica's client
            self._fail(error)

    def _move(self, leg: Leg, failure: Exception) -> None:
        self._leg = None
        self._is_admitted = self._is_admitted or not isinstance(failure, DrainingError)
        self._lose(leg, failure)
        if self._aborted:
            return self._finish(self._cut(), None)
        if self.suspect.is_guilty:
            last = str(failure).partition(". ")[0].rstrip(".")  # without its advice
            message = (
                f"{self.suspect.deaths} engines ended while they computed this request; "
                f"the last one: {last}. The prompt is refused for a minute."
            )
            return self._fail(EngineDiedError(message))
        asked = self.request
        is_text = asked.hearing is None and asked.saying is None and asked.drawing is None
        if not is_text and self._last_at:
            return self._fail(EngineGoneError(IN_PART))
        if len(self._tokens) != self._counted:
            return self._fail(EngineGoneError(SHIFTED))
        self._park(0.0)

    def _lose(self, leg: Leg, failure: Exception) -> None:
        """A replica is lost to it. Raises the failure if it has lost too many."""
        self._roster.lost(leg, failure)
        self._left.add(leg.member.name)
        self._losses += 1
        if self._losses > MAX_LOSSES or isinstance(failure, EngineDiedError):
            raise failure

    def _fail(self, error: Exception) -> None:
        self.channel.fail(error)
        self._let_go()

    def _finish(self, completion: Completion, failure: Exception | None) -> None:
        self.channel.finish(completion, failure)
        self._let_go()

    def _let_go(self) -> None:
        leg, self._leg = self._leg, None
        if leg is not None:
            leg.stream = None  # whose listener holds us
        self._owner.forget(self)

    def _cut(self) -> Completion:
        return Completion(
            "".join(self.channel.text_parts),
            FinishReason.ABORT,
            tokens=tuple(self._tokens),
            request_id=self.request_id,
            logprobs=tuple(self.channel.logprobs),
        )

    def _whole(self, completion: Completion) -> Completion:
        """The end of an answer, and what other replicas computed of it."""
        if not self._tries:
            return completion
        metrics = replace(
            completion.metrics,
            ttft_s=max(0.0, (self._first_at or time.monotonic()) - self._began),
            decode_s=self._last_at - self._first_at,
            max_itl_s=max(self._gap, completion.metrics.max_itl_s),
            completion_tokens=completion.usage.completion_tokens,
        )
        return replace(
            completion,
            text="".join(self.channel.text_parts),
            logprobs=tuple(self.channel.logprobs),
            request_id=self.request_id,
            metrics=metrics,
        )
