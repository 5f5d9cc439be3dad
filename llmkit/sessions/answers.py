"""Answers of a handle's model: requests submitted, tools run, reasoning separated from the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmkit.chat.reading import AnswerReader
from llmkit.errors import InvalidRequestError
from llmkit.media.taking import check_takes
from llmkit.protocol import (
    Completion,
    GenerationRequest,
    Message,
    ModelDescription,
    SamplingParams,
    TokenizeChat,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream
from llmkit.sessions.messages import NOTHING, Messages, as_messages, with_media
from llmkit.sessions.running import Runs, ask, is_constrained, make_request, new_id

if TYPE_CHECKING:
    from pathlib import Path

    from llmkit.sessions.session import Session
    from llmkit.store.conversations import ConversationStore

__all__ = ["Answers"]


class Answers:
    """Submits a handle's requests, and reads the answers of models that reason.

    The reader finds reasoning by its markers, so the chats of such a model run with ``show_marks``.
    ``engine()`` returns the engine, ``count(text)`` the number of tokens of a text.
    """

    def __init__(
        self,
        engine: Callable[[], EngineClient],
        model: ModelDescription,
        count: Callable[[str], int],
    ) -> None:
        self._engine, self._model, self._count = engine, model, count
        self._store: ConversationStore | None = None  # opened when it is first needed
        self.runs = Runs(engine, lambda done, held: self.reader(held).apart(done, count))

    def reader(self, held: bool, request: GenerationRequest | None = None) -> AnswerReader:
        """A reader of one answer; ``held``: a grammar constrains it."""
        if not self._model.reasoning:
            return AnswerReader.plain()
        last = request.messages[-1] if request is not None and request.messages else None
        continued = (
            last.text
            if last is not None and request is not None and request.continue_final
            else None
        )
        return AnswerReader(
            self._model,
            held=held,
            continued=continued,
            after_results=last is not None and last.role == "tool",
        )

    def batch(self, prompts: Sequence[str], sampling: dict[str, Any]) -> list[Completion]:
        """Continue texts in one batch. Raises `InvalidRequestError` if one is not a str."""
        for i, text in enumerate(prompts):
            if not isinstance(text, str):
                raise InvalidRequestError(
                    f"prompt {i} must be a str, not {type(text).__name__}.", "prompt"
                )
        first = make_request(sampling, prompt="")
        return self.runs.complete(
            replace(first, request_id=new_id(), prompt=text) for text in prompts
        )

    def submit(self, request: GenerationRequest) -> Stream:
        """Submit a request; the answer of a chat keeps the markers that its reader needs."""
        marked = request.messages is not None and bool(self._model.reasoning)
        return self.runs.submit(replace(request, show_marks=marked))

    def say(
        self,
        messages: Sequence[Message],
        sampling: dict[str, Any],
        files: Mapping[str, bytes] = NOTHING,
    ) -> Stream:
        """Submit the messages of a session, with their files."""
        return self.submit(self._request(sampling, messages, files))

    def _request(
        self, sampling: dict[str, Any], messages: Sequence[Message], files: Mapping[str, bytes]
    ) -> GenerationRequest:
        """Raises `InvalidRequestError`, also for pictures and sounds that the model does not
        take."""
        return make_request(sampling, messages=tuple(messages), media=self._media(messages, files))

    def _media(self, messages: Sequence[Message], files: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files of some messages."""
        found: dict[str, bytes] = {}
        for item in (item for message in messages for item in message.media):
            check_takes(self._model, item.kind)
            if item.digest not in files:
                raise InvalidRequestError(
                    "messages: the file of a picture or sound is gone.", "messages"
                )
            found[item.digest] = files[item.digest]
        return found

    def session(
        self, system: str | None, path: str | Path | None, id: str | None, sampling: dict[str, Any]
    ) -> Session:
        """Implements `LLM.session`."""
        from llmkit.sessions.session import Session

        transcript = None
        if id is not None:
            from llmkit.sessions.conversation import Transcript, open_store

            if path is not None:
                raise InvalidRequestError("give a session's id or its path, not both.", "id")
            self._store = self._store or open_store()
            transcript = Transcript.open(self._store, id, self._model.name, sampling)
        n_ctx, tell = self._model.n_ctx, (self.say, self.num_tokens, self.reader)
        return Session.open(*tell, n_ctx, system, path, sampling, transcript)

    def close(self) -> None:
        """Close the database, if it was opened."""
        if self._store is not None:
            self._store.database.close()

    def num_tokens(self, messages: Sequence[Message], files: Mapping[str, bytes] = NOTHING) -> int:
        """Tokens of a chat, as its template renders it."""
        question = TokenizeChat(tuple(messages), media=self._media(messages, files))
        return len(ask(self._engine(), question).tokens)

    def save_prefix(self, **prompt: Any) -> int:
        """Compute a ``prompt`` or ``messages`` and keep it on disk; its length in tokens."""
        sampling = SamplingParams(max_tokens=0)
        request = GenerationRequest(new_id(), sampling, keep_on_disk=True, **prompt)
        return self.runs.complete([request])[0].usage.prompt_tokens

    def chat(
        self,
        messages: Messages,
        stream: bool,
        tools: Sequence[Callable[..., Any]],
        tool_choice: str,
        max_rounds: int,
        sampling: dict[str, Any],
        images: Any = (),
        sounds: Any = (),
    ) -> Completion | Stream:
        """Implements `LLM.chat`."""
        files: dict[str, bytes] = {}
        chat = with_media(as_messages(messages, files), files, images, sounds)
        if tools:
            if is_constrained(sampling):
                raise InvalidRequestError(
                    "tools cannot be combined with a grammar, json_schema, regex or choice.",
                    "tools",
                )
            if stream:
                raise InvalidRequestError(
                    "a chat with tools cannot be streamed here; leave out stream, or use an "
                    "endpoint of llm.serve().",
                    "stream",
                )
            return self._converse(list(chat), files, tools, tool_choice, max_rounds, sampling)
        request = self._request(sampling, chat, files)
        return self.runs.submit(request) if stream else self._complete(request)

    def _complete(self, request: GenerationRequest) -> Completion:
        """The answer of a chat, its reasoning apart from its text."""
        if not self._model.reasoning:
            return self.runs.complete([request])[0]
        done = self.runs.complete([replace(request, show_marks=True)])[0]
        return self.reader(request.sampling.grammar is not None, request).apart(done, self._count)

    def _converse(
        self,
        chat: list[Message],
        files: dict[str, bytes],
        tools: Sequence[Callable[..., Any]],
        tool_choice: str,
        max_rounds: int,
        sampling: dict[str, Any],
    ) -> Completion:
        from llmkit.sessions.toolbox import converse

        def ask(messages: list[Message], **options: Any) -> Completion:
            more = {name: options.pop(name) for name in ("tools", "show_marks")}
            request = self._request({**sampling, **options}, messages, files)
            return self.runs.complete([replace(request, **more)])[0]

        return converse(ask, self._model, tools, chat, tool_choice, max_rounds)
