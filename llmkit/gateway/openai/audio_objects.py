"""OpenAI's bodies and answers for sound. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from llmkit.errors import InvalidRequestError
from llmkit.gateway.bodies import Strict
from llmkit.gateway.openai.schemas import Ignored
from llmkit.protocol import Usage
from llmkit.protocol.speech import FORMATS, Hearing, Saying, Segment
from llmkit.speech.formats import srt, text_of, vtt

__all__ = [
    "CONTENT_TYPES",
    "LISTS",
    "SpeechBody",
    "TranscriptionBody",
    "TranslationBody",
    "heard_usage",
    "said_usage",
    "transcript",
]

# The voices of OpenAI's own models, which its clients name.
THEIR_VOICES = frozenset(
    {"alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx"}
    | {"sage", "shimmer", "verse"}
)
LISTS = frozenset({"timestamp_granularities", "include"})
CONTENT_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
Shape = Literal["json", "text", "srt", "verbose_json", "vtt"]


class TranslationBody(Strict):
    """POST /v1/audio/translations, as a form"""

    file: Annotated[bytes, Field(json_schema_extra={"format": "binary"})]
    model: str = "default"
    prompt: Annotated[str, Field(max_length=20_000)] = ""
    response_format: Shape = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    user: str | None = None

    @property
    def wants_words(self) -> bool:
        return False

    @property
    def wants_segments(self) -> bool:
        return True

    def hearing(self, max_s: float | None) -> Hearing:
        """What is asked for. Raises `InvalidRequestError`."""
        return Hearing(self.file, translate=True, temperature=self.temperature, max_s=max_s)


class TranscriptionBody(TranslationBody):
    """POST /v1/audio/transcriptions, as a form"""

    language: Annotated[str, Field(max_length=20)] | None = None
    timestamp_granularities: tuple[Literal["word", "segment"], ...] = ()
    stream: bool = False
    include: Annotated[tuple[str, ...], Field(max_length=0)] = ()
    chunking_strategy: Literal["auto"] | None = None

    @property
    def wants_words(self) -> bool:
        return "word" in self.timestamp_granularities

    @property
    def wants_segments(self) -> bool:
        return not self.wants_words or "segment" in self.timestamp_granularities

    def hearing(self, max_s: float | None) -> Hearing:
        if self.timestamp_granularities and self.response_format != "verbose_json":
            raise InvalidRequestError(
                "timestamp_granularities needs response_format verbose_json.",
                "timestamp_granularities",
            )
        if self.stream and self.response_format in ("srt", "vtt"):
            raise InvalidRequestError(
                f"stream does not go with response_format {self.response_format}; use json, text "
                "or verbose_json.",
                "stream",
            )
        language = self.language.lower() if self.language else None
        return Hearing(self.file, language, False, self.temperature, self.wants_words, max_s)


class VoiceId(Strict):
    id: Annotated[str, Field(max_length=200)]


class SpeechBody(Ignored):
    """POST /v1/audio/speech"""

    model: str = "default"
    input: str
    voice: Annotated[str, Field(max_length=200)] | VoiceId | None = None
    response_format: str = "mp3"
    speed: float = 1.0
    stream_format: Literal["audio", "sse"] = "audio"
    instructions: str | None = None
    seed: int | None = None

    @property
    def voice_name(self) -> str | None:
        return self.voice.id if isinstance(self.voice, VoiceId) else self.voice

    def saying(self, voices: Sequence[str]) -> tuple[Saying, list[str]]:
        """What is asked for, and the fields that have no effect. Raises `InvalidRequestError`.

        OpenAI's own voices stand for the model's default one.
        """
        if self.response_format not in FORMATS:
            raise InvalidRequestError(
                f"response_format: {self.response_format:.20} cannot be written here; there are "
                f"{', '.join(FORMATS)}.",
                "response_format",
            )
        voice, ignored = self.voice_name, []
        if voice in THEIR_VOICES and voice not in voices:
            voice, ignored = None, ["voice"]
        if self.instructions:
            ignored.append("instructions")
        form: Any = self.response_format
        return Saying(voice, self.speed, self.seed, form), ignored


def transcript(
    body: TranslationBody, segments: Sequence[Segment], duration: float, usage: Usage
) -> tuple[str, str]:
    """The answer in the format that is asked for, and its content type."""
    text = text_of(segments)
    match body.response_format:
        case "text":
            return text + "\n", "text/plain; charset=utf-8"
        case "srt":
            return srt(segments), "application/x-subrip; charset=utf-8"
        case "vtt":
            return vtt(segments), "text/vtt; charset=utf-8"
        case "json":
            return json.dumps({"text": text, "usage": heard_usage(usage)}), "application/json"
    is_translation = not isinstance(body, TranscriptionBody)
    heard = segments[0].language if segments else getattr(body, "language", None) or ""
    answer: dict[str, Any] = {
        "task": "translate" if is_translation else "transcribe",
        "language": heard,
        "duration": duration,
        "text": text,
        "usage": {"type": "duration", "seconds": round(duration)},
    }
    if body.wants_segments:
        answer["segments"] = [_segment(i, s) for i, s in enumerate(segments)]
    if body.wants_words:
        answer["words"] = [
            {"word": w.text.strip(), "start": w.start, "end": w.end}
            for s in segments
            for w in s.words
        ]
    return json.dumps(answer), "application/json"


def _segment(index: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": index,
        "seek": round(segment.start * 100),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def heard_usage(usage: Usage) -> dict[str, Any]:
    details = {"audio_tokens": usage.prompt_tokens, "text_tokens": 0}
    return {"type": "tokens", **said_usage(usage), "input_token_details": details}


def said_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
