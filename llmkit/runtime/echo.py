"""`EchoEngine`: an `EngineClient` without a model, for people who develop clients.

It answers "Echo: " and the last message, token by token, from a thread of its own. A token is up to
four bytes of UTF-8, whole characters. Imports nothing of a backend.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from concurrent.futures import Future
from typing import Any, TypeVar

from llmkit.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.protocol import (
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    Origin,
)
from llmkit.protocol.stream import Stream
from llmkit.runtime.echoing import EchoAnswer
from llmkit.runtime.echotext import ECHO, N_VOCAB, inquired, prompt_tokens, reply_text, vectors

__all__ = ["EchoEngine"]

Answer = TypeVar("Answer")
STEP_S = 0.005


class EchoEngine:
    """A stand-in for a model.

    >>> from llmkit.protocol import Message
    >>> engine = EchoEngine()
    >>> asked = GenerationRequest("r1", messages=(Message("user", "hi"),))
    >>> engine.submit(asked).result()
    Completion('Echo: hi', finish_reason='stop', prompt_tokens=3, completion_tokens=2)
    >>> engine.close()

    ``n_slots`` answers are written at once, a token of each in ``step_s`` seconds; others wait, up
    to ``max_waiting``.
    """

    def __init__(
        self,
        name: str = ECHO,
        *,
        n_ctx: int = 32_768,
        n_slots: int = 8,
        max_waiting: int = 1024,
        step_s: float = STEP_S,
    ) -> None:
        self._description = ModelDescription(
            name,
            path=ECHO,
            architecture=ECHO,
            n_ctx=n_ctx,
            n_ctx_train=n_ctx,
            n_slots=n_slots,
            n_vocab=N_VOCAB,
            created=int(time.time()),
        )
        self._step_s, self._max_waiting = step_s, max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[EchoAnswer] = deque()
        self._running: list[EchoAnswer] = []
        self._closed = False
        self._totals = EngineTotals()
        self._thread = threading.Thread(target=self._run, name="llmkit-echo", daemon=True)
        self._thread.start()

    @property
    def description(self) -> ModelDescription:
        return self._description

    @property
    def state(self) -> EngineState:
        return EngineState.gone_for(GONE if self._closed else None)

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit(self, request: GenerationRequest) -> Stream:
        return self.submit_choices(request)[0]

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        grammar = request.sampling.grammar
        if grammar is not None and not request.tools:
            raise InvalidRequestError(
                f"{grammar.origin}: there is no model here that could keep to it, only an echo; "
                "leave it out.",
                grammar.origin if grammar.origin.isidentifier() else None,
            )
        prompt, n_ctx = prompt_tokens(request), self._description.n_ctx
        if len(prompt) >= n_ctx:
            raise ContextLengthError(
                len(prompt), n_ctx, "prompt" if request.messages is None else "messages"
            )
        text, room = reply_text(request), n_ctx - len(prompt)
        made = [EchoAnswer(choice, prompt, text, room, self.abort) for choice in request.choices()]
        with self._changed:
            if self._closed:
                raise ModelUnloadedError(GONE)
            free = self._description.n_slots - len(self._running)
            if len(self._waiting) + len(made) > free + self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait for the echo already; try again later."
                )
            self._waiting.extend(made)
            self._changed.notify()
        return [Stream(answer.channel) for answer in made]

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        if self._closed:
            raise ModelUnloadedError(GONE)
        future: Future[Embeddings] = Future()
        future.set_result(vectors(request))
        return future

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        with self._changed:
            running = [answer.as_running(i) for i, answer in enumerate(self._running)]
        future: Future[Any] = Future()
        future.set_result(inquired(inquiry.question, tuple(running)))
        return future

    def abort(self, request_id: str) -> None:
        with self._changed:
            for answer in (*self._waiting, *self._running):
                if answer.request.request_id == request_id:
                    answer.is_aborted = True
            self._changed.notify()

    def stats(self) -> EngineStats:
        with self._changed:
            return self._totals.stats(self._description, self._running, len(self._waiting))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closed or self._waiting or self._running):
                    self._changed.wait()
                if self._closed:
                    break
                self._admit()
                answers = list(self._running)
            began = time.monotonic()
            ended = [answer for answer in answers if answer.step()]
            self._totals.add(ended, len(answers), self._step_s)
            with self._changed:
                self._running = [answer for answer in self._running if answer not in ended]
            # All of a step is stored first, then its readers are woken.
            for answer in answers:
                answer.channel.wake()
            time.sleep(max(0.0, self._step_s - (time.monotonic() - began)))
        with self._changed:
            left = [*self._waiting, *self._running]
            self._waiting.clear()
            self._running.clear()
        for answer in left:
            with contextlib.suppress(Exception):
                answer.channel.fail(ModelUnloadedError(GONE))
                answer.channel.wake()

    def _admit(self) -> None:
        """The next ones in line; those that were aborted only end."""
        while self._waiting and (
            len(self._running) < self._description.n_slots or self._waiting[0].is_aborted
        ):
            answer = self._waiting.popleft()
            answer.begin()
            self._running.append(answer)


GONE = "the echo has ended; start it again with `llmkit serve echo`."


class EngineTotals:
    """What has been counted since the start. The echo's thread writes."""

    def __init__(self) -> None:
        self._requests = self._prompt = self._generated = self._steps = self._busy = 0
        self._seconds = 0.0

    def add(self, ended: list[EchoAnswer], num_slots: int, seconds: float) -> None:
        """A step is over."""
        self._steps += 1
        self._busy += num_slots
        self._seconds += seconds
        self._generated += num_slots
        for answer in ended:
            self._requests += 1
            self._prompt += len(answer.prompt)

    def stats(
        self, model: ModelDescription, running: list[EchoAnswer], num_waiting: int
    ) -> EngineStats:
        used = sum(len(answer.prompt) + answer.num_tokens for answer in running)
        return EngineStats(
            num_running=len(running),
            num_waiting=num_waiting,
            kv_used_tokens=used,
            kv_capacity_tokens=model.n_ctx * model.n_slots,
            num_slots=model.n_slots,
            prompt_tokens_total=self._prompt,
            generation_tokens_total=self._generated,
            requests_total=self._requests,
            steps_total=self._steps,
            step_seconds_total=self._seconds,
            busy_slots_total=self._busy,
        )
