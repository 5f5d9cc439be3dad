"""`LocalSpeech`: a model of this process that hears or speaks, behind the `EngineClient` protocol.

One request at a time, on the thread of a `SerialEngine`. Between two segments, or sentences, it
looks whether the request was aborted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from llmkit.errors import InvalidRequestError
from llmkit.models.registry import ModelSpec
from llmkit.models.speech_files import speech_kind
from llmkit.protocol import GenerationRequest, ModelDescription
from llmkit.protocol.speech import (
    MAX_SPOKEN_CHARS,
    SOUND_TOKENS,
    Facts,
    Lines,
    Speaker,
    Transcriber,
)
from llmkit.runtime.running import running
from llmkit.runtime.serial import SerialEngine
from llmkit.runtime.serial_jobs import Job
from llmkit.settings.options import EngineOptions
from llmkit.speech.decoding import RATE, pcm_of
from llmkit.speech.encoding import encoder_of
from llmkit.speech.extra import need

__all__ = ["LocalSpeech", "open_speech"]

HEARD_TOKENS = 448  # the text that Whisper can follow and write at once
CANNOT = "it cannot generate text"
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


class LocalSpeech(SerialEngine):
    """An `EngineClient` that only hears (``model`` is a `Transcriber`) or only speaks."""

    kind = "speech"

    def __init__(
        self,
        spec: ModelSpec,
        model: Transcriber | Speaker,
        options: EngineOptions,
        name: str | None = None,
        *,
        on_gpu: bool = False,
    ) -> None:
        self._model = model
        hears = hasattr(model, "segments")
        description = ModelDescription(
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
        super().__init__(description, options.max_waiting)

    def _does(self) -> str:
        name = self.description.name
        if self.description.hears:
            return f"{name!r} transcribes speech (/v1/audio/transcriptions); {CANNOT}."
        return f"{name!r} speaks text aloud (/v1/audio/speech); {CANNOT}."

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
                    f"{known.name!r} knows English only, so it cannot translate: that needs a "
                    "multilingual Whisper, such as the folder of faster-whisper-small. "
                    "/v1/audio/transcriptions writes down what is said in English.",
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

    def _lines(self, job: Job) -> Iterator[tuple[str, int]]:
        """The lines of the stream, and how many tokens each has."""
        return self._hearing(job) if job.request.hearing is not None else self._saying(job)

    def _free(self) -> None:
        self._model.close()

    def _hearing(self, job: Job) -> Iterator[tuple[str, int]]:
        hearing = job.request.hearing
        assert hearing is not None
        pcm = pcm_of(hearing.audio, hearing.max_s, lambda: job.is_over)
        # Only the samples are needed from here on.
        hearing = replace(hearing, audio=b"")
        job.request = replace(job.request, hearing=hearing)
        if job.is_over:
            return
        job.prompt_tokens = round(len(pcm) / RATE * SOUND_TOKENS)
        yield Lines.of(Facts(round(len(pcm) / RATE, 3))), 0
        hears: Transcriber = self._model  # type: ignore[assignment]
        prompt = str(job.request.prompt)
        for segment in hears.segments(pcm, hearing, prompt, lambda: job.is_over):
            yield Lines.of(segment), len(segment.tokens)

    def _saying(self, job: Job) -> Iterator[tuple[str, int]]:
        saying, prompt = job.request.saying, str(job.request.prompt)
        assert saying is not None
        speaker: Speaker = self._model  # type: ignore[assignment]
        encoder = encoder_of(saying.format, speaker.rate)
        job.prompt_tokens = len(prompt)
        made = 0
        how = saying.voice, saying.speed, saying.seed
        for sound in speaker.speak(prompt, *how, lambda: job.is_over):
            made += len(sound)
            yield _sound(encoder.push(sound)), int(len(sound) / speaker.rate / FRAME_S)
        if not made and not job.is_over:
            raise InvalidRequestError("input: there is nothing in it that can be spoken.", "input")
        yield _sound(encoder.end()), 0


def _sound(data: bytes) -> str:
    return Lines.of(data) if data else ""
