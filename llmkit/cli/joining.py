"""What `llmkit engine --join` runs: a model for the gateways of other hosts, until SIGTERM.

It is announced to them, served by CURVE over TCP, and drained before it ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from llmkit.bridge.curve import CurveKeys
from llmkit.bridge.server import BridgeServer
from llmkit.cluster.announcements import Place
from llmkit.cluster.announcing import Announcer, announcement, model_hash
from llmkit.cluster.fleet_key import engine_keys, read_key
from llmkit.cluster.reports import Reports, report_of
from llmkit.errors import EngineGoneError, InvalidRequestError
from llmkit.loading import load
from llmkit.protocol import ModelDescription
from llmkit.protocol.client import EngineClient

if TYPE_CHECKING:
    from llmkit.llm import LLM

__all__ = ["Joining", "hold_joined"]

LOOK_S, DRAIN_LOOK_S = 0.5, 0.05
STUCK_S = 5.0  # after the second SIGTERM
UNLOADED = "the engine was told to end"


@dataclass(frozen=True, slots=True)
class Joining:
    """Which gateways an engine joins, and where they reach it."""

    gateways: tuple[Place, ...]
    listen: Place
    advertised: Place | None
    keys: CurveKeys
    drain_s: float

    @classmethod
    def read(
        cls,
        join: Sequence[str],
        listen: str | None,
        advertise: str | None,
        key_file: str | None,
        drain_s: float,
    ) -> Joining:
        """Raises `InvalidRequestError` naming an option."""
        gateways = tuple(Place.read(address, "join", port=True) for address in join)
        if wild := next((g for g in gateways if g.is_wild), None):
            raise InvalidRequestError(f"join: {wild.address} is no gateway's address.", "join")
        near = all(gateway.is_loopback for gateway in gateways)
        if listen is not None:
            place = Place.read(listen, "listen")
        else:
            place = Place("127.0.0.1" if near else "*", 0)
        advertised = None if advertise is None else Place.read(advertise, "advertise")
        if advertised is not None and advertised.is_wild:
            raise InvalidRequestError(
                f"advertise: nobody can connect to {advertise}; name one address.", "advertise"
            )
        if place.is_loopback and advertised is None and not near:
            raise InvalidRequestError(
                f"listen: gateways of other hosts cannot reach {place.address}; name another "
                "address of this host, or * for all.",
                "listen",
            )
        if key_file is None:
            raise InvalidRequestError(
                "join needs fleet_key_file as well: `llmkit keys fleet FILE` makes a key, which "
                "gateways and engines share.",
                "fleet_key_file",
            )
        return cls(gateways, place, advertised, engine_keys(read_key(Path(key_file))), drain_s)


class _Signals:
    """Counts SIGTERM, on a thread of its own: the main thread may be in C code for minutes."""

    def __init__(self, on_signal: Callable[[int], None]) -> None:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._on_signal = on_signal
        self.count = 0
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._run, name="llmkit-signals", daemon=True).start()

    def _run(self) -> None:
        while received := self._read.recv(64):
            for number in received:
                if number == signal.SIGTERM:
                    self.count += 1
                    self._on_signal(self.count)


def hold_joined(
    model: str, options: dict[str, Any], joining: Joining, report_fd: int | None = None
) -> int:
    """Load a model and keep it for the gateways. Raises what `llmkit.load` raises, `OSError` if it
    cannot listen, and `EngineGoneError` when its engine ends."""
    _check_free(joining.listen)
    loaded, something = threading.Event(), threading.Event()
    reports = None if report_fd is None else Reports(report_fd, lambda: os._exit(1))

    def signalled(count: int) -> None:
        if not loaded.is_set():
            os._exit(0)  # nobody is served yet
        something.set()
        if count == 2:
            time.sleep(STUCK_S)
            os._exit(1)

    signals = _Signals(signalled)
    starter = _Starter(something, loaded)
    said = announcement(
        model=ModelDescription(options.get("name") or Path(model).stem or model, ""),
        phase="loading",
    )
    announcer = Announcer(
        joining.gateways, joining.keys, lambda: said, advertised=joining.advertised
    )
    try:
        with load(model, **options, share=False) as llm:
            # No cell is busy here: with Python's default the engine finishes its step undisturbed.
            sys.setswitchinterval(0.005)
            engine = llm.engine
            server = BridgeServer(engine, listen=joining.listen.address, keys=joining.keys)
            said = msgspec.structs.replace(
                said,
                model=llm.model,
                phase="ready",
                address=server.connection.address,
                key=server.connection.key,
                model_hash=model_hash(llm.model, options),
            )
            announcer.tell(lambda: msgspec.structs.replace(said, **_now(engine, server)))
            loaded.set()
            gateways = ", ".join(each.address for each in joining.gateways)
            print(
                f"llmkit: {llm.name!r} is ready at {server.connection.address}, "
                f"announced to {gateways}",
                flush=True,
            )
            if reports is not None:
                reports.begin(lambda: {**report_of(engine), "state": _now(engine, server)["phase"]})
            try:
                _serve(llm, server, joining.drain_s, announcer, signals, starter, something)
            finally:
                server.close(UNLOADED)
                announcer.close()
    finally:
        announcer.close()
    return 0


def _now(engine: EngineClient, server: BridgeServer) -> dict[str, Any]:
    """What of an announcement changes."""
    return {
        "stats": engine.stats(),
        "phase": "draining" if server.is_draining else "ready",
    }


def _serve(
    llm: LLM,
    server: BridgeServer,
    drain_s: float,
    announcer: Announcer,
    signals: _Signals,
    starter: _Starter,
    something: threading.Event,
) -> None:
    """Until it is told to end, and has drained."""
    end: float | None = None
    while True:
        something.wait(LOOK_S if end is None else DRAIN_LOOK_S)
        something.clear()
        if starter.is_gone or signals.count > 1:
            return
        if llm.closed or not server.alive:
            raise EngineGoneError(
                llm.engine.state.reason or server.reason or "the engine has ended"
            )
        if signals.count and end is None:
            end = time.monotonic() + drain_s
            server.drain(drain_s)
            announcer.poke()
            print(f"llmkit: {llm.name!r} takes nothing new and finishes what runs", flush=True)
        if end is not None and (server.is_drained or time.monotonic() >= end):
            return


class _Starter:
    """Whoever started this process, by a pipe, which ends with it. Services have none: their
    standard input is a terminal, a file or nothing, and says nothing."""

    def __init__(self, something: threading.Event, loaded: threading.Event) -> None:
        self.is_gone = False
        self._something, self._loaded = something, loaded
        try:
            mode = os.fstat(0).st_mode
        except OSError:  # closed
            return
        if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            threading.Thread(target=self._watch, name="llmkit-starter", daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        self.is_gone = True
        if not self._loaded.is_set():
            with contextlib.suppress(OSError):
                os.write(2, b"llmkit: standard input, a pipe, has ended, and with it this engine\n")
            os._exit(1)
        self._something.set()


def _check_free(place: Place) -> None:
    """Do not load a model only to find the port taken. Raises `OSError`."""
    host = "" if place.host == "*" else place.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, place.port))
        except OSError as error:
            raise OSError(error.errno, f"listen: {place.address}: {error.strerror}") from None
