"""The conversation of `llmkit chat` at a terminal: lines, commands, answers that Ctrl-C stops."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from llmkit.chat.parsers.events import Content
from llmkit.cli.attachments import question_of, taken_apart
from llmkit.cli.partners import Partner, Summary
from llmkit.cli.terminal import Screen, read_line
from llmkit.errors import ContextLengthError, InvalidRequestError, LLMKitError
from llmkit.protocol import Message

__all__ = ["Chat", "answer_once"]

HELP = '''\
/system [TEXT]  show the system message, or replace it (/system - removes it)
/clear          begin anew; the system message stays
/undo           take the last question and its answer back
/save FILE      keep the conversation; llm.session(path=FILE) and /load go on with it
/load FILE      go on with a saved conversation
/exit           end, as does Ctrl-D; Ctrl-C stops an answer
@path           in a question: the text of that file (@"a b.txt" with spaces; \\@ is no path)
"""             begins a text of several lines, and ends it
Start a line with a space to send it as a question.'''
QUOTES = '"""'
COMMAND = re.compile(r"/([a-z?]+)(?:\s+(.*))?", re.DOTALL)


def answer_once(
    partner: Partner, question: str, screen: Screen, images: Sequence[Path] = ()
) -> Summary:
    """One answer, piece by piece; what there was of it stays where Ctrl-C stops it."""
    try:
        with closing(partner.answer(question, images)) as events:
            for event in events:
                (screen.text if isinstance(event, Content) else screen.thought)(event.text)
    finally:
        screen.end()
    return partner.last


def told(summary: Summary) -> str:
    """The line under an answer."""
    count = f"{summary.completion_tokens} tokens"
    if summary.tokens_per_s is not None:
        count += f", {summary.tokens_per_s:.1f} tokens/s"
    if summary.finish_reason in ("length", "repetition"):
        count += f", cut short: {summary.finish_reason}"
    return f"({count})"


class Chat:
    """Reads lines until ``/exit`` or Ctrl-D. Without ``paths``, ``@path`` is text as any other."""

    def __init__(
        self,
        partner: Partner,
        screen: Screen,
        read: Callable[[str], str] = read_line,
        *,
        paths: bool = True,
    ) -> None:
        self._partner, self._screen, self._read = partner, screen, read
        self._paths = paths
        self._ended = False
        self._commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "clear": self._clear,
            "undo": self._undo,
            "system": self._system,
            "save": self._save,
            "load": self._load,
            "exit": self._exit,
            "quit": self._exit,
            "bye": self._exit,
            "?": self._help,
        }

    def run(self) -> int:
        self._screen.note(f"{self._partner.name}. /help lists what you can do; Ctrl-D ends.")
        if count := sum(m.role == "user" for m in self._partner.messages):
            self._screen.note(f"a conversation of {count} questions so far")
        while not self._ended:
            # Ctrl-C may come at any place, and more than once.
            with contextlib.suppress(KeyboardInterrupt):
                self._turn()
        return 0

    def _turn(self) -> None:
        try:
            line, is_typed = self._next()
        except EOFError:
            self._ended = True
            print()
            return
        except KeyboardInterrupt:
            print()
            self._screen.note("Ctrl-D or /exit ends.")
            return
        try:
            self._take(line, is_typed)
        except KeyboardInterrupt:
            self._screen.note("(stopped)")
        except BrokenPipeError:
            raise
        except (LLMKitError, OSError) as error:
            self._complain(error)

    def _next(self) -> tuple[str, bool]:
        """A line, and whether it was typed; or the lines between two marks."""
        text = self._read(">>> ")
        head, mark, rest = text.partition(QUOTES)
        if not mark or head.strip() not in ("", "/system"):
            return text, "\n" not in text  # a pasted text comes in one
        while QUOTES not in rest:
            rest += "\n" + self._read("... ")
        body, _, after = rest.partition(QUOTES)
        return f"{head}{body}{after}", bool(head.strip())

    def _take(self, line: str, is_typed: bool) -> None:
        """A command, or a question. What was not typed holds neither commands nor paths."""
        if not line.strip():
            return
        command = COMMAND.fullmatch(line.rstrip()) if is_typed else None
        if command:
            self._command(command[1], (command[2] or "").strip())
            return
        text, files = line.strip(), list[tuple[str, str]]()
        if is_typed and self._paths:
            text, files = taken_apart(text, self._screen.note)
        self._screen.note(told(answer_once(self._partner, question_of(text, files), self._screen)))

    def _command(self, name: str, rest: str) -> None:
        run = self._commands.get(name)
        if run is None:
            near = difflib.get_close_matches(name, self._commands, n=1)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise InvalidRequestError(
                f"there is no command /{name}; {hint} (a space in front makes it a question)"
            )
        run(rest)

    def _complain(self, error: Exception) -> None:
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
        too_long = isinstance(error, ContextLengthError) or (
            getattr(error, "code", None) == "context_length_exceeded"
        )
        if too_long and self._partner.messages:
            text += " In this conversation: /clear or /undo makes room."
        self._screen.warn(f"llmkit: {text}")

    def _help(self, _: str) -> None:
        print(HELP)

    def _exit(self, _: str) -> None:
        self._ended = True

    def _clear(self, _: str) -> None:
        self._partner.messages = [m for m in self._partner.messages if m.role == "system"]
        self._screen.note("a new conversation")

    def _undo(self, _: str) -> None:
        messages = self._partner.messages
        places = [i for i, m in enumerate(messages) if m.role == "user"]
        if not places:
            raise InvalidRequestError("there is nothing to take back.")
        self._partner.messages = messages[: places[-1]]
        self._screen.note(f"taken back: {messages[places[-1]].text:.60}")

    def _system(self, text: str) -> None:
        others = [m for m in self._partner.messages if m.role != "system"]
        if not text:
            said = [m.text for m in self._partner.messages if m.role == "system"]
            print("\n".join(said) or "no system message; /system TEXT sets one")
            return
        if text == "-":
            self._partner.messages = others
            self._screen.note("no system message")
            return
        self._partner.messages = [Message("system", text), *others]
        self._screen.note("the system message is set")

    def _save(self, name: str) -> None:
        from llmkit.sessions.session import Session

        path = _path(name, "/save FILE")
        if path.exists():
            try:
                Session.read(path)
            except InvalidRequestError:
                raise InvalidRequestError(
                    f"{path} exists and is no saved conversation; give another name."
                ) from None
        Session.write(path, self._partner.messages, {})
        self._screen.note(f"saved: {path}")

    def _load(self, name: str) -> None:
        from llmkit.sessions.session import Session

        messages, _ = Session.read(_path(name, "/load FILE"))
        self._partner.messages = messages
        count = sum(m.role == "user" for m in messages)
        self._screen.note(f"a conversation of {count} questions")


def _path(name: str, usage: str) -> Path:
    name = name.strip().strip('"')
    if not name or "\0" in name:
        raise InvalidRequestError(f"{usage}: name a file.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise InvalidRequestError(f"{name}: {error}") from None
