"""Conversations with memory: `llm.session()`.

The engine caches the computed prefixes; a session holds only the messages.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.chat.parsers.events import Content, Event, Reasoning
from llmkit.chat.reading import AnswerReader
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Completion, Delta, FinishReason, Message, SamplingParams
from llmkit.protocol.stream import Stream
from llmkit.sessions.messages import NOTHING, as_messages, from_json, to_json, with_media
from llmkit.sessions.pruning import shortened
from llmkit.sessions.running import SHAPES, Interrupted, is_constrained, make_request
from llmkit.system.waiting import deferred

if TYPE_CHECKING:
    from llmkit.sessions.conversation import Reply, Transcript

__all__ = ["Session"]

FORMAT = "llmkit-session"
Submit = Callable[[Sequence[Message], dict[str, Any], Mapping[str, bytes]], Stream]
Count = Callable[[Sequence[Message], Mapping[str, bytes]], int]
# Options restored from a file: sampling only; a file must not choose the caller or the adapters.
SAVED = {f.name for f in fields(SamplingParams)}


class Session:
    """A conversation over several turns.

    ``say(text)`` adds a message and its answer; ``stream(text)`` yields the answer piece by piece.
    ``messages`` is the whole conversation, ``files`` has its pictures and sounds by digest.
    ``fork()`` branches it, ``undo()`` removes the last
    turn, ``trim()`` drops the oldest turns, ``save(path)`` and ``llm.session(path=...)`` save and
    restore it. One of ``llm.session(id=...)`` is in the database, turn by turn.

    An interrupted answer is kept as far as it got; a failed request changes nothing.
    """

    def __init__(
        self,
        submit: Submit,
        count: Count,
        reader: Callable[[bool], AnswerReader],
        n_ctx: int,
        messages: Sequence[Message] = (),
        *,
        transcript: Transcript | None = None,
        files: dict[str, bytes] | None = None,
        **sampling: Any,
    ) -> None:
        self.files = {} if files is None else files
        self._submit, self._count, self._reader, self._n_ctx = submit, count, reader, n_ctx
        self._transcript = transcript
        self.sampling = sampling
        self.messages = list(messages)

    @property
    def messages(self) -> list[Message]:
        """The whole conversation; may be assigned, from dicts too."""
        return self._messages

    @messages.setter
    def messages(self, messages: Sequence[Message | dict[str, Any]]) -> None:
        self._messages = list(as_messages(messages, self.files)) if messages else []

    @classmethod
    def open(
        cls,
        submit: Submit,
        count: Count,
        reader: Callable[[bool], AnswerReader],
        n_ctx: int,
        system: str | None,
        path: str | Path | None,
        sampling: dict[str, Any],
        transcript: Transcript | None = None,
    ) -> Session:
        """A new conversation, a saved one, or one of the database."""
        files: dict[str, bytes] = {}
        messages, kept = cls.read(path, files) if path is not None else ([], {})
        if transcript is not None:
            messages, kept = transcript.messages, checked(transcript.conversation.settings)
            files = transcript.files
        if system is not None:
            messages = [Message("system", system), *(m for m in messages if m.role != "system")]
        options = {**kept, **sampling}
        return cls(
            submit, count, reader, n_ctx, messages, transcript=transcript, files=files, **options
        )

    @property
    def id(self) -> str | None:
        """Its id in the database, if it is there."""
        return None if self._transcript is None else self._transcript.id

    def commit(self) -> None:
        """Write ``messages`` to the database as they are now; turns are written by themselves.

        What was there before stays as another branch.
        """
        if self._transcript is not None:
            self._transcript.keep(self.messages)

    def say(self, text: str, *, images: Any = (), sounds: Any = (), **sampling: Any) -> Completion:
        """Send a message and wait for the answer. ■ stops it; the partial answer stays.

        ``images`` and ``sounds`` go with it, as with `LLM.chat`.
        """
        return self._wait(self.stream(text, images=images, sounds=sounds, **sampling))

    @staticmethod
    def _wait(turn: Turn) -> Completion:
        try:
            for _ in turn:
                pass
        except KeyboardInterrupt:
            raise Interrupted("stopped; the answer so far is in the session") from None
        return turn.completion

    def stream(self, text: str, *, images: Any = (), sounds: Any = (), **sampling: Any) -> Turn:
        """Send a message; the answer piece by piece. Leaving the loop ends the answer there.

        The turn begins with the first piece that is read; one that nobody reads leaves nothing.
        """
        if not isinstance(text, str) or not text.strip():
            raise InvalidRequestError("the message must be a non-empty text.", "text")
        said = with_media([Message("user", text)], self.files, images, sounds)
        return self._turn(list(said), sampling)

    def regenerate(self, **sampling: Any) -> Completion:
        """Another answer to the last message."""
        previous = self.messages[:]
        question = next((m for m in reversed(previous) if m.role == "user"), None)
        if question is None:
            raise InvalidRequestError("the conversation has no message yet.", "messages")
        self._forget_turn()
        before = len(self.messages)
        try:
            return self._wait(self._turn([question], sampling))
        except BaseException:
            if len(self.messages) == before or not self.messages[-1].text:
                self.messages = previous
                self.commit()
            raise

    def _turn(self, new: list[Message], sampling: dict[str, Any]) -> Turn:
        stream = self._submit([*self.messages, *new], {**self.sampling, **sampling}, self.files)
        kept = self._transcript

        def keep(done: Completion, reply: Reply | None) -> None:
            answer = Message("assistant", done.text, reasoning_content=done.reasoning or None)
            self.messages.extend([*new, answer])
            if reply is not None:
                from llmkit.store.conversation_records import usage_of

                reply.end(answer, done.finish_reason.value, usage_of(done))

        constrained = is_constrained({**self.sampling, **sampling})
        begin = None if kept is None else lambda: kept.begin(self.messages, new)
        return Turn(stream, self._reader(constrained), keep, begin)

    @property
    def num_turns(self) -> int:
        """The number of user messages so far."""
        return sum(m.role == "user" for m in self.messages)

    @property
    def num_tokens(self) -> int:
        """Tokens of the conversation so far."""
        return self._count(self.messages, self.files) if self.messages else 0

    def fork(self, *, stored: bool = True) -> Session:
        """A copy to continue differently; the shared prefix is computed once.

        That of a conversation in the database is there as well, unless ``stored`` is False.
        """
        kept = self._transcript if stored else None
        copy = None if kept is None else kept.fork(self.messages)
        return Session(
            self._submit,
            self._count,
            self._reader,
            self._n_ctx,
            self.messages,
            transcript=copy,
            files=self.files,
            **self.sampling,
        )

    def undo(self) -> None:
        """Remove the last turn: the message and its answer."""
        self._forget_turn()
        self.commit()

    def _forget_turn(self) -> None:
        place = next(
            (i for i in range(len(self.messages) - 1, -1, -1) if self.messages[i].role == "user"),
            None,
        )
        if place is not None:
            del self.messages[place:]

    def trim(self, max_tokens: int | None = None) -> int:
        """Drop the oldest turns until at most ``max_tokens`` remain (default: half the context).

        System messages and the latest turn stay. Returns the number of dropped turns.
        """
        limit = self._n_ctx // 2 if max_tokens is None else max_tokens
        before = self.num_turns
        self.messages = list(
            shortened(self.messages, lambda each: self._count(each, self.files), limit)
        )
        if self.num_turns < before:
            self.commit()
        return before - self.num_turns

    def save(self, path: str | Path) -> Path:
        """Write the conversation as JSON; an existing file is replaced atomically."""
        return self.write(path, self.messages, self.sampling, self.files)

    @staticmethod
    def write(
        path: str | Path,
        messages: Sequence[Message],
        sampling: dict[str, Any],
        files: Mapping[str, bytes] = NOTHING,
    ) -> Path:
        """Write any conversation as `save` does."""
        path = Path(path)
        data = {
            "format": FORMAT,
            "version": 1,
            "sampling": sampling,
            "messages": [to_json(m, files) for m in messages],
        }
        try:
            text = json.dumps(data, indent=1, ensure_ascii=False)
        except TypeError as error:
            raise InvalidRequestError(
                f"the session's options cannot be saved: {error}", "sampling"
            ) from None
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        return path

    @staticmethod
    def read(
        path: str | Path, files: dict[str, bytes] | None = None
    ) -> tuple[list[Message], dict[str, Any]]:
        """Messages and options of a saved conversation; its ``files`` are added.

        Raises `InvalidRequestError` if invalid.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["version"] != 1:
                raise ValueError("unknown format or version")
            files = {} if files is None else files
            messages = [from_json(m, files) for m in data["messages"]]
            sampling = dict(data["sampling"])
            if not all(isinstance(m.role, str) for m in messages):
                raise ValueError("a message without a role")
            return messages, checked(sampling)
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError, InvalidRequestError) as error:
            raise InvalidRequestError(
                f"{Path(path).name} is not a saved session: {error}", "path"
            ) from None

    def __len__(self) -> int:
        return len(self.messages)

    def __repr__(self) -> str:
        return "\n".join(f"{m.role}: {m.text}" for m in self.messages) or "Session(no messages yet)"


