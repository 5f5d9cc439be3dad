"""`llmkit serve`: the gateway without Jupyter, and the engine process behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

from llmkit.bridge.connection import process_start_time
from llmkit.config import ENGINE_OPTIONS, ServeSettings
from llmkit.errors import InvalidRequestError, ModelLoadError
from llmkit.gateway.app import Gateway, make_app, make_server
from llmkit.gateway.auth import Keys
from llmkit.gateway.engines import EngineDirectory
from llmkit.gateway.server import MAX_CONNECTIONS, SPARE_DESCRIPTORS, raise_descriptors

__all__ = ["EngineProcess", "serve"]

POLL_S = 0.5


class EngineProcess:
    """A model in a process of its own, apart from the gateway's Python. It ends when its standard input does, so it never outlives us."""

    def __init__(self, settings: ServeSettings) -> None:
        assert settings.model is not None
        command = [sys.executable, "-m", "llmkit", "engine", settings.model]
        for option in ENGINE_OPTIONS:
            value = getattr(settings, option)
            if value is not None and value is not False:
                command += [f"--{option.replace('_', '-')}" + ("" if value is True else f"={value}")]
        self.model = settings.model
        self._ready = False
        self._errors: deque[str] = deque(maxlen=20)
        # A session of its own: Ctrl-C reaches the whole process group, and only we may decide when the engine ends.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        threading.Thread(target=self._watch_output, daemon=True).start()
        self._error_reader = threading.Thread(target=self._watch_errors, daemon=True)
        self._error_reader.start()

    def _watch_output(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._ready = True
            print(line, end="", flush=True)

    def _watch_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._errors.append(line.rstrip())
            if self._ready or not line.startswith("llmkit: "):  # the reason why it could not load is said once, by `check`
                print(line, end="", file=sys.stderr, flush=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def loading(self) -> str | None:
        """A reason to wait, while the model is being loaded."""
        return f"The model {Path(self.model).name!r} is being loaded." if not self._ready and self._process.poll() is None else None

    def check(self) -> None:
        """Raises `ModelLoadError` when the process has ended."""
        if self._process.poll() is not None:
            self._error_reader.join(1)
            reason = "\n".join(self._errors).removeprefix("llmkit: ") or f"exit status {self._process.returncode}"
            raise ModelLoadError(f"the engine process of {self.model!r} has ended: {reason}" if self._ready else reason)

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def serve(settings: ServeSettings, *, attach_pid: int | None = None) -> int:
    """Serve until a signal. With ``attach_pid`` only that process's engines, and no longer than it lives.

    Raises `InvalidRequestError` (address, key) before anything is loaded, `ModelLoadError` when the model cannot be loaded.
    """
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    if attach_pid is not None and settings.model is not None:
        raise InvalidRequestError("name a model or --attach a process, not both.", "attach")
    raise_descriptors()
    keys = Keys(None if settings.api_key is None else settings.api_key.get_secret_value(), settings.host)
    return asyncio.run(_serve(settings, keys, attach_pid))


async def _drain(gateway: Gateway, at_once: asyncio.Event, most_s: float) -> None:
    """Let running requests finish for a while; a second signal ends it."""
    gateway.draining = True
    if gateway.num_running:
        print(f"llmkit: finishing {gateway.num_running} requests, {most_s:.0f} s at most (a second signal ends at once)", file=sys.stderr, flush=True)
    end = time.monotonic() + most_s
    while gateway.num_running and time.monotonic() < end and not at_once.is_set():
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await at_once.wait()


async def _serve(settings: ServeSettings, keys: Keys, attach_pid: int | None) -> int:
    started = process_start_time(attach_pid) if attach_pid is not None else None
    if attach_pid is not None and started is None:
        raise InvalidRequestError(f"there is no process {attach_pid} to attach to.", "attach")
    stop, at_once = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked_to_end() -> None:
        (at_once if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, asked_to_end)
    # The address first: a port that is taken must not cost a load.
    from tornado.netutil import bind_sockets

    sockets = bind_sockets(settings.port, settings.host)
    engine = EngineProcess(settings) if settings.model is not None else None
    pid = engine.pid if engine is not None else attach_pid
    directory = EngineDirectory(lambda c: pid is None or c.pid == pid, loading=lambda: engine.loading if engine is not None else None)
    gateway = Gateway(directory, strict=settings.strict)
    server = make_server(make_app(gateway, keys), min(MAX_CONNECTIONS, max(16, raise_descriptors() - SPARE_DESCRIPTORS)))
    try:
        server.add_sockets(sockets)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        print(f"llmkit gateway at http://{host}:{sockets[0].getsockname()[1]}/v1", flush=True)
        while not stop.is_set():
            if engine is not None:
                engine.check()
            if attach_pid is not None and process_start_time(attach_pid) != started:
                break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await stop.wait()
        if stop.is_set():
            server.stop()
            await _drain(gateway, at_once, settings.drain_s)
    finally:
        server.stop()
        directory.close()
        if engine is not None:
            engine.close()
        await server.close_all_connections()
    return 0
