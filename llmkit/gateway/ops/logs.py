"""The log of a gateway that runs alone: one line a record, as text or JSON, and the access log.

A thread writes the lines. A standard error that is broken, full or not read loses lines, which the
next line that gets through says, and never holds up a request. Lines belong to requests by
`llmkit.gateway.record`. Prompts, answers and keys are not logged.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llmkit.gateway import record
from llmkit.gateway.exchange import Exchange
from llmkit.gateway.ops.after import after
from llmkit.gateway.ops.health import is_quiet
from llmkit.gateway.pipeline import Observer
from llmkit.system.text import printable

__all__ = ["LogHandler", "access_log", "log_to", "note_access", "set_level"]

access = logging.getLogger("llmkit.access")

MAX_WAITING = 8 << 20  # characters that wait to be written
MAX_MESSAGE, MAX_TRACEBACK = 8_000, 32_000
# They log addresses of requests, which may hold what opens a download.
TALKATIVE = ("httpx", "httpx2", "httpcore", "httpcore2", "urllib3", "huggingface_hub")
LINGER_S = 0.05  # after writing: many lines at once wake the thread but once
END_S = 1.0
WORD = re.compile(r'[^\s"=]+')


class TextFormatter(logging.Formatter):
    """``time LEVEL logger: message key=value``; the lines of a traceback begin with a bar."""

    def format(self, entry: logging.LogRecord) -> str:
        now = _clock(int(entry.created), "%Y-%m-%d %H:%M:%S", utc=False)
        fields = " ".join(f"{name}={_word(value)}" for name, value in _fields(entry).items())
        line = (
            f"{now}.{int(entry.msecs):03d} {entry.levelname:<7} {entry.name}: "
            f"{printable(_message(entry))}{' ' * bool(fields)}{fields}"
        )
        lines = _traceback(self, entry).splitlines()
        return "\n".join([line, *(f"  | {printable(text)}" for text in lines)])


class JsonFormatter(logging.Formatter):
    """One JSON object a line, of ASCII characters."""

    def format(self, entry: logging.LogRecord) -> str:
        seconds = _clock(int(entry.created), "%Y-%m-%dT%H:%M:%S", utc=True)
        value: dict[str, Any] = {
            "time": f"{seconds}.{int(entry.msecs):03d}Z",
            "level": entry.levelname.lower(),
            "logger": entry.name,
            "message": _message(entry),
            **_fields(entry),
        }
        trace = _traceback(self, entry)
        if trace:
            value["exception"] = trace
        return _json(value)


_json = json.JSONEncoder(default=str).encode
FORMATTERS: dict[str, type[logging.Formatter]] = {"pretty": TextFormatter, "json": JsonFormatter}


@lru_cache(2)
def _clock(seconds: int, form: str, *, utc: bool) -> str:
    return time.strftime(form, time.gmtime(seconds) if utc else time.localtime(seconds))


def _message(entry: logging.LogRecord) -> str:
    try:
        text = entry.getMessage()
    except Exception:  # arguments that do not fit the message are no reason to lose it
        text = str(entry.msg)
    text = text.removesuffix("\n")  # of a warning
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} [...]"


def _fields(entry: logging.LogRecord) -> dict[str, Any]:
    """What a record says beside its message; its request, if it belongs to one."""
    fields: dict[str, Any] = getattr(entry, "fields", {})
    request = record.current()
    if request is not None and request.request_id:
        fields = {"request_id": request.request_id, **fields}
    return fields


def _traceback(formatter: logging.Formatter, entry: logging.LogRecord) -> str:
    text = formatter.formatException(entry.exc_info) if entry.exc_info else entry.exc_text or ""
    return text if len(text) <= MAX_TRACEBACK else f"[...] {text[-MAX_TRACEBACK:]}"


def _word(value: object) -> str:
    """A value of a field, in quotes where it could be taken for several."""
    text = printable(str(value))
    return text if WORD.fullmatch(text) else json.dumps(text)


class LogHandler(logging.Handler):
    """Hands lines to a thread, which calls ``write`` with them.

    At most ``most`` characters wait; further lines are lost, and counted.
    """

    def __init__(
        self,
        write: Callable[[bytes], None],
        formatter: logging.Formatter,
        most: int = MAX_WAITING,
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._write, self._most = write, most
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        # Each is changed by one thread at a time: the first two under the handler's own lock.
        self._put = self._dropped = self._taken = self._failed = self._said = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="llmkit-log", daemon=True)
        self._thread.start()

    @property
    def num_lost(self) -> int:
        """Lines that were never written."""
        return self._dropped + self._failed

    def emit(self, entry: logging.LogRecord) -> None:
        try:
            line = self.format(entry)
        except Exception as error:
            line = f"a record of the log could not be written: {error!r:.200}"
        if self._put - self._taken + len(line) > self._most:
            self._dropped += 1
            return
        self._put += len(line)
        self._lines.put(line)

    def close(self) -> None:
        """Write what waits, for a second at most."""
        if self._thread.is_alive():
            self._end.set()
            self._lines.put(None)
            self._thread.join(END_S)
        super().close()

    def _run(self) -> None:
        ended = False
        while not ended:
            self._end.wait(LINGER_S)
            lines = [self._lines.get()]
            with contextlib.suppress(queue.Empty):
                while len(lines) < 256:
                    lines.append(self._lines.get_nowait())
            ended = None in lines
            self._write_lines([line for line in lines if line is not None])

    def _write_lines(self, lines: list[str]) -> None:
        lost = self.num_lost
        said = [self.format(_lost(lost - self._said))] if lost > self._said else []
        if not (lines or said):
            return
        try:
            self._write("".join(f"{x}\n" for x in (*said, *lines)).encode("utf-8", "replace"))
            self._said = lost
        except (OSError, ValueError):
            self._failed += len(lines)
        self._taken += sum(map(len, lines))


def _lost(number: int) -> logging.LogRecord:
    text = "%d lines of the log were lost: it could not be written, or not fast enough"
    return logging.LogRecord("llmkit.log", logging.WARNING, __file__, 0, text, (number,), None)


def _to_descriptor(descriptor: int) -> Callable[[bytes], None]:
    """Writes all of the data, also where the system takes a part at a time."""

    def write(data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:  # somebody made it non-blocking
                time.sleep(0.05)

    return write


class PrintedLines(io.TextIOBase):
    """In place of standard error: each line that is printed becomes a record of its own."""

    def __init__(self, handler: LogHandler) -> None:
        self._handler = handler
        self._lock = threading.RLock()  # what a signal runs may print as well
        self._begun = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 2

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            if len(self._begun) > MAX_MESSAGE:
                lines, self._begun = [*lines, self._begun], ""
        for line in lines:
            if line.strip():  # whatever the level: it was printed to be seen
                self._handler.handle(
                    logging.LogRecord("stderr", logging.INFO, "", 0, line.rstrip("\r"), None, None)
                )
        return len(text)


def log_to(
    form: str = "pretty", level: str = "info", *, write: Callable[[bytes], None] | None = None
) -> LogHandler:
    """Send what is logged to standard error, as "pretty" or "json"; also uncaught errors.

    Replaces the handlers of the root logger. Returns the new one. With "json", what is printed to
    standard error becomes JSON too: whoever reads it need not tell two kinds of lines apart.
    """
    if write is None:
        # Where there was none at the start, the number may be another file's by now.
        write = _to_descriptor(2) if sys.stderr is not None else lambda _: None
    handler = LogHandler(write, FORMATTERS[form]())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    if form == "json":
        sys.stderr = PrintedLines(handler)
    set_level(level)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught
    threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)
    atexit.register(handler.close)
    return handler


def set_level(level: str) -> None:
    """Change how much is logged, now."""
    logging.getLogger().setLevel(level.upper())


def _uncaught(kind: Any, error: Any, trace: Any) -> None:
    if kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logging.getLogger("llmkit").critical("uncaught error", exc_info=(kind, error, trace))


def access_log() -> Observer:
    """Logs every request once it has ended, to the logger ``llmkit.access``."""
    return after(note_access)


def note_access(exchange: Exchange) -> None:
    """Log a request that has ended."""
    kept = exchange.record
    level = (
        logging.WARNING
        if kept.status >= 500
        else logging.DEBUG
        if is_quiet(exchange.path)
        else logging.INFO
    )
    if not access.isEnabledFor(level):
        return
    where = exchange.route or f"{exchange.path:.200}"
    fields: dict[str, Any] = {
        "method": exchange.method,
        "route": where,
        "status": kept.status,
        "identity": exchange.identity.name if kept.status != 401 else None,
        "address": exchange.address,
        "total_ms": _ms(time.monotonic() - kept.started_at),
        "error": kept.error or None,
        "cache": kept.cache or None,
        "model": kept.model or None,
    }
    if kept.operation:
        usage, times = kept.usage, kept.metrics
        fields |= {
            "operation": kept.operation,
            "stream": exchange.streaming,
            "queue_ms": _ms(max(t.queue_s for t in times)) if times else None,
            "ttft_ms": None
            if kept.first_token_at is None
            else _ms(kept.first_token_at - kept.started_at),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
    # Made here: `Logger.log` would look for the caller's line, which is always this one.
    text = f"{exchange.method} {where} {kept.status}"
    entry = logging.LogRecord(access.name, level, "", 0, text, None, None)
    entry.fields = {name: value for name, value in fields.items() if value is not None}
    access.handle(entry)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
