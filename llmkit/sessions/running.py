"""Requests of a handle: built from keywords, submitted, awaited, stopped; the latest results."""

from __future__ import annotations

import difflib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from llmkit.errors import InvalidRequestError
from llmkit.protocol import (
    Completion,
    FinishReason,
    GenerationRequest,
    Grammar,
    Inquiry,
    Question,
    SamplingParams,
)
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Channel, Stream
from llmkit.sessions.batches import Batch

__all__ = [
    "BATCH_WINDOW",
    "SHAPES",
    "Interrupted",
    "Runs",
    "ask",
    "is_constrained",
    "make_request",
    "new_id",
]

# Prompts of one batch call in the engine at once: above any slot count.
BATCH_WINDOW = 256
REQUEST_OPTIONS = ("priority", "caller", "cache_salt", "lora", "suffix", "parse_special")
SHAPES = ("json_schema", "regex", "choice")
ABORT_S = 0.3  # an abort takes effect after the current step
_ids = itertools.count(1)
Answer = TypeVar("Answer")


class Interrupted(KeyboardInterrupt):
    """The stop button ended a load or a generation.

    The text so far is in ``llm.last``, that of a batch in ``llm.last_batch``; the next call works.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: one line instead of the waiting frames."""
        return [f"Interrupted: {self}"]


def new_id() -> str:
    return f"local-{os.getpid()}-{next(_ids)}"


def ask(engine: EngineClient, question: Question[Answer]) -> Answer:
    """The engine's answer to a question."""
    return engine.inquire(Inquiry(new_id(), question)).result()


def is_constrained(sampling: dict[str, Any]) -> bool:
    """Whether a grammar constrains the answer, which leaves no room for reasoning."""
    return any(sampling.get(name) is not None for name in ("grammar", *SHAPES))


def make_request(options: dict[str, Any], **prompt: Any) -> GenerationRequest:
    """A request from keywords, split into sampling parameters and request options.

    Raises `InvalidRequestError` for invalid values, TypeError for an unknown keyword.
    """
    request_options = {k: v for k, v in options.items() if k in REQUEST_OPTIONS}
    if "prompt" in prompt and isinstance(prompt["prompt"], str):
        request_options.setdefault("parse_special", True)  # as in other completion APIs
    if options.get("continue_final_message"):
        if "messages" not in prompt:
            raise InvalidRequestError(
                "continue_final_message needs a chat.", "continue_final_message"
            )
        request_options["continue_final"] = True
    shape = Grammar.of(**{k: v for k, v in options.items() if k in SHAPES})
    sampling = {
        k: v
        for k, v in options.items()
        if k not in (*REQUEST_OPTIONS, *SHAPES, "continue_final_message")
    }
    known = [f.name for f in fields(SamplingParams)]
    unknown = next((k for k in sampling if k not in known), None)
    if unknown in ("images", "sounds") and "messages" not in prompt:
        raise TypeError(
            f"{unknown} go with a chat, not with a raw prompt: llm.chat(…, {unknown}=[…]), with "
            "stream=True piece by piece."
        )
    if unknown is not None:
        names = [*known, *REQUEST_OPTIONS, *SHAPES, "continue_final_message"]
        near = difflib.get_close_matches(unknown, names, n=1)
        raise TypeError(
            f"{unknown!r} is not a generation parameter"
            + (
                f"; did you mean {near[0]!r}?"
                if near
                else f"; the parameters are: {', '.join(names)}."
            )
        )
    if shape is not None:
        if sampling.get("grammar") is not None:
            raise InvalidRequestError(
                "json_schema, regex, choice and grammar cannot be combined; give one of them.",
                "grammar",
            )
        sampling["grammar"] = shape
    return GenerationRequest(new_id(), SamplingParams(**sampling), **request_options, **prompt)


class Runs:
    """Submits requests to the engine that ``engine()`` returns, and remembers the latest.

    ``read(completion, held)`` parses an answer whose text still has its markers; ``held`` says that
    a grammar constrained it.
    """

    def __init__(
        self,
        engine: Callable[[], EngineClient],
        read: Callable[[Completion, bool], Completion] = lambda completion, _: completion,
    ) -> None:
        self._engine, self._read = engine, read
        self._marked: WeakKeyDictionary[Channel, bool] = WeakKeyDictionary()
        self._known: WeakKeyDictionary[Channel, Completion] = WeakKeyDictionary()
        self._last: Channel | None = None
        self._batch: list[Channel | Completion] = []

    def submit(self, request: GenerationRequest) -> Stream:
        stream = self._engine().submit(request)
        self._last = stream.channel
        if request.show_marks:
            self._marked[stream.channel] = request.sampling.grammar is not None
        return stream

    def complete(self, requests: Iterable[GenerationRequest]) -> list[Completion]:
        """All completions, in order. An interrupt or a failed request stops the others."""
        streams: list[Stream] = []

        def submit(numbered: tuple[int, GenerationRequest]) -> Stream:
            place, request = numbered
            if place < len(streams):  # once more, but the engine may still know its id
                request = replace(request, request_id=new_id())
            stream = self.submit(request)
            streams[place : place + 1] = [stream]
            return stream

        def taken(result: Completion | Exception) -> Completion:
            if isinstance(result, Exception):
                raise result
            return result

        batch = Batch(submit, BATCH_WINDOW)
        try:
            return [taken(result) for result in batch.results(enumerate(requests))]
        except BaseException as error:
            self.stop(streams)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(
                    "generation stopped; the text so far is in llm.last"
                    + ("_batch" if len(streams) > 1 else "")
                ) from None
            raise
        finally:
            if len(streams) > 1:
                self.keep(streams)

    def stop(self, streams: Sequence[Stream]) -> None:
        """Stop streams, and wait briefly for their partial results."""
        for stream in streams:
            stream.close()
        end = time.monotonic() + ABORT_S
        for stream in streams:
            stream.wait(max(0.0, end - time.monotonic()))
        self._last = next((s.channel for s in reversed(streams) if s.text), self._last)

    def keep(self, streams: Sequence[Stream]) -> None:
        """Remember streams as the latest batch."""
        self._batch = [s.channel for s in streams]

    def keep_completions(
        self, completions: Sequence[Completion], running: Sequence[Stream]
    ) -> None:
        """Remember a batch: its completions, and the streams that were still running."""
        self._batch = [*completions, *(s.channel for s in running)]

    @property
    def last(self) -> Completion | None:
        """The latest completion, possibly partial."""
        channel = self._last
        if channel is None:
            return None
        end = time.monotonic() + ABORT_S
        while not channel.finished and time.monotonic() < end:
            time.sleep(0.005)
        return self._remembered(channel)

    @property
    def last_batch(self) -> list[Completion]:
        return [
            each if isinstance(each, Completion) else self._remembered(each) for each in self._batch
        ]

    def _remembered(self, channel: Channel) -> Completion:
        done = channel.result or Completion(
            "".join(channel.text_parts), FinishReason.ABORT, request_id=channel.request_id
        )
        if channel not in self._marked:
            return done
        known = self._known.get(channel)
        if known is None:
            known = self._read(done, self._marked[channel])
            if done is channel.result:  # final: a partial result must not be cached
                self._known[channel] = known
        return known
