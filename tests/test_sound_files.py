"""Sound as bytes: what is read of strangers' files, what is written, and subtitles."""

from __future__ import annotations

import importlib
import itertools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from speech import SENTENCES, cues, decoded, encoded, tone, wav

import llmkit
from llmkit.errors import InvalidRequestError, ModelLoadError, ModelNotFoundError
from llmkit.media.resampling import Resampler
from llmkit.protocol.speech import FORMATS, Hearing, Segment
from llmkit.speech import extra
from llmkit.speech.decoding import RATE, pcm_of
from llmkit.speech.encoding import encoder_of
from llmkit.speech.formats import srt, vtt
from llmkit.speech.hibari import Hibari
from llmkit.speech.whisper import Whisper, _pieces


def test_subtitles_keep_their_form_whatever_is_said() -> None:
    segments = [Segment(" a --> b\n\n2\n<i>", 0.0, 1.0), Segment(" ", 3600.0, 3600.5)]
    assert [c[:2] for c in cues(srt(segments))] == [(0.0, 1.0), (3600.0, 3600.5)]
    assert [c[:2] for c in cues(vtt(segments))] == [(0.0, 1.0), (3600.0, 3600.5)]
    assert "<i>" not in vtt(segments)


def said(voice: Hibari, text: str, kind: str, seed: int, speed: float = 1.0) -> bytes:
    encoder = encoder_of(kind, voice.rate)  # type: ignore[arg-type]
    parts = [encoder.push(part) for part in voice.speak(text, None, speed, seed)]
    return b"".join(parts) + encoder.end()


def test_formats_decode_to_the_same_length() -> None:
    voice = Hibari()
    text = " ".join(SENTENCES[:2])
    pcm = said(voice, text, "pcm", 3)
    for kind in FORMATS:
        data = said(voice, text, kind, 3)
        assert data == said(voice, text, kind, 3), kind
        if kind == "pcm":
            continue
        samples, rate = decoded(data)
        assert rate == 24_000 and abs(len(samples) / rate - len(pcm) / 48_000) <= 0.05, kind
        plain = np.frombuffer(pcm, "<i2") / 32768
        middle = slice(24_000, 72_000)
        assert np.corrcoef(samples[middle], plain[middle])[0, 1] > 0.9, kind
    assert pcm != said(voice, text, "pcm", 4)
    slow = said(voice, text, "pcm", 3, 0.5)
    assert len(slow) > 1.5 * len(pcm)


def test_noise_behind_true_headers_harms_nobody() -> None:
    draw = random.Random(7)
    whole = [
        encoded(tone(1, 24_000), 24_000, format="MP3"),
        encoded(tone(1, 24_000), 24_000, format="FLAC"),
        encoded(tone(1, 24_000), 24_000, format="OGG", subtype="OPUS"),
        wav(tone(1, 24_000), 24_000),
    ]
    for data in whole * 5:
        broken = bytearray(data[: draw.randrange(60, len(data))])
        for _ in range(20):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        try:
            pcm = pcm_of(bytes(broken), 60)
        except InvalidRequestError as error:
            assert " at 0x" not in str(error)
            continue
        assert np.isfinite(pcm).all() and len(pcm) <= 60 * RATE


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 44_100, 48_000, 48_001])
def test_any_rate_becomes_the_models(rate: int) -> None:
    sound = tone(2, rate)
    stereo = np.stack([sound, sound], axis=1)
    made = pcm_of(encoded(stereo, rate, format="WAV", subtype="FLOAT"))
    assert len(made) == RATE * 2
    middle = slice(RATE // 2, RATE)
    assert np.abs(made[middle] - tone(2, RATE)[middle]).max() < 5e-3


def test_a_resampler_gives_the_same_in_any_blocks() -> None:
    sound = np.random.default_rng(1).normal(0, 0.1, 30_000).astype(np.float32)
    whole = Resampler(44_100, RATE)
    at_once = np.concatenate([whole.push(sound), whole.end()])
    parts = Resampler(44_100, RATE)
    pieces = [parts.push(part) for part in np.array_split(sound, 37)]
    assert np.allclose(np.concatenate([*pieces, parts.end()]), at_once, atol=1e-6)


def test_long_sound_is_cut_where_it_is_quiet() -> None:
    sound = np.ones(RATE * 700, np.float32)
    sound[RATE * 290 : RATE * 291] = 0
    pieces = list(_pieces(sound))
    assert 290 * RATE <= pieces[1][0] <= 291 * RATE
    assert np.concatenate([piece for _, piece in pieces]).shape == sound.shape
    assert [at for at, _ in pieces] == list(
        itertools.accumulate([len(p) for _, p in pieces[:-1]], initial=0)
    )


class Deciding:
    """faster-whisper's model: it takes silence for English, and hears German."""

    def __init__(self) -> None:
        self.languages: list[str | None] = []

    def transcribe(self, piece: np.ndarray, language: str | None, **_: Any) -> tuple[Any, Any]:
        self.languages.append(language)
        language = language or ("de" if piece.any() else "en")
        found = SimpleNamespace(
            text=" Guten Tag.",
            start=0.0,
            end=1.0,
            words=None,
            tokens=(1,),
            avg_logprob=0.0,
            compression_ratio=1.0,
            no_speech_prob=0.0,
            temperature=0.0,
        )
        return [found] if piece.any() else [], SimpleNamespace(language=language)


@pytest.mark.parametrize(
    ("given", "asked"), [(None, [None, None, "de", "de"]), ("fr", ["fr", "fr", "fr", "fr"])]
)
def test_silence_decides_no_language(given: str | None, asked: list[str | None]) -> None:
    sound = np.zeros(RATE * 1000, np.float32)
    sound[RATE * 400 :] = 0.1
    whisper, library = object.__new__(Whisper), Deciding()
    whisper._model, whisper._stops = library, SimpleNamespace()
    segments = list(whisper.segments(sound, Hearing(b"", given)))
    assert library.languages == asked
    assert {segment.language for segment in segments} == {given or "de"} and len(segments) == 3


def test_what_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(f"No module named {name!r}")

    with monkeypatch.context() as only:
        only.setattr(importlib, "import_module", missing)
        for name in ("soundfile", "faster_whisper", "hibari"):
            with pytest.raises(ModelLoadError, match=r'pip install "llmkit\[speech\]"'):
                extra.need(name)
    monkeypatch.setattr("llmkit.models.registry._in_module", lambda *_: [])
    with pytest.raises(ModelNotFoundError, match=r'pip install "llmkit\[speech\]"'):
        llmkit.load("hibari", name="missing")


def test_an_encoder_keeps_what_is_loud_at_once() -> None:
    loud = tone(1, 24_000, 1000.0)
    for kind in ("mp3", "opus"):
        encoder = encoder_of(kind, 24_000)  # type: ignore[arg-type]
        samples, _ = decoded(encoder.push(loud) + encoder.end())
        assert abs(len(samples) / 24_000 - 1) < 0.075
