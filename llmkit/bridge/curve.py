"""Sockets between hosts: who may connect (CURVE keys, checked by ZAP), and when one is lost.

Knows no messages. A `Doorkeeper` belongs to the thread that polls it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from hmac import compare_digest

import zmq
from zmq.utils import z85

__all__ = ["CurveKeys", "Doorkeeper", "beat"]

DOMAIN = b"llmkit"
ZAP = "inproc://zeromq.zap.01"
BEAT_MS, SILENT_MS = 1000, 3000  # of the sockets' own heartbeats, which need no Python
CONNECT_MS, HANDSHAKE_MS = 5000, 5000


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """This side's pair of keys, and the other side's public key; each 40 characters of Z85."""

    public: bytes
    secret: bytes = field(repr=False)
    other: bytes

    def serve(self, sock: zmq.Socket[bytes]) -> None:
        """Listen with these keys. Without a `Doorkeeper` in its context nobody gets in."""
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.secret)
        sock.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def connect(self, sock: zmq.Socket[bytes]) -> None:
        """Connect with these keys, to nobody but the other side."""
        sock.setsockopt(zmq.CURVE_SERVERKEY, self.other)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, self.public)
        sock.setsockopt(zmq.CURVE_SECRETKEY, self.secret)


def beat(sock: zmq.Socket[bytes]) -> None:
    """Have libzmq's own thread find out whether the other host is still there.

    A process that was killed closes its connection at once; one that is stopped, or out of reach,
    loses it after four seconds. One whose Python is busy keeps it.
    """
    sock.setsockopt(zmq.HEARTBEAT_IVL, BEAT_MS)
    sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
    sock.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class Doorkeeper:
    """Admits to a context's listening sockets whoever holds the other side's secret key."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: CurveKeys) -> None:
        self._admitted = z85.decode(keys.other)
        self.socket = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP)

    def answer(self) -> None:
        """Answer all who knock."""
        with contextlib.suppress(zmq.Again):
            while True:
                version, request, _, _, _, mechanism, *credentials = self.socket.recv_multipart(
                    zmq.NOBLOCK
                )
                known = mechanism == b"CURVE" and any(
                    compare_digest(each, self._admitted) for each in credentials
                )
                code, text = (b"200", b"OK") if known else (b"400", b"unknown key")
                self.socket.send_multipart([version, request, code, text, b"fleet", b""])

    def close(self) -> None:
        self.socket.close()
