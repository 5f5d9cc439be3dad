"""`SerialEngine`: what models have in common that work on one request at a time, as an
`EngineClient`.

One thread computes; callers take turns, also in the middle of a request where a model says so.
Between two pieces of its work a model looks whether its request was aborted.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from llmkit.engine.admission import Admission
from llmkit.errors import (
    EngineError,
    EngineGoneError,
    InvalidRequestError,
    LLMKitError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.protocol import (
    DescribeVocabulary,
    EmbeddingRequest,
    Embeddings,
    EngineState,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    ModelDescription,
    Origin,
    Vocabulary,
)
from llmkit.protocol.stream import Channel, Stream
from llmkit.runtime.lifetime import Lifetime
from llmkit.runtime.serial_jobs import Job

__all__ = ["PAUSE", "SerialEngine"]

logger = logging.getLogger("llmkit.engine")
Answer = TypeVar("Answer")
MAX_OWED = 1000
PAUSE = "\0"  # in no line of JSON


class SerialEngine(ABC):
    """An engine whose requests have one line of work each; ``kind`` names it in errors."""

    kind = "the"

    def __init__(self, description: ModelDescription, max_waiting: int) -> None:
        self._life = Lifetime()
        self.description = description
        self._admission = Admission(max_waiting)
        self._lock = threading.Condition()
        self._waiting: list[Job] = []
        self._paused: list[Job] = []  # begun, and waiting for their next turn
        self._running: Job | None = None
        self._served: dict[str, float] = {}  # seconds of each caller with a request, by weight
        self._owed: dict[str, float] = {}  # such seconds of callers who left a running request
        self._failure: str | None = None
        self._requests = self._taken = self._made = 0
        self._thread = threading.Thread(target=self._run, name=f"llmkit-{self.kind}", daemon=True)
        self._thread.start()

    @abstractmethod
    def _does(self) -> str:
        """What the model is for, for those who ask it for something else."""

    @abstractmethod
    def _check(self, request: GenerationRequest) -> None:
        """Raises `InvalidRequestError` for what it cannot do."""

    @abstractmethod
    def _lines(self, job: Job) -> Iterator[tuple[str, int]]:
        """The lines of the stream, and how many tokens each has; ends early if ``job.is_over``.

        At a `PAUSE` other requests may have their turn first.
        """

    @abstractmethod
    def _free(self) -> None:
        """Free the memory of the model; nothing computes."""

    @property
    def closed(self) -> bool:
        return self._life.closed

    @property
    def state(self) -> EngineState:
        return self._life.state(self.description.name, self._failure)

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request with a `Hearing`, a `Saying` or a `Drawing`.

        Raises as `EngineClient` says.
        """
        self._check(request)
        channel = Channel(request.request_id, self.abort, keeps_text=request.keeps_text)
        job = Job(request, channel)
        with self._lock:
            self._check_open()
            displaced = self._admission.enter(request.caller)
            self._waiting.append(job)
            least = min(self._served.values(), default=0.0)
            if request.caller not in self._served:
                self._served[request.caller] = least + self._owed.pop(request.caller, 0.0)
            found = [self._newest(c) for c in displaced]
            out = [each for each in found if each is not None and self._take_out(each)]
            self._requests += 1
            self._lock.notify()
        for each in out:
            each.channel.fail(
                QueueFullError(
                    "the queue is full, and this caller has the most requests in it; try again "
                    "later"
                )
            )
            each.channel.wake()
        return Stream(job.channel)

    def submit_choices(self, request: GenerationRequest) -> list[Stream]:
        return [self.submit(each) for each in request.choices()]

    def abort(self, request_id: str) -> None:
        """End a request early: its reader at once, its work after the running piece."""
        with self._lock:
            jobs = [*self._waiting, *self._paused, *filter(None, [self._running])]
            found = [j for j in jobs if j.request.request_id == request_id]
            for job in found:
                job.is_over = True
                self._take_out(job)
        for job in found:
            job.finish(FinishReason.ABORT)
            job.channel.wake()

    def _take_out(self, job: Job) -> bool:
        """Whether it still waited. The garbage collector may abort within the lock."""
        with contextlib.suppress(ValueError):
            self._paused.remove(job)
            return True
        with contextlib.suppress(ValueError):
            self._waiting.remove(job)
            self._admission.leave(job.request.caller)
            return True
        return False

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=int(self._running is not None),
            num_waiting=len(self._waiting) + len(self._paused),
            num_slots=1,
            requests_total=self._requests,
            prompt_tokens_total=self._taken,
            generation_tokens_total=self._made,
        )

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        raise InvalidRequestError(self._does(), "model")

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        found: Any = ()
        if isinstance(inquiry.question, DescribeVocabulary):
            found = Vocabulary("", "", adds_bos=False, chat_template=None)  # it has none
        elif not isinstance(inquiry.question, ListSteps | ListSlots | ListRequests):
            raise InvalidRequestError(self._does(), "model")
        future: Future[Answer] = Future()
        future.set_result(found)
        return future

    def close(self) -> None:
        """Free the memory; the running piece, some seconds at most, is waited for."""
        if not self._life.is_ours:
            return
        with self._lock:
            if self._life.closed:
                return
            self._life.closed = True
            running = self._running
            if running is not None:
                running.channel.fail(_unloaded())  # first: what ends because of it was cut off
                running.is_over = True
            self._lock.notify()
        if running is not None:
            running.channel.wake()
        self._thread.join()
        self._free()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

    def _newest(self, caller: str) -> Job | None:
        mine = (j for j in reversed(self._waiting) if j.request.caller == caller)
        return next(mine, None) if self._admission.owes(caller) else None

    def _check_open(self) -> None:
        self._life.check(self.description.name, self._failure)

    def _run(self) -> None:
        failure: Exception = _unloaded()
        try:
            while (job := self._next()) is not None:
                self._compute(job)
        except BaseException as error:  # no request may wait forever
            logger.exception("the %s engine stopped", self.kind)
            self._failure = f"the {self.kind} engine stopped: {error!r:.500}. Load it again."
            failure = EngineGoneError(self._failure)
        with self._lock:
            left = [*self._paused, *self._waiting]
            self._waiting, self._paused = [], []
        for job in left:
            job.channel.fail(failure)
            job.channel.wake()

    def _next(self) -> Job | None:
        """The first request of the caller that was served least; None when closed."""
        with self._lock:
            while True:
                self._lock.wait_for(lambda: self._waiting or self._paused or self.closed)
                if self.closed:
                    return None
                jobs = [*self._waiting, *self._paused]
                there = {j.request.caller for j in jobs}
                self._served = {c: s for c, s in self._served.items() if c in there}
                job = min(jobs, key=lambda j: (j.request.priority, self._served[j.request.caller]))
                job.resumed = time.monotonic()
                job.begun = job.begun or job.resumed
                self._running = job  # first: an abort finds it at any moment
                if self._take_out(job):
                    return job
                self._running = None

    def _compute(self, job: Job) -> None:
        lines, job.lines = job.lines or self._lines(job), None
        try:
            for line, num_tokens in lines:
                if job.is_over:
                    return
                if line == PAUSE:
                    if self._waiting or self._paused:
                        job.lines = lines
                        return
                    continue
                job.push(line, num_tokens)
            job.finish(FinishReason.ABORT if job.is_over else FinishReason.STOP)
        except LLMKitError as error:
            job.channel.fail(error)
        except Exception as error:
            logger.exception("a request of %s failed", self.description.name)
            job.channel.fail(EngineError(f"the model failed: {error!r:.300}"))
        except BaseException as error:  # the thread ends of it, and its reader must not wait
            job.channel.fail(EngineGoneError(f"the {self.kind} engine stopped: {error!r:.300}"))
            raise
        finally:
            caller, weight = job.request.caller, job.request.weight
            with self._lock:
                self._running = None
                if job.lines is not None and not job.is_over:
                    self._paused.append(job)
                else:
                    self._taken += job.prompt_tokens
                    self._made += job.tokens
                seconds = time.monotonic() - job.resumed + (job.redone_s if job.is_over else 0.0)
                jobs = [*self._waiting, *self._paused]
                is_gone = not any(j.request.caller == caller for j in jobs)
                if job.is_over and is_gone:
                    self._served.pop(caller, None)
                    self._owed[caller] = seconds / weight
                    if len(self._owed) > MAX_OWED:
                        del self._owed[next(iter(self._owed))]
                elif caller in self._served:
                    self._served[caller] += seconds / weight
            job.channel.wake()


def _unloaded() -> ModelUnloadedError:
    return ModelUnloadedError("the model was unloaded during this request")
