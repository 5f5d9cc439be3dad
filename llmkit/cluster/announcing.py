"""The engine's side of a fleet: announces it to gateways, every second, until it ends.

One thread sends, another looks up names: a gateway's name may stand for several, and for others
tomorrow. A gateway that is not there yet is tried again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from llmkit.bridge import wire
from llmkit.bridge.curve import CurveKeys, beat
from llmkit.bridge.waker import Waker
from llmkit.cluster import announcements as words
from llmkit.cluster.announcements import Announcement, Place
from llmkit.errors import ModelNotFoundError
from llmkit.models.projectors import projector_of
from llmkit.models.splits import names_of
from llmkit.protocol import ModelDescription
from llmkit.settings.options import EngineOptions
from llmkit.system.reporting import report
from llmkit.version import __version__

__all__ = ["Announcer", "announcement", "model_hash"]

RESOLVE_S = 5.0
MISSED_S = 5.0  # without an answer; then it is said
RECONNECT_MS, MAX_RECONNECT_MS = 200, 2000
LINGER_MS = 500  # for the last words
CLOSE_S = 3.0
SAMPLE_BYTES = 1 << 20
ANSWERING = ("kv_type", "rope_scaling", "deterministic", "context_shift")
WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


@dataclass(slots=True, eq=False)
class _Gateway:
    """One address of a gateway; ``own`` is this host's, on the way there."""

    name: str
    address: str
    own: str
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    is_secure: bool = False
    trouble: str = ""
    heard_at: float = field(default_factory=time.monotonic)


def announcement(**facts: object) -> Announcement:
    """An announcement of an engine in this process, with what is the same in all of them."""
    host = os.uname().nodename if hasattr(os, "uname") else os.environ.get("COMPUTERNAME", "")
    own = {"instance": secrets.token_hex(16), "host": host[:256], "pid": os.getpid()}
    versions = {"version": wire.VERSION, "llmkit": __version__, "started": time.time()}
    return Announcement(**{**own, **versions, **facts})  # type: ignore[arg-type]


def model_hash(model: ModelDescription, options: Mapping[str, object]) -> str:
    """Tells what answers the same from what does not: by the files of a model, its adapters with
    their scales and its projector (of each the size, first and last mebibyte), and those of its
    ``options`` that change answers; "" without these files."""
    path, digest = Path(model.path), hashlib.sha256()
    try:
        for name in names_of(path.name):
            _sample(path.with_name(name), digest.update)
        for adapter, scale in model.adapters:
            digest.update(f"adapter {scale!r} ".encode())
            _sample(Path(adapter), digest.update)
        wanted = options.get("projector")
        wanted = None if wanted is None else str(wanted)
        projector = projector_of(path, wanted) if model.senses else None
        if projector is not None:
            digest.update(b"projector ")
            _sample(projector, digest.update)
    except (OSError, ModelNotFoundError):
        return ""
    usual = EngineOptions()
    chosen = [(name, options.get(name)) for name in ANSWERING]
    unusual = [(n, value) for n, value in chosen if value not in (None, getattr(usual, n))]
    if unusual:
        digest.update(repr(unusual).encode())
    return digest.hexdigest()[:32]


