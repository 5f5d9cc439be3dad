"""The handles of models that hear and speak: `SpeechToText` and `TextToSpeech`.

As `LLM` is for models that write. They compose the layers below and own no memory themselves.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from llmkit.errors import InvalidRequestError, ModelUnloadedError
from llmkit.notebook.sharing import Sharing
from llmkit.notebook.sounds import LiveText, Speech, Transcript, sound_bytes
from llmkit.protocol import EngineStats, GenerationRequest, ModelDescription
from llmkit.protocol.client import EngineClient
from llmkit.protocol.speech import Facts, Hearing, Lines, Saying, Segment
from llmkit.sessions.running import Interrupted, new_id
from llmkit.settings.options import EngineOptions
from llmkit.system.waiting import uninterrupted

if TYPE_CHECKING:
    import numpy as np

    from llmkit.bridge.server import BridgeServer
    from llmkit.notebook.serving import Endpoint

__all__ = ["SpeechToText", "TextToSpeech"]


class _Handle:
    """What both have."""

    def __init__(
        self,
        client: EngineClient,
        bridge: BridgeServer | None = None,
        options: EngineOptions | None = None,
        on_unload: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._client: EngineClient | None = client
        self._description = client.description
        self._sharing, self._options = Sharing(bridge), options or EngineOptions()
        self._on_unload, self._unload_lock = on_unload, threading.Lock()

    @property
    def model(self) -> ModelDescription:
        """Name, size, languages and voices."""
        return self._description

    @property
    def name(self) -> str:
        """The name that callers use."""
        return self._description.name

    @property
    def closed(self) -> bool:
        """Whether the model was unloaded, or its engine has ended."""
        client = self._client  # another thread may unload it
        return client is None or client.state.is_gone

    @property
    def stats(self) -> EngineStats:
        """The engine's current counters."""
        return self.engine.stats()

    @property
    def engine(self) -> EngineClient:
        """The engine client; the engine runs here or in another process."""
        if self._client is None:
            raise ModelUnloadedError(
                f"the model {self.name!r} was unloaded; load it again with llmkit.load()."
            )
        return self._client

    def check_same(
        self,
        options: EngineOptions,
        name: str | None,
        given: Collection[str] | None = None,
        share: bool | None = None,
    ) -> None:
        """Raises `InvalidRequestError` if a second load asks for other settings."""
        mine, wanted = self._options.as_dict(), options.as_dict()
        other = [k for k in wanted if wanted[k] != mine[k] and (given is None or k in given)]
        if name not in (None, self.name):
            other.append("name")
        if share is False and self._sharing.bridge is not None:
            other.append("share")
        if other:
            raise InvalidRequestError(
                f"{self.name!r} is loaded in this process with other settings "
                f"({', '.join(other)}); unload() it first to change them."
            )

    def share(self, kernel_id: str | None) -> None:
        """Share a model loaded with ``share=False`` with other processes of this user."""
        if self._sharing.bridge is None and not self._options.isolated:
            self._sharing.start(self.engine, kernel_id)

    def serve(self, port: int = 0) -> Endpoint:
        """Serve this model to other programs; see `LLM.serve`."""
        return self._sharing.serve(self.engine, port)

    def unload(self) -> None:
        """Free the memory; idempotent. Running requests end with `ModelUnloadedError`."""
        with self._unload_lock:
            client, self._client = self._client, None
        if client is None:
            return
        try:
            self._on_unload(self)
        finally:
            uninterrupted(lambda: self._close(client))

    def _close(self, client: EngineClient) -> None:
        self._sharing.close()
        client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.unload()

    def __repr__(self) -> str:
        kind, known = type(self).__name__, ", ".join(self._knows())
        return f"{kind}({self.name!r}, {'unloaded' if self.closed else known})"

    def _knows(self) -> tuple[str, ...]:
        return self._description.languages

    @contextlib.contextmanager
    def _events(
        self, request: GenerationRequest
    ) -> Iterator[Generator[Facts | Segment | bytes, None, None]]:
        """What the engine says, as it says it. Leaving the context ends the request."""
        with self.engine.submit(request) as stream:
            lines = Lines()
            yield (event for text in stream for event in lines.read(text))


class SpeechToText(_Handle):
    """A model that writes down speech.

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
        (an array of floats or 16-bit integers, with their ``rate``; (n, channels) or (n,)).

        Readable are WAV, MP3, FLAC, Ogg and AIFF. ``words`` adds the times of words, ``translate``
        gives English; ``prompt`` is text that may have come before, whose spelling is followed.
        ``show``: print segments as they come; by default in notebooks and terminals. ■ stops it,
        and ``last`` has what was heard so far.

        Raises `InvalidRequestError` for what is no sound, and for unknown languages.
        """
        hearing = Hearing(sound_bytes(sound, rate), language, translate, temperature, words)
        request = GenerationRequest(new_id(), prompt=prompt, hearing=hearing)
        segments: list[Segment] = []
        duration, began = 0.0, time.monotonic()
        live = LiveText(f"{self.name} listens", show)
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


class TextToSpeech(_Handle):
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
        that is not here, and for texts above 4096 characters.
        """
        saying = Saying(voice, speed, seed, "wav")
        request = GenerationRequest(new_id(), prompt=text, saying=saying)
        try:
            with self._events(request) as events:
                parts = [event for event in events if isinstance(event, bytes)]
        except KeyboardInterrupt:
            raise Interrupted("speaking was stopped; nothing goes on") from None
        return Speech(b"".join(parts), text, play=play)

    def _knows(self) -> tuple[str, ...]:
        return self.voices
