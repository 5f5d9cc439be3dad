"""One answer through a pool: the stream that its reader holds, whichever replica writes it.

Runs on the threads of the replicas' clients; a move to another replica too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from llmkit.cluster.prefixes import PrefixChain
from llmkit.cluster.routing import Ticket
from llmkit.errors import DrainingError, EngineDiedError, EngineGoneError, ModelUnloadedError
from llmkit.protocol import Completion, FinishReason, GenerationRequest, Resume
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Channel, Stream

__all__ = ["LOSSES", "MAX_DEATHS", "Leg", "Places", "Relay"]

# What says that another replica may do it; the first that nothing was begun here.
LOSSES = (DrainingError, EngineGoneError, ModelUnloadedError)
MAX_DEATHS = 2  # of replicas, under one request
MAX_MOVES = 10  # of one request, for whatever reason


@dataclass(slots=True, eq=False)
class Leg:
    """A request at one replica; ``stream`` is None until it is there."""

    member: str
    client: EngineClient
    ticket: Ticket
    stream: Stream | None = None
    source: object = None  # what the pool knows of the replica


class Places(Protocol):
    """What a relay needs of its pool. Any thread."""

    def choose(self, chain: PrefixChain, answered: int, avoid: set[str]) -> Leg | None:
        """A replica for a request, or None if there is none now."""
        ...

    def leave(self, leg: Leg, completion: Completion | None = None) -> None:
        """A request has left its replica."""
        ...

    def started(self, leg: Leg) -> None:
        """Its first token is there."""
        ...

    def lost(self, leg: Leg, failure: Exception) -> bool:
        """A replica has failed or refused a request: whether it ended without being told to."""
        ...

    def condemn(self, relay: Relay) -> None:
        """Replicas died of it: refuse its prompt for a while."""
        ...

    def refused(self, chain: PrefixChain) -> EngineDiedError | None:
        """Why this prompt is refused now."""
        ...

    def park(self, relay: Relay) -> None:
        """Call `place` again once there is a replica."""
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
        places: Places,
        abort: Callable[[str], None],
    ) -> None:
        self.request, self.chain = request, chain
        self.channel = Channel(request.request_id, abort)
        begun = request.resume
        self._tokens = [] if begun is None else list(begun.tokens)
        self._sent = 0 if begun is None else begun.sent_chars
        self._counted = len(self._tokens)
        self._places = places
        self._lock = threading.RLock()
        self._leg: Leg | None = None
        self._avoid: set[str] = set()
        self._deaths = self._moves = 0
        self._aborted = False
        self._began, self._first_at, self._last_at = time.monotonic(), 0.0, 0.0
        self._gap = 0.0
        self.parked_at: float | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

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
        self.parked_at = None
        refusal = self._places.refused(self.chain) if self._deaths else None
        if refusal is not None:
            return self._fail(refusal)
        while not self._aborted:
            leg = self._places.choose(self.chain, len(self._tokens), self._avoid)
            if leg is None:
                self._leg = None
                self.parked_at = time.monotonic()
                return self._places.park(self)
            try:
                leg.stream = leg.client.submit(self._rest())
            except LOSSES as error:
                self._places.leave(leg)
                self._places.lost(leg, error)
                self._avoid.add(leg.member)
                self._moves += 1
                if self._moves > MAX_MOVES or isinstance(error, EngineDiedError):
                    raise
                continue
            except BaseException:
                self._places.leave(leg)
                raise
            return self._follow(leg)
        self._finish(self._cut(), None)

    def _follow(self, leg: Leg) -> None:
        assert leg.stream is not None
        self._leg = leg
        if self._aborted:
            leg.client.abort(leg.stream.request_id)
        leg.stream.listen(lambda: self._pump(leg))

    def _rest(self) -> GenerationRequest:
        """What is left to compute. Its id is new: the engine may still know the last one."""
        request = replace(self.request, show_tokens=True)
        if self._moves:
            request = replace(request, request_id=f"{self.request_id:.200}~{self._moves}")
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
                    self._places.started(leg)
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
        if not isinstance(failure, LOSSES) or isinstance(failure, EngineDiedError):
            self._places.leave(leg, completion)
            self._finish(self._whole(completion), failure)
            return
        self._places.leave(leg)
        if self._aborted:
            self._finish(self._cut(), None)
            return
        try:
            self._move(leg, failure)
        except Exception as error:  # this thread is the replica's client
            self._fail(error)

    def _move(self, leg: Leg, failure: Exception) -> None:
        self._leg = None
        self._avoid.add(leg.member)
        self._moves += 1
        if self._places.lost(leg, failure):
            self._deaths += 1
        if self._deaths >= MAX_DEATHS:
            self._places.condemn(self)
            message = (
                f"{self._deaths} engines ended while they computed this request; the last one: "
                f"{failure} The prompt is refused for a minute."
            )
            return self._fail(EngineDiedError(message))
        if len(self._tokens) != self._counted:
            message = (
                "the engine that computed this request has ended, and no other can go on with it: "
                "its context was shifted, or the engine is of an older version. Send it again."
            )
            return self._fail(EngineGoneError(message))
        if self._moves > MAX_MOVES:
            return self._fail(failure)
        self._place()

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
        self._places.forget(self)

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
        if not self._moves:
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
