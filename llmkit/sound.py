"""The handles of models that hear and speak: `SpeechToText` and `TextToSpeech`.

As `LLM` is for models that write.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llmkit.errors import EngineError, ModelUnloadedError
from llmkit.handle import Handle
from llmkit.notebook.sounds import LiveText, Speech, Transcript, sound_bytes
from llmkit.protocol import FinishReason, GenerationRequest
from llmkit.protocol.speech import Facts, Hearing, Lines, Saying, Segment
from llmkit.sessions.running import Interrupted, new_id

if TYPE_CHECKING:
    import numpy as np

__all__ = ["SpeechToText", "TextToSpeech"]


class _Sounding(Handle):
    """What both have beside a `Handle`."""

    def __repr__(self) -> str:
        kind, known = type(self).__name__, ", ".join(self._knows())
        return f"{kind}({self.name!r}, {'unloaded' if self.closed else known})"

    def _knows(self) -> tuple[str, ...]:
        return self._description.languages

    @contextlib.contextmanager
    def _events(
        self, request: GenerationRequest
    ) -> Iterator[Generator[Facts | Segment | bytes, None, None]]:
        """What the engine says, as it says it. Leaving the context ends the request.

        Raises what the engine raises, and `ModelUnloadedError` or `EngineError` for a request that
        was ended elsewhere before it was done.
        """
        with self.engine.submit(request) as stream:
            lines = Lines()
            yield (event for text in stream for event in lines.read(text))
            end = stream.channel.result
        if end is not None and end.finish_reason is FinishReason.ABORT:
            raise (
                ModelUnloadedError("the model was unloaded during this request")
                if self.closed
                else EngineError("the request was ended before it was done; send it again")
            )


class SpeechToText(_Sounding):
    """A model that transcribes speech.

    >>> whisper = llmkit.load("whisper-tiny.en")        # doctest: +SKIP
    >>> print(whisper.transcribe("meeting.mp3"))        # doctest: +SKIP
    """

    last: Transcript | None = None  # the latest; after an interrupt what was heard so far

    def transcribe(
        self,
        sound: str | Path | bytes | Speech | np.ndarray,
        *,
        rate: int | None = None,
        language: str | None = None,
        translate: bool = False,
        words: bool = False,
        prompt: str = "",
        temperature: float | None = None,
        show: bool | None = None,
    ) -> Transcript:
        """Write down a sound: a path, a file's bytes, what `TextToSpeech.say` returned, or samples
        (an array of floats from -1 to 1 or of integers, which are scaled by their type, with their
        ``rate`` a second; (n, channels) or (n,)).

        Readable are WAV, MP3, FLAC, Ogg and AIFF. ``words`` adds the times of words, ``translate``
        gives English; ``prompt`` is text that may have come before, whose spelling is followed.
        ``show``: print segments as they come; by default in notebooks and terminals. ■ stops it,
        and ``last`` has what was heard so far.

        Raises `InvalidRequestError` for what is no sound, and for unknown languages, and
        `ModelUnloadedError` if it is unloaded meanwhile.
        """
        hearing = Hearing(sound_bytes(sound, rate), language, translate, temperature, words)
        request = GenerationRequest(new_id(), prompt=prompt, hearing=hearing)
        segments: list[Segment] = []
        duration, began = 0.0, time.monotonic()
        live = LiveText(self.name, show)
        self.last = None
        finished = False
        try:
            with self._events(request) as events:
                for event in events:
                    if isinstance(event, Facts):
                        duration = event.duration
                    elif isinstance(event, Segment):
                        segments.append(event)
                        live.add(event)
            finished = True
        except KeyboardInterrupt:
            raise Interrupted(
                f"transcribing was stopped; what {self.name!r} heard so far is in its .last"
            ) from None
        finally:
            live.close(finished=finished)
            self.last = Transcript(tuple(segments), duration, time.monotonic() - began)
        return self.last


class TextToSpeech(_Sounding):
    """A model that speaks.

    >>> voice = llmkit.load("hibari")                   # doctest: +SKIP
    >>> voice.say("Good morning.").save("hello.mp3")    # doctest: +SKIP
    """

    @property
    def voices(self) -> tuple[str, ...]:
        """The voices that are here, the default first."""
        return self._description.voices

    def say(
        self,
        text: str,
        *,
        voice: str | None = None,
        speed: float = 1.0,
        seed: int | None = None,
        play: bool = False,
    ) -> Speech:
        """Speak a text; a notebook shows a player, ``play`` starts it at once.

        The same ``seed`` gives the same sound. ■ stops it. Raises `InvalidRequestError` for a voice
        that is not here, and for texts above 4096 characters, and `ModelUnloadedError` after an
        ``unload()`` meanwhile.
        """
        saying = Saying(voice, speed, seed, "wav")
        request = GenerationRequest(new_id(), prompt=text, saying=saying)
        try:
            with self._events(request) as events:
                parts = [event for event in events if isinstance(event, bytes)]
        except KeyboardInterrupt:
            raise Interrupted("speaking was stopped") from None
        return Speech(b"".join(parts), text, play=play)

    def _knows(self) -> tuple[str, ...]:
        return self.voices
