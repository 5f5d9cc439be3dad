"""`LocalSpeech`: a model of this process that hears or speaks, behind the `EngineClient` protocol.

One thread computes, one request at a time; callers take turns. Between two segments, or sentences,
it looks whether the request was aborted.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from llmkit.engine.admission import Admission
from llmkit.errors import (
    EngineError,
    EngineGoneError,
    InvalidRequestError,
    LLMKitError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.models.registry import ModelSpec
from llmkit.models.speech_files import speech_kind
from llmkit.protocol import (
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
)
from llmkit.protocol.speech import (
    MAX_SPOKEN_CHARS,
    Facts,
    Lines,
    Speaker,
    Transcriber,
)
from llmkit.protocol.stream import Channel, Stream
from llmkit.runtime.running import running
from llmkit.runtime.speech_jobs import Job
from llmkit.settings.options import EngineOptions
from llmkit.speech.decoding import RATE, pcm_of
from llmkit.speech.encoding import encoder_of
from llmkit.speech.extra import need

__all__ = ["LocalSpeech", "open_speech"]

logger = logging.getLogger("llmkit.engine")
Answer = TypeVar("Answer")

HEARD_TOKENS = 448  # the text that Whisper can follow and write at once
SOUND_TOKENS = 50  # a second of sound in tokens: the positions of Whisper's encoder
FRAME_S = 0.0125  # a token of speech: what the voice predicts at once


def open_speech(spec: ModelSpec, options: EngineOptions, name: str | None = None) -> LocalSpeech:
    """The engine for a file that is one of `llmkit.models.speech_files`.

    On a GPU only if ``n_gpu_layers`` says so: what that takes besides is not known before it
    fails. Raises `ModelLoadError`, which may name the packages to install.
    """
    on_gpu = options.n_gpu_layers not in ("auto", 0)
    model: Transcriber | Speaker
    if speech_kind(spec.path) == "hibari":
        from llmkit.speech.hibari import Hibari

        on_gpu, model = False, Hibari(threads=options.threads)
    else:
        from llmkit.speech.whisper import Whisper

        model = Whisper(spec.path.parent, threads=options.threads, on_gpu=on_gpu)
    need("soundfile")
    engine = LocalSpeech(spec, model, options, name, on_gpu=on_gpu)
    running.add(engine)
    return engine


class LocalSpeech:
    """An `EngineClient` that only hears (``model`` is a `Transcriber`) or only speaks."""

    def __init__(
        self,
        spec: ModelSpec,
        model: Transcriber | Speaker,
        options: EngineOptions,
        name: str | None = None,
        *,
        on_gpu: bool = False,
    ) -> None:
        self._pid = os.getpid()
        self._model = model
        hears = hasattr(model, "segments")
        self.description = ModelDescription(
            name=name or spec.name,
            path=str(spec.path),
            architecture="whisper" if hears else "hibari",
            quantization="F16" if on_gpu or not hears else "INT8",
            n_ctx=HEARD_TOKENS if hears else MAX_SPOKEN_CHARS,
            n_slots=1,
            weights_bytes=spec.path.stat().st_size,
            device="gpu" if on_gpu else "cpu",
            created=int(time.time()),
            languages=model.languages if hears else ("en",),  # type: ignore[union-attr]
            voices=() if hears else model.voices,  # type: ignore[union-attr]
            hears=hears,
        )
        self._admission = Admission(options.max_waiting)
        self._lock = threading.Condition()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._served: dict[str, float] = {}  # seconds of each caller with a request, by weight
        self._closed = False
        self._failure: str | None = None
        self._requests = self._heard = self._said = 0
        self._thread = threading.Thread(target=self._run, name="llmkit-speech", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def state(self) -> EngineState:
        return EngineState.gone_for(
            str(ModelUnloadedError.of(self.description.name)) if self._closed else self._failure
        )

    @property
    def origin(self) -> Origin:
        return Origin.here()

    def submit(self, request: GenerationRequest) -> Stream:
        """Queue a request with a `Hearing` or a `Saying`. Raises as `EngineClient` says."""
        self._check(request)
        job = Job(request, Channel(request.request_id, self.abort))
        with self._lock:
            self._check_open()
            displaced = self._admission.enter(request.caller)
            self._waiting.append(job)
            self._served.setdefault(request.caller, min(self._served.values(), default=0.0))
            out = [found for c in displaced if (found := self._newest(c)) is not None]
            for each in out:
                self._waiting.remove(each)
                self._admission.leave(each.request.caller)
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
            jobs = [*self._waiting, *filter(None, [self._running])]
            found = [j for j in jobs if j.request.request_id == request_id]
            for job in found:
                job.is_over = True
                if job in self._waiting:
                    self._waiting.remove(job)
                    self._admission.leave(job.request.caller)
        for job in found:
            job.finish(FinishReason.ABORT)
            job.channel.wake()

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=int(self._running is not None),
            num_waiting=len(self._waiting),
            num_slots=1,
            requests_total=self._requests,
            prompt_tokens_total=self._heard,
            generation_tokens_total=self._said,
        )

    def embed(self, request: EmbeddingRequest) -> Future[Embeddings]:
        raise InvalidRequestError(self._does(), "model")

    def inquire(self, inquiry: Inquiry[Answer]) -> Future[Answer]:
        if not isinstance(inquiry.question, ListSteps | ListSlots | ListRequests):
            raise InvalidRequestError(self._does(), "model")
        future: Future[Answer] = Future()
        future.set_result(())  # type: ignore[arg-type]
        return future

    def close(self) -> None:
        """Free the memory; the running piece, some seconds at most, is waited for."""
        if self._pid != os.getpid():
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify()
        self.abort(self._running.request.request_id if self._running is not None else "")
        self._thread.join()
        self._model.close()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)

    def _does(self) -> str:
        name = self.description.name
        if self.description.hears:
            return f"{name!r} writes down speech (/v1/audio/transcriptions); it makes no texts."
        return f"{name!r} speaks texts (/v1/audio/speech); it makes none."

    def _check(self, request: GenerationRequest) -> None:
        known = self.description
        hearing, saying = request.hearing, request.saying
        if not isinstance(request.prompt, str) or (hearing if known.hears else saying) is None:
            raise InvalidRequestError(self._does(), "model")
        if hearing is not None:
            language = hearing.language
            if language is not None and language not in known.languages:
                shown = ", ".join(known.languages[:8])
                raise InvalidRequestError(
                    f"language: {known.name!r} does not know {language!r:.20}; it knows {shown}"
                    + (" and others." if len(known.languages) > 8 else "."),
                    "language",
                )
            if hearing.translate and known.languages == ("en",):
                raise InvalidRequestError(
                    f"{known.name!r} knows English only, so it cannot translate; use "
                    "transcriptions, or a model without .en in its name.",
                    "model",
                )
        if saying is not None:
            if saying.voice is not None and saying.voice not in known.voices:
                voices = ", ".join(known.voices)
                raise InvalidRequestError(
                    f"voice: {known.name!r} has no voice {saying.voice!r:.40}; it has {voices}.",
                    "voice",
                )
            if not request.prompt.strip():
                raise InvalidRequestError("input: there is nothing to say.", "input")
            if len(request.prompt) > MAX_SPOKEN_CHARS:
                raise InvalidRequestError(
                    f"input: {len(request.prompt)} characters; at most {MAX_SPOKEN_CHARS} are "
                    "spoken in one request. Send it in parts.",
                    "input",
                )

    def _newest(self, caller: str) -> Job | None:
        mine = (j for j in reversed(self._waiting) if j.request.caller == caller)
        return next(mine, None) if self._admission.owes(caller) else None

    def _check_open(self) -> None:
        if self._failure is not None:
            raise EngineGoneError(self._failure)
        if self._closed or self._pid != os.getpid():
            raise ModelUnloadedError.of(self.description.name)

    def _run(self) -> None:
        failure: Exception = ModelUnloadedError("the model was unloaded during this request")
        try:
            while (job := self._next()) is not None:
                self._compute(job)
        except BaseException as error:  # no request may wait forever
            logger.exception("the speech engine stopped")
            self._failure = f"the speech engine stopped: {error!r:.500}. Load the model again."
            failure = EngineGoneError(self._failure)
        with self._lock:
            left, self._waiting = self._waiting, []
        for job in left:
            job.channel.fail(failure)
            job.channel.wake()

    def _next(self) -> Job | None:
        """The first request of the caller that was served least; None when closed."""
        with self._lock:
            self._lock.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            there = {j.request.caller for j in self._waiting}
            self._served = {c: s for c, s in self._served.items() if c in there}
            job = min(
                self._waiting, key=lambda j: (j.request.priority, self._served[j.request.caller])
            )
            self._waiting.remove(job)
            self._admission.leave(job.request.caller)
            self._running = job
            job.begun = time.monotonic()
            return job

    def _compute(self, job: Job) -> None:
        try:
            for line, num_tokens in self._lines(job):
                if job.is_over:
                    return
                job.push(line, num_tokens)
            job.finish(FinishReason.STOP)
        except LLMKitError as error:
            job.channel.fail(error)
        except Exception as error:
            logger.exception("a request of %s failed", self.description.name)
            job.channel.fail(EngineError(f"the model failed: {error!r:.300}"))
        finally:
            caller, weight = job.request.caller, job.request.weight
            with self._lock:
                self._running = None
                self._heard += job.prompt_tokens
                self._said += job.tokens
                seconds = (time.monotonic() - job.begun) / weight
                if caller in self._served:
                    self._served[caller] += seconds
            job.channel.wake()

    def _lines(self, job: Job) -> Iterator[tuple[str, int]]:
        """The lines of the stream, and how many tokens each has."""
        request = job.request
        hearing, saying, prompt = request.hearing, request.saying, str(request.prompt)
        if hearing is not None:
            pcm = pcm_of(hearing.audio, hearing.max_s)
            # Only the samples are needed from here on.
            job.request = replace(request, hearing=replace(hearing, audio=b""))
            job.prompt_tokens = round(len(pcm) / RATE * SOUND_TOKENS)
            yield Lines.of(Facts(round(len(pcm) / RATE, 3))), 0
            hears: Transcriber = self._model  # type: ignore[assignment]
            found = hears.segments(pcm, hearing, prompt, lambda: job.is_over)
            for segment in found:
                yield Lines.of(segment), len(segment.tokens)
            return
        assert saying is not None
        speaker: Speaker = self._model  # type: ignore[assignment]
        encoder = encoder_of(saying.format, speaker.rate)
        job.prompt_tokens = len(prompt)
        made = 0
        for sound in speaker.speak(prompt, saying.voice, saying.speed, saying.seed):
            made += len(sound)
            yield _sound(encoder.push(sound)), int(len(sound) / speaker.rate / FRAME_S)
        if not made:
            raise InvalidRequestError("input: there is nothing in it that can be spoken.", "input")
        yield _sound(encoder.end()), 0


def _sound(data: bytes) -> str:
    return Lines.of(data) if data else ""
