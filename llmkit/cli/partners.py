"""Whom `llmkit chat` talks to: a model of this machine, or any endpoint; one conversation each."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from llmkit.chat.parsers.events import Content, Reasoning
from llmkit.cli.endpoint import Endpoint, EndpointError, checked, events_of
from llmkit.errors import InvalidRequestError
from llmkit.protocol import Message
from llmkit.sessions.messages import to_json, with_media
from llmkit.system.waiting import deferred

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.llm import LLM
    from llmkit.sessions.conversation import Transcript

__all__ = ["LocalPartner", "Partner", "RemotePartner", "Summary", "Told"]

Told = Content | Reasoning


@dataclass(slots=True)
class Summary:
    """What one answer was; times in seconds, ``decode_s`` from the first token to the last."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    decode_s: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        steps = self.completion_tokens - 1
        return steps / self.decode_s if steps > 0 and self.decode_s > 0 else None

    @property
    def usage(self) -> dict[str, Any]:
        """What is kept of it with a stored answer."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 2),
        }


class Partner(Protocol):
    """A conversation. ``messages`` may be changed between answers."""

    name: str
    messages: list[Message]
    last: Summary

    def answer(self, text: str, images: Sequence[Path] = ()) -> Generator[Told, None, None]:
        """Say something, with pictures; the answer as it arrives.

        Both are added to ``messages`` at its end, or where the loop is left; a failed answer
        changes nothing. ``last`` tells about it.
        """
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class LocalPartner:
    """A model that is loaded here or attached. ``sampling`` are keywords of `LLM.chat`."""

    def __init__(self, llm: LLM, sampling: Mapping[str, Any], session: str = "") -> None:
        """``session``: the id or name of a conversation that is kept; without, it is not."""
        if llm.model.use != "generate":
            llm.unload()
            raise InvalidRequestError(
                f"{llm.name!r} is for embeddings, speech or images; it cannot chat.", "model"
            )
        self.name, self._llm = llm.name, llm
        self.last = Summary()
        try:
            self._session = llm.session(id=session or None, **sampling)
        except BaseException:
            llm.unload()
            raise

    @property
    def messages(self) -> list[Message]:
        return self._session.messages

    @messages.setter
    def messages(self, messages: list[Message]) -> None:
        self._session.messages = messages
        self._session.commit()

    def answer(self, text: str, images: Sequence[Path] = ()) -> Generator[Told, None, None]:
        began = time.monotonic()
        turn = self._session.stream(text, images=list(images))
        try:
            with closing(turn.events()) as events:
                yield from events
        finally:
            done = turn.completion
            self.last = Summary(
                turn.text,
                turn.reasoning,
                done.finish_reason.value,
                done.usage.prompt_tokens,
                done.usage.completion_tokens,
                time.monotonic() - began,
                done.metrics.decode_s,
            )

    def close(self) -> None:
        self._llm.unload()


class RemotePartner:
    """A model behind an endpoint. ``model`` empty: the one that the endpoint would choose."""

    def __init__(
        self, endpoint: Endpoint, model: str, sampling: Mapping[str, Any], session: str = ""
    ) -> None:
        """``session``: the id or name of a conversation that is kept on this machine."""
        self._endpoint, self._sampling = endpoint, dict(sampling)
        self.name = model or _first_model(endpoint)
        self._transcript = _transcript(session, self.name) if session else None
        self._messages = self._transcript.messages if self._transcript is not None else []
        self._files = {} if self._transcript is None else self._transcript.files
        self.last = Summary()

    @property
    def messages(self) -> list[Message]:
        return self._messages

    @messages.setter
    def messages(self, messages: list[Message]) -> None:
        self._messages = messages
        if self._transcript is not None:
            self._transcript.keep(messages)

    def answer(self, text: str, images: Sequence[Path] = ()) -> Generator[Told, None, None]:
        (question,) = with_media([Message("user", text)], self._files, list(images))
        told = [to_json(message, self._files) for message in [*self.messages, question]]
        body = {
            "model": self.name,
            "messages": [{"role": m["role"], "content": m["content"]} for m in told],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._sampling,
        }
        answer = _Answer()
        failed = False
        reply = None
        try:
            if self._transcript is not None:
                with deferred():  # nothing else would end it
                    reply = self._transcript.begin(self.messages, [question])
            with self._endpoint.open("POST", "/chat/completions", body) as response:
                for event in events_of(response):
                    yield from answer.take(event)
                    if reply is not None and reply.is_due:
                        reply.update(*answer.so_far)
            if not answer.summary.finish_reason:
                raise EndpointError("the connection ended before the answer did.")
        except Exception:
            failed = True
            raise
        finally:
            self.last = answer.finish()
            if not failed and (self.last.text or self.last.finish_reason):
                said = Message(
                    "assistant", self.last.text, reasoning_content=self.last.reasoning or None
                )
                self._messages = [*self.messages, question, said]
                if reply is not None:
                    reply.end(said, self.last.finish_reason or "abort", self.last.usage)
            elif reply is not None:
                reply.fail(self.last.text, self.last.reasoning)

    def close(self) -> None:
        """Close the database, if it has one; it holds nothing else between answers."""
        if self._transcript is not None:
            self._transcript.store.database.close()


class _Answer:
    """Reads the chunks of one answer; tolerant of what other servers leave out."""

    def __init__(self) -> None:
        self.summary = Summary()
        self._began = time.monotonic()
        self._first = self._latest = 0.0
        self._text: list[str] = []
        self._reasoning: list[str] = []

    def take(self, event: Any) -> Generator[Told, None, None]:
        usage = event.get("usage") if isinstance(event, dict) else None
        if isinstance(usage, dict):
            self.summary.prompt_tokens = _count(usage.get("prompt_tokens"))
            self.summary.completion_tokens = _count(usage.get("completion_tokens"))
        choices = event.get("choices") if isinstance(event, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return
        if isinstance(choice.get("finish_reason"), str):
            self.summary.finish_reason = choice["finish_reason"]
        said = choice.get("delta") or choice.get("message")
        if not isinstance(said, dict):
            return
        for names, kind in (
            (("reasoning_content", "reasoning"), Reasoning),
            (("content",), Content),
        ):
            text = next((said[n] for n in names if isinstance(said.get(n), str) and said[n]), "")
            if text:
                yield self._told(kind(text))

    def _told(self, event: Told) -> Told:
        self._latest = time.monotonic()
        self._first = self._first or self._latest
        (self._text if isinstance(event, Content) else self._reasoning).append(event.text)
        return event

    @property
    def so_far(self) -> tuple[str, str]:
        """Text and reasoning."""
        return "".join(self._text), "".join(self._reasoning)

    def finish(self) -> Summary:
        self.summary.seconds = time.monotonic() - self._began
        self.summary.decode_s = self._latest - self._first
        self.summary.text, self.summary.reasoning = self.so_far
        num_pieces = len(self._text) + len(self._reasoning)
        self.summary.completion_tokens = self.summary.completion_tokens or num_pieces
        return self.summary


def _transcript(session: str, model: str) -> Transcript:
    from llmkit.sessions.conversation import Transcript, open_store

    store = open_store()
    try:
        return Transcript.open(store, session, model)
    except BaseException:
        store.database.close()
        raise


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _first_model(endpoint: Endpoint) -> str:
    """``default`` where that is a model's name, else the first that is listed."""
    listed = checked(endpoint.call("GET", "/models", timeout_s=30)).json()
    data = listed.get("data") if isinstance(listed, dict) else None
    models = [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []
    if any(m.get("owned_by") == "llmkit" for m in models):
        return "default"
    names = [m["id"] for m in models if isinstance(m.get("id"), str)]
    if not names:
        raise EndpointError(f"{endpoint.base} lists no model; name one with --model.")
    return str(names[0])
