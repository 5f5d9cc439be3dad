"""Files and piped text as parts of a question."""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from llmkit.errors import InvalidRequestError

__all__ = ["piped_text", "question_of", "read_text", "taken_apart"]

MAX_BYTES = 16 << 20  # more than any context holds
PATIENCE_S = 2.0
# @path or @"a path with spaces", at the beginning of a word; \@ is no path.
WORD = re.compile(r'(?<!\S)@(?:"([^"]+)"|(\S+))')
ESCAPED = re.compile(r"(?<!\S)\\@")
ENDINGS = ".,;:!?)]}'\""


def question_of(text: str, files: Sequence[tuple[str, str]], piped: str = "") -> str:
    """One message: the question, then the files with their names, then what was piped in.

    >>> question_of("Why?", [("a.py", "x = 1")])
    'Why?\\n\\na.py:\\n```\\nx = 1\\n```'
    """
    parts = [text] if text.strip() else []
    for name, content in files:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`{3,}", content)), default=0))
        parts.append(f"{name}:\n{fence}\n{content.rstrip()}\n{fence}")
    if piped.strip():
        parts.append(piped.rstrip())
    return "\n\n".join(parts)


def taken_apart(
    text: str,
    note: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] | None = None,
) -> tuple[str, list[tuple[str, str]]]:
    """A question without its ``@path`` words, and the files that these name.

    Words that name no file stay. ``warn`` hears of each file that is taken, by default ``note``.
    Raises `InvalidRequestError` for a file that cannot be read.
    """
    warn = warn or note
    files: list[tuple[str, str]] = []

    def take(match: re.Match[str]) -> str:
        word = match[1] or match[2]
        path = _file(word) or (_file(word.rstrip(ENDINGS)) if match[2] else None)
        if path is None:
            if match[1] or "/" in word or "." in word.rstrip(ENDINGS):
                note(f"there is no file {word:.100}; taken as it stands")
            return match[0]
        content = read_text(path)
        files.append((path.name, content))
        place = "" if path.parent == Path() else f" from {path.parent}"
        warn(f"with {path.name} ({len(content):,} characters){place}")
        return path.name + (word[len(word.rstrip(ENDINGS)) :] if match[2] else "")

    return ESCAPED.sub("@", WORD.sub(take, text)), files


def _file(word: str) -> Path | None:
    try:
        path = Path(word).expanduser()
        return path if word and path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return None


def read_text(path: Path) -> str:
    """A text file, or a pipe such as ``<(git diff)``. Raises `InvalidRequestError`."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequestError(f"{path} cannot be read: {reason}", "file") from None
    return _decoded(data, str(path))


def piped_text(note: Callable[[str], None]) -> str:
    """What is piped into this process; empty at a terminal. Raises `InvalidRequestError`."""
    stream = sys.stdin
    if stream is None or stream.closed:
        return ""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError):
        return _decoded(stream.read(MAX_BYTES + 1).encode(), "the input")  # a stand-in for one
    if stream.isatty() or not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return ""
    told = threading.Timer(PATIENCE_S, note, ["reading standard input (</dev/null if it has none)"])
    told.daemon = True
    told.start()
    try:
        return _decoded(stream.buffer.read(MAX_BYTES + 1), "standard input")
    finally:
        told.cancel()


def _decoded(data: bytes, name: str) -> str:
    if len(data) > MAX_BYTES:
        raise InvalidRequestError(f"{name} is longer than {MAX_BYTES >> 20} MiB.", "file")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InvalidRequestError(f"{name} is not UTF-8 text.", "file")
    return text.replace("\r\n", "\n")