def _sample(path: Path, update: Callable[[bytes], object]) -> None:
    """Raises `OSError`."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        update(str(size).encode() + file.read(SAMPLE_BYTES))
        file.seek(max(0, size - SAMPLE_BYTES))
        update(file.read(SAMPLE_BYTES))


class Announcer:
    """Announces what ``tell`` says to the gateways at some ``places``.

    An address of all interfaces is announced as the one that each gateway sees, unless
    ``advertised`` gives another. Troubles are reported on standard error, each once.
    """

    def __init__(
        self,
        places: Sequence[Place],
        keys: CurveKeys,
        tell: Callable[[], Announcement],
        *,
        advertised: Place | None = None,
    ) -> None:
        self._places, self._keys, self._tell = places, keys, tell
        self._advertised = advertised
        self._gateways: dict[str, _Gateway] = {}
        self._wanted: dict[str, str] | None = None  # address: name; None: not looked up yet
        self._lost: set[str] = set()  # names without an address
        self._leaving = False
        self._closed = threading.Event()
        self._instance = tell().instance
        self._waker = Waker()
        self._ended = threading.Event()
        for target in (self._run, self._resolve):
            threading.Thread(target=target, name="llmkit-announce", daemon=True).start()

    def tell(self, tell: Callable[[], Announcement]) -> None:
        """From now on announce this, at once and every second."""
        self._tell = tell
        self._waker()

    def poke(self) -> None:
        """Announce now: something has changed."""
        self._waker()

    def close(self) -> None:
        """Say goodbye, and end."""
        self._leaving = True
        self._closed.set()
        self._waker()
        self._ended.wait(CLOSE_S)

    def _resolve(self) -> None:
        while not self._closed.is_set():
            wanted: dict[str, str] = {}
            for place in self._places:
                addresses = _addresses(place)
                if not addresses and place.host not in self._lost:
                    report(f"the gateway {place.host} has no address now; trying again")
                    self._lost.add(place.host)
                elif addresses:
                    self._lost.discard(place.host)
                # What has been there may be there still: a name server may be down.
                known = [a for a, name in (self._wanted or {}).items() if name == place.address]
                wanted |= dict.fromkeys(addresses or known, place.address)
            if wanted != self._wanted:
                self._wanted = wanted
                self._waker()
            self._closed.wait(RESOLVE_S)

    def _run(self) -> None:
        try:
            with zmq.Context() as context:
                try:
                    self._announce(context)
                finally:
                    for gateway in list(self._gateways.values()):
                        self._drop(gateway)
        finally:
            self._ended.set()
            self._waker.close()

    def _announce(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        poller = zmq.Poller()
        poller.register(self._waker.fileno, zmq.POLLIN)
        due = 0.0
        while not self._leaving:
            wanted = dict(self._wanted or {})
            for gateway in [g for a, g in self._gateways.items() if a not in wanted]:
                poller.unregister(gateway.socket)
                poller.unregister(gateway.monitor)
                self._drop(gateway)
            for address in wanted.keys() - self._gateways.keys():
                gateway = self._open(context, address, wanted[address])
                poller.register(gateway.socket, zmq.POLLIN)
                poller.register(gateway.monitor, zmq.POLLIN)
            wait = max(0.0, due - time.monotonic())
            events = dict(poller.poll(int(1000 * wait)))
            if self._waker.fileno in events:
                self._waker.clear()
                due = 0.0
            fresh = False
            for gateway in self._gateways.values():
                if gateway.socket in events or gateway.monitor in events:
                    fresh |= self._watch(gateway)
            # Whoever has just come needs not wait for the next second.
            if fresh or time.monotonic() >= due:
                due = time.monotonic() + words.EVERY_S
                said = self._tell()
                for gateway in self._gateways.values():
                    _send(gateway, words.ANNOUNCE, words.pack(self._for(gateway, said)))
                    self._miss(gateway)
        for gateway in self._gateways.values():
            _send(gateway, words.LEAVE, words.pack(words.Leave(self._instance)))

    def _for(self, gateway: _Gateway, said: Announcement) -> Announcement:
        if not said.address:
            return said
        place = Place.read(said.address, "listen")
        if self._advertised is not None:
            place = Place(self._advertised.host, self._advertised.port or place.port)
        elif place.is_wild:
            place = Place(gateway.own, place.port)
        return msgspec.structs.replace(said, address=place.address)

    def _open(self, context: zmq.Context[zmq.Socket[bytes]], address: str, name: str) -> _Gateway:
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, LINGER_MS)
        # Nothing is kept for a gateway that is not there: it would be out of date.
        sock.setsockopt(zmq.IMMEDIATE, 1)
        sock.setsockopt(zmq.SNDHWM, 4)
        sock.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, MAX_RECONNECT_MS)
        sock.setsockopt(zmq.IPV6, int("[" in address))
        beat(sock)
        self._keys.connect(sock)
        monitor = sock.get_monitor_socket(WATCHED)
        sock.connect(address)
        gateway = _Gateway(name, address, _own_address(address), sock, monitor)
        self._gateways[address] = gateway
        return gateway

    def _drop(self, gateway: _Gateway) -> None:
        del self._gateways[gateway.address]
        gateway.socket.disable_monitor()
        gateway.monitor.close(0)
        gateway.socket.close()

    def _watch(self, gateway: _Gateway) -> bool:
        """Read what a gateway says; True if it has just come."""
        fresh = False
        with contextlib.suppress(zmq.Again):
            while True:
                event = recv_monitor_message(gateway.monitor, zmq.NOBLOCK)["event"]
                if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    gateway.is_secure = fresh = True
                    gateway.own = _own_address(gateway.address)
                elif event == zmq.EVENT_CONNECTED:
                    gateway.is_secure = False
                elif not gateway.is_secure:
                    self._trouble(gateway, "does not know our fleet key, or is no gateway")
        with contextlib.suppress(zmq.Again):
            while True:
                kind, body = gateway.socket.recv_multipart(zmq.NOBLOCK)
                if kind == words.REFUSED:
                    self._trouble(gateway, f"refuses this engine: {_reason(body)}")
                elif kind == words.HEARD:
                    gateway.heard_at = time.monotonic()
                    if gateway.trouble:
                        gateway.trouble = ""
                        report(f"the gateway at {gateway.name} hears this engine")
        return fresh

    def _miss(self, gateway: _Gateway) -> None:
        """Say that a gateway is not there, unless it is known what is wrong."""
        if not gateway.trouble and time.monotonic() - gateway.heard_at > MISSED_S:
            self._trouble(gateway, "does not answer; trying again")

    @staticmethod
    def _trouble(gateway: _Gateway, what: str) -> None:
        if gateway.trouble != what:
            gateway.trouble = what
            report(f"the gateway at {gateway.name} {what}")


def _reason(body: bytes) -> str:
    try:
        return f"{words.unpack_refused(body).reason:.300}"
    except ValueError:
        return "it does not say why"


def _send(gateway: _Gateway, kind: bytes, body: bytes) -> None:
    with contextlib.suppress(zmq.Again):  # it is not there now
        gateway.socket.send_multipart([kind, body], zmq.NOBLOCK)


def _addresses(place: Place) -> list[str]:
    """All addresses of a name, as ZMQ writes them."""
    try:
        found = socket.getaddrinfo(place.host.strip("[]"), place.port, type=socket.SOCK_STREAM)
    except OSError:
        return []
    hosts = dict.fromkeys(str(address[0]) for *_, address in found)
    return [f"tcp://{f'[{h}]' if ':' in h else h}:{place.port}" for h in hosts]


def _own_address(address: str) -> str:
    """This host's address on the way to another; nothing is sent."""
    place = Place.read(address, "join")
    host = place.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((host, place.port))
            own = str(probe.getsockname()[0])
    except OSError:  # no way there now
        own = socket.gethostname()
    return f"[{own}]" if ":" in own else own