def checked(sampling: dict[str, Any]) -> dict[str, Any]:
    """Options of a saved conversation. Reports invalid ones now, not at the first answer."""
    options = {k: v for k, v in sampling.items() if k in SAVED or k in SHAPES}
    make_request(options, prompt="")
    return options


class Turn:
    """The answer of a turn as it arrives: an iterable of text.

    When it ends, or the loop is left, the answer is added to the conversation.
    """

    def __init__(
        self,
        stream: Stream,
        reader: AnswerReader,
        keep: Callable[[Completion, Reply | None], None],
        begin: Callable[[], Reply] | None = None,
    ) -> None:
        """``begin`` writes down that the answer is coming; ``keep`` gets what it returned."""
        self._stream, self._reader, self._keep, self._begin = stream, reader, keep, begin
        self._reply: Reply | None = None
        self._is_begun = self._kept = self._is_read = False
        self.text = ""  # so far
        self.reasoning = ""  # so far; not in the text

    def __iter__(self) -> Iterator[str]:
        with contextlib.closing(self.events()) as events:
            yield from (event.text for event in events if isinstance(event, Content))

    def events(self) -> Generator[Content | Reasoning, None, None]:
        """The answer as it arrives, with the reasoning before it."""
        failed = False
        try:
            self._start()
            for piece in self._stream:
                yield from self._take(self._reader.read([Delta(piece, 0)]))
                if self._reply is not None:
                    self._reply.update(self.text, self.reasoning)
            yield from self._take(self._reader.end(self.completion)[0])
            self._is_read = True
        except Exception:
            failed = True
            raise
        finally:
            with deferred():  # a reply that is not ended here is in the way of the next turn
                self._stream.close()
                if not failed:
                    self._finish()
                elif self._reply is not None and not self._kept:
                    self._kept = True
                    self._reply.fail(self.text, self.reasoning)

    def _start(self) -> None:
        if self._is_begun or self._kept:
            return
        if self._begin is None:
            self._is_begun = True
            return
        with deferred():
            self._reply = self._begin()
            self._is_begun = True

    def _take(self, events: list[Event]) -> Iterator[Content | Reasoning]:
        for event in events:
            if isinstance(event, Content):
                self.text += event.text
                yield event
            elif isinstance(event, Reasoning):
                self.reasoning += event.text
                yield event

    def stop(self) -> None:
        """End the answer, from any thread; its reader's loop then ends."""
        self._stream.close()

    def close(self) -> None:
        """End the answer here."""
        self._stream.close()
        self._finish()

    def _finish(self) -> None:
        if not self._kept:
            self._kept = True
            done = self.completion  # the engine may have been ahead of a reader who left
            if not self._is_read:
                done = replace(done, finish_reason=FinishReason.ABORT)
            if self._is_begun:
                self._keep(done, self._reply)

    @property
    def completion(self) -> Completion:
        """The completion so far."""
        result = self._stream.channel.result or Completion(
            "", FinishReason.ABORT, request_id=self._stream.request_id
        )
        return replace(result, text=self.text, reasoning=self.reasoning)
