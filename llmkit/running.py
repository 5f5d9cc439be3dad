"""What a handle has running: requests made of keywords, submitted, waited for, stopped; and what came of the newest ones."""

from __future__ import annotations

import difflib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any
from weakref import WeakKeyDictionary

from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError
from llmkit.stream import Channel, Stream
from llmkit.types import Completion, FinishReason, GenerationRequest, Grammar, SamplingParams

__all__ = ["BATCH_WINDOW", "SHAPES", "Interrupted", "Runs", "make_request", "new_id"]

# Prompts of one batch call that are in the engine at a time: more than any number of slots, less than the queue's bound.
BATCH_WINDOW = 256
REQUEST_OPTIONS = ("priority", "caller", "cache_salt", "lora", "suffix", "parse_special")
SHAPES = ("json_schema", "regex", "choice")
ABORT_S = 0.3  # an abort takes a step to arrive
_ids = itertools.count(1)


class Interrupted(KeyboardInterrupt):
    """The stop button ended a load or a generation. The text so far is in ``llm.last``, that of a batch in ``llm.last_batch``; the next call works."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: one line instead of the frames in which we waited."""
        return [f"Interrupted: {self}"]


def new_id() -> str:
    return f"local-{os.getpid()}-{next(_ids)}"


def make_request(options: dict[str, Any], **prompt: Any) -> GenerationRequest:
    """Keywords as a request: what is not about sampling is about the request. Raises `InvalidRequestError`."""
    about = {k: v for k, v in options.items() if k in REQUEST_OPTIONS}
    if "prompt" in prompt and isinstance(prompt["prompt"], str):
        about.setdefault("parse_special", True)  # as other programs that continue a text do
    if options.get("continue_final_message"):
        if "messages" not in prompt:
            raise InvalidRequestError("continue_final_message is for a chat.", "continue_final_message")
        about["continue_final"] = True
    shape = Grammar.of(**{k: v for k, v in options.items() if k in SHAPES})
    sampling = {k: v for k, v in options.items() if k not in (*REQUEST_OPTIONS, *SHAPES, "continue_final_message")}
    known = [f.name for f in fields(SamplingParams)]
    unknown = next((k for k in sampling if k not in known), None)
    if unknown is not None:
        names = [*known, *REQUEST_OPTIONS, *SHAPES, "continue_final_message"]
        near = difflib.get_close_matches(unknown, names, n=1)
        raise TypeError(f"{unknown!r} is not a generation parameter" + (f"; did you mean {near[0]!r}?" if near else f"; these are: {', '.join(names)}."))
    if shape is not None:
        if sampling.get("grammar") is not None:
            raise InvalidRequestError("json_schema, regex, choice and grammar cannot be combined; give one of them.", "grammar")
        sampling["grammar"] = shape
    return GenerationRequest(new_id(), SamplingParams(**sampling), **about, **prompt)


class Runs:
    """Submits requests to the engine that ``engine()`` gives, and remembers the newest. ``read(completion, held)`` is how an answer that came with its marks is
    read (``held`` to a grammar)."""

    def __init__(self, engine: Callable[[], EngineClient], read: Callable[[Completion, bool], Completion] = lambda completion, _: completion) -> None:
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
        """All completions, in order. An interrupt or a failed request ends the others."""
        streams: list[Stream] = []
        try:
            for i, request in enumerate(requests):
                if i >= BATCH_WINDOW:
                    streams[i - BATCH_WINDOW].result()
                streams.append(self.submit(request))
            return [s.result() for s in streams]
        except BaseException as error:
            self.stop(streams)
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("generation stopped; the text so far is in llm.last" + ("_batch" if len(streams) > 1 else "")) from None
            raise
        finally:
            if len(streams) > 1:
                self.keep(streams)

    def stop(self, streams: Sequence[Stream]) -> None:
        """End streams, and wait a little for what they have."""
        for stream in streams:
            stream.close()
        end = time.monotonic() + ABORT_S
        for stream in streams:
            stream.wait(max(0.0, end - time.monotonic()))
        self._last = next((s.channel for s in reversed(streams) if s.text), self._last)

    def keep(self, streams: Sequence[Stream]) -> None:
        """Remember streams as the newest batch."""
        self._batch = [s.channel for s in streams]

    def keep_completions(self, completions: Sequence[Completion], running: Sequence[Stream]) -> None:
        """Remember what a batch has made, and what of it still ran."""
        self._batch = [*completions, *(s.channel for s in running)]

    @property
    def last(self) -> Completion | None:
        """The newest completion, or what there is of it."""
        channel = self._last
        if channel is None:
            return None
        end = time.monotonic() + ABORT_S
        while not channel.finished and time.monotonic() < end:
            time.sleep(0.005)
        return self._remembered(channel)

    @property
    def last_batch(self) -> list[Completion]:
        return [each if isinstance(each, Completion) else self._remembered(each) for each in self._batch]

    def _remembered(self, channel: Channel) -> Completion:
        done = channel.result or Completion("".join(channel.text_parts), FinishReason.ABORT, request_id=channel.request_id)
        if channel not in self._marked:
            return done
        known = self._known.get(channel)
        if known is None:
            known = self._read(done, self._marked[channel])
            if done is channel.result:  # and not what there was of it a moment ago
                self._known[channel] = known
        return known
