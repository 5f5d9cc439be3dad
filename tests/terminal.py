"""A program at a terminal of its own (pty), and an endpoint that says what a test wants."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fake_runner import FakeRunner
from fakes import FakeClient

from llmkit.bridge.server import BridgeServer

USAGE = {"prompt_tokens": 3, "completion_tokens": 4}
LLMKIT = [sys.executable, "-m", "llmkit"]


class Terminal:
    """``columns`` wide; ``text`` is all that was shown."""

    def __init__(self, *args: str, columns: int = 80, **environment: str) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = {**os.environ, "TERM": "xterm", "LC_ALL": "C.UTF-8", **environment}
        self.process = subprocess.Popen(
            [*LLMKIT, *args],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        self._fd = ours
        self._bytes = b""
        self._at = 0

    @property
    def text(self) -> str:
        return self._bytes.decode("utf-8", "replace")

    def _read(self, seconds: float) -> bool:
        if not select.select([self._fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the other end is closed
            data = b""
        self._bytes += data
        return bool(data)

    def expect(self, pattern: str, timeout: float = 30) -> re.Match[str]:
        """What comes after what was expected before."""
        end = time.monotonic() + timeout
        while True:
            found = re.compile(pattern, re.DOTALL).search(self.text, self._at)
            if found:
                self._at = found.end()
                return found
            assert time.monotonic() < end, f"no {pattern!r} in {self.text[self._at :]!r}"
            alive = self._read(0.2)
            assert alive or re.search(pattern, self.text[self._at :], re.DOTALL), (
                f"ended without {pattern!r}: {self.text[self._at :]!r}"
            )

    def send(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def interrupt(self) -> None:
        self.send("\x03")

    def ended(self, timeout: float = 30) -> int:
        """The exit status, once it has ended."""
        end = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < end, f"still running: {self.text[-500:]!r}"
            if not self._read(0.1):
                time.sleep(0.05)
        while self._read(0.5) and time.monotonic() < end:
            pass  # what it said last may come after its end
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self._fd)


def chunk(text: str = "", *, reasoning: str = "", finish: str | None = None, **more: Any) -> str:
    """An event of a chat's stream."""
    delta = {"content": text} if text else {}
    delta |= {"reasoning_content": reasoning} if reasoning else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


def said(*pieces: str, reasoning: str = "") -> list[str]:
    """The events of one answer."""
    return [
        *([chunk(reasoning=reasoning)] if reasoning else []),
        *(chunk(piece) for piece in pieces),
        chunk(finish="stop"),
        f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n",
        "data: [DONE]\n\n",
    ]


class Script:
    """An OpenAI endpoint: ``answers`` are taken in turn, the last one again and again.

    An answer is a list of events, a (status, headers, body), or a function that gets ``write``.
    ``asked`` has the bodies of the chats, ``heads`` the headers of all requests.
    """

    def __init__(self, *answers: Any, models: list[dict[str, Any]] | None = None) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.heads: list[tuple[str, str, dict[str, str]]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None: ...

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # the client has left
                    super().handle()

            def do_GET(self) -> None:
                self._note()
                listed = models if models is not None else [{"id": "m", "owned_by": "them"}]
                self._whole(200, {}, json.dumps({"data": listed}).encode())

            def do_POST(self) -> None:
                self._note()
                size = int(self.headers.get("content-length") or 0)
                script.asked.append(json.loads(self.rfile.read(size)))
                answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
                if isinstance(answer, tuple):
                    self._whole(*answer)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                if callable(answer):
                    answer(self._write)
                else:
                    for event in answer:
                        self._write(event)

            def _note(self) -> None:
                head = {k.lower(): v for k, v in self.headers.items()}
                script.heads.append((self.command, self.path, head))

            def _write(self, text: str) -> None:
                self.wfile.write(text.encode("utf-8", "surrogatepass"))
                self.wfile.flush()

            def _whole(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def forever(stop: threading.Event) -> Callable[[Callable[[str], None]], None]:
    """An answer that does not end until its reader leaves."""

    def answer(write: Callable[[str], None]) -> None:
        try:
            for i in range(100_000):
                write(chunk(f"word{i} "))
                time.sleep(0.02)
        finally:
            stop.set()

    return answer


Done = subprocess.CompletedProcess[str]


def chat(*args: str, text: str | None = None, command: str = "chat", **environment: str) -> Done:
    """`llmkit chat` without a terminal; ``text`` is piped in."""
    return subprocess.run(
        [*LLMKIT, command, *args],
        input=text,
        stdin=subprocess.DEVNULL if text is None else None,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@contextlib.contextmanager
def shared_model(name: str) -> Iterator[FakeClient]:
    """A model of this user, in another process than the command's: this one."""
    client = FakeClient(name, FakeRunner(n_ctx=4000))
    bridge = BridgeServer(client)
    try:
        yield client
    finally:
        bridge.close()
        client.close()


@contextlib.contextmanager
def terminal(*args: str, **more: Any) -> Iterator[Terminal]:
    shown = Terminal(*args, **more)
    try:
        yield shown
    finally:
        shown.close()
