"""How the command speaks: to a terminal, or to a file or pipe, which gets no escape codes.

A model's text is hostile to a terminal: control characters could write elsewhere on the screen,
or into the clipboard. They are left out there; a file or pipe gets the text as it is.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

__all__ = ["Screen", "read_line", "sendable", "stripped"]

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CONTROLS = {c: None for c in (*range(32), *range(127, 160)) if c not in (9, 10)}
STOP = "\x03"
READLINE = (
    "set enable-bracketed-paste on",
    # Ctrl-C empties the line, and ends it as a line of its own.
    r'"\C-c": "\C-a\C-k\C-v\C-c\C-m"',
)


def stripped(text: str) -> str:
    """Text without control characters, but for tabs and newlines.

    >>> stripped("a\\x1b]0;title\\x07b")
    'a]0;titleb'
    """
    return text.translate(CONTROLS)


class Screen:
    """Writes answers to standard output and notes to standard error.

    ``is_terminal``: a person reads the answers. ``styled``: escape codes may be used.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self.styled = (
            self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        )
        self._notes = sys.stderr.isatty()
        self._dimmed = False
        self._column_0 = True
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, ValueError, OSError):
                # A terminal that knows only ASCII gets question marks, not an exception.
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]

    def text(self, text: str) -> None:
        """A piece of an answer."""
        self._dim(False)
        self._write(text)

    def thought(self, text: str) -> None:
        """A piece of reasoning; only people see it."""
        if self.is_terminal:
            if not self._dimmed and not self.styled:
                self._write("(thinking) ")
            self._dim(True)
            self._write(text)

    def end(self) -> None:
        """End the answer's last line."""
        self._dim(False)
        if not self._column_0:
            self._write("\n")

    def note(self, text: str) -> None:
        """Something about what happens; on standard error, and only for people."""
        if self._notes:
            self.warn(text)

    def warn(self, text: str) -> None:
        """Something that also matters to whoever reads a log."""
        sys.stdout.flush()
        styled = self._notes and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        before, after = (DIM, PLAIN) if styled else ("", "")
        _print(f"{before}{stripped(text)}{after}\n", sys.stderr)

    def _dim(self, on: bool) -> None:
        if on == self._dimmed:
            return
        if self._dimmed:
            self._write("\n")
        if self.styled:
            _print(DIM if on else PLAIN, sys.stdout)
        self._dimmed = on

    def _write(self, text: str) -> None:
        if self.is_terminal:
            text = stripped(text)
        if text:
            self._column_0 = text.endswith("\n")
            _print(text, sys.stdout)


def _print(text: str, stream: TextIO) -> None:
    stream.write(text)
    stream.flush()


def read_line(prompt: str) -> str:
    """A line that a person types, with history and editing where Python has them.

    A pasted text stays one line, with its newlines. Raises `EOFError` and `KeyboardInterrupt`.
    """
    try:
        import readline
    except ImportError:  # Windows
        return sendable(input(prompt))
    if "libedit" in (readline.__doc__ or ""):
        return sendable(input(prompt))
    for setting in READLINE:
        readline.parse_and_bind(setting)
    readline.set_auto_history(False)
    with _ctrl_c_as_a_key():
        line = input(prompt)
    if STOP in line:
        raise KeyboardInterrupt
    if line.strip():
        readline.add_history(line)
    return sendable(line)


def sendable(text: str) -> str:
    """Text that was typed or an argument; what is not UTF-8 in it becomes question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


@contextlib.contextmanager
def _ctrl_c_as_a_key() -> Iterator[None]:
    """No signal for Ctrl-C while a line is typed.

    Python's readline notices a signal only while it waits: one that comes just before would take
    effect after the next line, and discard that.
    """
    import termios

    descriptor = sys.stdin.fileno()
    try:
        before = termios.tcgetattr(descriptor)
        during = termios.tcgetattr(descriptor)
        during[6][termios.VINTR] = os.fpathconf(descriptor, "PC_VDISABLE").to_bytes(1, "little")
        termios.tcsetattr(descriptor, termios.TCSADRAIN, during)
    except (termios.error, OSError, ValueError, OverflowError):
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
