"""The gateway's side of a fleet: hears which engines there are, and connects to them.

One thread listens; `find` may be called on any other. What is heard is bounded in number and size,
and comes only from holders of the fleet's key.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import zmq

from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import Connection
from llmkit.bridge.curve import CurveKeys, Doorkeeper, beat
from llmkit.bridge.waker import Waker
from llmkit.cluster import announcements as words
from llmkit.cluster.announcements import Announcement
from llmkit.errors import InvalidRequestError
from llmkit.protocol import EngineState, Origin
from llmkit.protocol.client import EngineClient

__all__ = ["Fleet", "FleetEngine"]

logger = logging.getLogger("llmkit.fleet")

MAX_ENGINES = 4096
MAX_MESSAGES = 256  # read before anything else is done
STEADY_S = 10.0  # a connection that lasted so long is worth making again at once
RETRY_S, MAX_RETRY_S = 0.5, 30.0


class FleetEngine(BridgeClient):
    """An engine of another host; engines of one ``model_hash`` answer the same. It is "loading"
    until it has answered: one that announces itself may not be reachable from here."""

    def __init__(self, announced: Announcement, keys: CurveKeys) -> None:
        place = words.Place.read(announced.address, "address")
        self.model_hash = announced.model_hash
        self._origin = Origin("host", host=f"{announced.host or place.host}:{place.port}")
        connection = Connection(
            announced.address,
            announced.key,
            announced.pid,
            0.0,
            announced.host,
            "",
            "",
            None,
            announced.started,
            announced.model,
        )
        super().__init__(connection, weighs=True, keys=keys)
        self._stats = announced.stats  # until it says more

    @property
    def origin(self) -> Origin:
        return self._origin

    @property
    def state(self) -> EngineState:
        found = super().state
        if found.phase != "ready" or self.has_answered:
            return found
        name = self.description.name
        return EngineState(
            "loading", f"the engine of {name!r} has not answered yet; try again in a moment"
        )


@dataclass(slots=True)
class _Heard:
    """An engine that was heard of; ``tries`` counts its connections, one of which may be open."""

    said: Announcement
    at: float
    client: FleetEngine | None = None
    tries: int = 0
    connected: float = 0.0
    failures: int = 0
    again: float = 0.0  # no sooner is it connected to


class Fleet:
    """Engines that announce themselves at ``listen`` (``tcp://HOST:PORT``), an `EngineSource`.

    An engine that falls silent is forgotten after five seconds, unless its connection still
    stands: a busy one is not dead. For one directory, which owns the clients. Raises
    `InvalidRequestError` if it cannot listen there.
    """

    def __init__(
        self,
        listen: str,
        keys: CurveKeys,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_engines: int = MAX_ENGINES,
    ) -> None:
        self._keys, self._clock, self._max_engines = keys, clock, max_engines
        self._lock = threading.Lock()
        self._heard: dict[str, _Heard] = {}
        self._closed = False
        self._waker = Waker()
        self._context = zmq.Context()
        self._doorkeeper = Doorkeeper(self._context, keys)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, words.MAX_BYTES)
        place = words.Place.read(listen, "fleet_listen")
        self._socket.setsockopt(zmq.IPV6, int("[" in listen))
        keys.serve(self._socket)
        beat(self._socket)
        try:
            self._socket.bind(place.address)
        except zmq.ZMQError as error:
            self._end()
            raise InvalidRequestError(
                f"fleet_listen: nobody can listen at {listen}: {error.strerror}.", "fleet_listen"
            ) from None
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._thread = threading.Thread(target=self._run, name="llmkit-fleet", daemon=True)
        self._thread.start()

    def find(self) -> Mapping[Hashable, Callable[[], EngineClient]]:
        """The engines that can be used, newest first. One that was lost and is heard of again comes
        under another key: whatever it was doing is gone."""
        now = self._clock()
        with self._lock:
            for instance, heard in list(self._heard.items()):
                client = heard.client
                if client is not None and client.state.is_gone:
                    self._was_lost(heard, now)
                if heard.client is None and now - heard.at > words.TTL_S:
                    del self._heard[instance]
            usable = [
                (instance, heard)
                for instance, heard in self._heard.items()
                if heard.client is not None
                or (heard.said.phase == "ready" and now >= heard.again and heard.at >= heard.again)
            ]
        usable.sort(key=lambda each: (each[1].said.started, each[0]), reverse=True)
        return {(i, heard.tries): self._reach(i, heard) for i, heard in usable}

    def absent(self, name: str) -> str | None:
        """Why a model that was heard of cannot be used yet; None for others. Names no host: it is
        for whoever asks."""
        now = self._clock()
        with self._lock:
            is_loading = any(
                h.said.model.name == name
                and h.said.phase == "loading"
                and now - h.at <= words.TTL_S
                for h in self._heard.values()
            )
        return f"The model {name!r} is being loaded; try again in a moment." if is_loading else None

    def close(self) -> None:
        """Listen no more; the clients are their owner's."""
        self._closed = True
        self._waker()
        self._thread.join(2)

    def _reach(self, instance: str, heard: _Heard) -> Callable[[], EngineClient]:
        def reach() -> EngineClient:
            with self._lock:
                if heard.client is None:
                    heard.client = FleetEngine(heard.said, self._keys)
                    heard.connected = self._clock()
                return heard.client

        return reach

    @staticmethod
    def _was_lost(heard: _Heard, now: float) -> None:
        """Connect again if it is heard of after this, and later each time that it does not last."""
        if now - heard.connected > STEADY_S:
            heard.failures = 0
        wait = min(MAX_RETRY_S, RETRY_S * 2**heard.failures)
        heard.client, heard.again = None, now + wait
        heard.tries, heard.failures = heard.tries + 1, min(heard.failures + 1, 10)

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (self._socket, self._doorkeeper.socket, self._waker.fileno):
            poller.register(each, zmq.POLLIN)
        try:
            while not self._closed:
                poller.poll()
                self._waker.clear()
                self._doorkeeper.answer()
                self._receive_some()
        except Exception:
            logger.exception("the gateway hears no engines any more")
        self._end()

    def _receive_some(self) -> None:
        with contextlib.suppress(zmq.Again):
            for _ in range(MAX_MESSAGES):
                identity, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
                try:
                    kind, body = frames
                    answer = self._take(kind, body)
                except Exception as error:  # garbage is dropped
                    logger.debug("dropped an announcement: %r", error)
                    answer = [words.REFUSED, words.pack(words.Refused("it cannot be read"))]
                with contextlib.suppress(zmq.ZMQError):  # it has gone, or does not read
                    self._socket.send_multipart([identity, *answer], zmq.NOBLOCK)

    def _take(self, kind: bytes, body: bytes) -> list[bytes]:
        """The answer to a message. Raises what its parsing raises."""
        if kind == words.LEAVE:
            leave = words.unpack_leave(body)
            with self._lock:
                heard = self._heard.get(leave.instance)
                if heard is not None and heard.client is None:
                    del self._heard[leave.instance]
            return [words.HEARD, b""]
        if kind != words.ANNOUNCE:
            raise ValueError("an unknown kind of message")
        said = words.unpack_announcement(body)
        why = wire.stranger(said.version, said.llmkit)
        now = self._clock()
        with self._lock:
            known = self._heard.get(said.instance)
            if known is None and len(self._heard) >= self._max_engines:
                self._forget_silent(now)
                if len(self._heard) >= self._max_engines:
                    why = f"this gateway already knows {self._max_engines} engines"
            if why is None and known is not None:
                known.said, known.at = said, now
            elif why is None:
                self._heard[said.instance] = _Heard(said, now)
        if why is not None:
            return [words.REFUSED, words.pack(words.Refused(why))]
        return [words.HEARD, b""]

    def _forget_silent(self, now: float) -> None:
        silent = [
            instance
            for instance, heard in self._heard.items()
            if heard.client is None and now - heard.at > words.TTL_S
        ]
        for instance in silent:
            del self._heard[instance]

    def _end(self) -> None:
        self._socket.close()
        self._doorkeeper.close()
        self._context.term()
        self._waker.close()
