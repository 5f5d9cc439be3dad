"""Speech with the real models: what the voice says is what Whisper hears; sound files of strangers;
cancelling, sharing, and the handles of notebooks."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from speech import HOSTILE, SENTENCES, cues, encoded, folded, silence, tone, wav

import llmkit
from llmkit import SpeechToText, TextToSpeech
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import BridgeServer
from llmkit.errors import (
    EngineGoneError,
    InvalidRequestError,
    ModelLoadError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.models.registry import resolve
from llmkit.protocol import FinishReason, GenerationRequest, SamplingParams
from llmkit.protocol.speech import Facts, Hearing, Lines, Saying, Segment
from llmkit.runtime.speech import LocalSpeech
from llmkit.sessions.running import Interrupted
from llmkit.settings.options import EngineOptions
from llmkit.speech.decoding import RATE

pytestmark = pytest.mark.model
NUMBER = itertools.count()
LONG = " ".join(
    f"{who} {did} {what}."
    for who, did, what in itertools.product(
        ("The teacher", "My neighbour", "A tall man", "Her sister", "The old captain"),
        ("carried", "painted", "forgot", "described"),
        ("a wooden box", "the garden gate", "three letters"),
    )
)


@pytest.fixture(scope="module")
def whisper() -> Iterator[SpeechToText]:
    with llmkit.load("whisper-tiny.en", share=False) as handle:
        yield handle


@pytest.fixture(scope="module")
def voice() -> Iterator[TextToSpeech]:
    with llmkit.load("hibari", share=False) as handle:
        yield handle


def linked(folder: Path) -> Path:
    """The model's folder once more: another model for all that llmkit knows."""
    folder.mkdir()
    source = Path(resolve("whisper-tiny.en").path).parent
    for file in source.iterdir():
        try:
            os.link(file, folder / file.name)
        except OSError:
            shutil.copy(file, folder)
    return folder


def said(engine: object, text: str, **options: object) -> bytes:
    request = GenerationRequest(f"say-{next(NUMBER)}", prompt=text, saying=Saying(**options))  # type: ignore[arg-type]
    text = engine.submit(request).result().text  # type: ignore[attr-defined]
    return b"".join(e for e in Lines().read(text) if isinstance(e, bytes))


def hearing(data: bytes, **options: object) -> GenerationRequest:
    return GenerationRequest(f"hear-{next(NUMBER)}", prompt="", hearing=Hearing(data, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("sentence", SENTENCES)
def test_whisper_hears_what_the_voice_says(
    whisper: SpeechToText, voice: TextToSpeech, sentence: str
) -> None:
    heard = whisper.transcribe(voice.say(sentence, seed=1))
    assert folded(heard.text) == folded(sentence)
    assert heard.language == "en" and heard.duration > 1


def test_times_of_words_grow_and_lie_in_the_sound(
    whisper: SpeechToText, voice: TextToSpeech
) -> None:
    sound = voice.say(" ".join(SENTENCES[:3]), seed=2)
    heard = whisper.transcribe(sound, words=True)
    assert folded(" ".join(w.text for w in heard.words)) == folded(" ".join(SENTENCES[:3]))
    times = [t for word in heard.words for t in (word.start, word.end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= sound.duration + 0.01
    for text in (heard.srt(), heard.vtt()):
        read = cues(text)
        assert folded(" ".join(line for _, _, line in read)) == folded(heard.text)
        assert all(start <= end for start, end, _ in read)
        assert [round(c[0], 2) for c in read] == [round(s.start, 2) for s in heard.segments]


def test_sound_comes_sentence_by_sentence(voice: TextToSpeech) -> None:
    for kind in ("mp3", "opus", "wav", "pcm"):
        request = GenerationRequest("parts", prompt=LONG, saying=Saying(seed=1, format=kind))
        lines, num_parts = Lines(), 0
        stream = voice.engine.submit(request)
        for text in stream:
            num_parts += sum(isinstance(e, bytes) for e in lines.read(text))
            if num_parts == 2:
                break
        assert stream.wait(30) is not None and stream.wait(30).finish_reason is FinishReason.ABORT  # type: ignore[union-attr]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(whisper: SpeechToText, name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        whisper.transcribe(HOSTILE[name])
    assert caught.value.param == "file" and "file:" in str(caught.value)
    assert not whisper.closed


def test_hours_of_silence_are_refused_before_they_are_held(whisper: SpeechToText) -> None:
    data = encoded(silence(3 * 3600, 8000), 8000, format="FLAC")
    assert len(data) < 1_000_000
    before = psutil.Process().memory_info().rss
    with pytest.raises(InvalidRequestError, match="longer than 10 minutes"):
        whisper.engine.submit(hearing(data, max_s=600)).result()
    assert psutil.Process().memory_info().rss - before < 200e6


def test_nobody_speaks_in_silence(whisper: SpeechToText) -> None:
    heard = whisper.transcribe(silence(40), rate=RATE)
    assert heard.text == "" and heard.segments == () and heard.duration == 40
    assert "nobody" in heard._repr_html_()


def test_wrong_requests_are_refused_by_name(whisper: SpeechToText, voice: TextToSpeech) -> None:
    good = wav(tone(1, RATE))
    for call, param in (
        (lambda: whisper.transcribe(good, language="de"), "language"),
        (lambda: whisper.transcribe(good, translate=True), "model"),
        (lambda: whisper.transcribe(good, temperature=2), "temperature"),
        (lambda: whisper.transcribe(np.zeros(5)), "rate"),
        (lambda: whisper.transcribe(np.zeros((2, 2, 2)), rate=RATE), "sound"),
        (lambda: voice.say("x", voice="nobody"), "voice"),
        (lambda: voice.say("x", speed=9), "speed"),
        (lambda: voice.say("  "), "input"),
        (lambda: voice.say("x" * 5000), "input"),
        (lambda: Saying(format="aac"), "response_format"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequestError) as caught:
            call()
        assert caught.value.param == param
    for engine, other in ((whisper.engine, hearing(good)), (voice.engine, None)):
        text = GenerationRequest("t", SamplingParams(max_tokens=3), prompt="hello")
        with pytest.raises(InvalidRequestError, match="/v1/audio/"):
            engine.submit(text)
        if other is not None:
            with pytest.raises(InvalidRequestError, match="speaks text aloud"):
                voice.engine.submit(other)
    with pytest.raises(FileNotFoundError):
        whisper.transcribe("nowhere.wav")


def test_an_aborted_request_ends_at_once(whisper: SpeechToText, voice: TextToSpeech) -> None:
    sound = voice.say(LONG[:4000], seed=1).wav
    streams = [whisper.engine.submit(hearing(sound)) for _ in range(3)]
    running = iter(streams[0])
    next(running)  # the facts
    for stream in streams:
        stream.close()
    ends = [stream.wait(30) for stream in streams]
    assert [end and end.finish_reason for end in ends] == [FinishReason.ABORT] * 3
    assert whisper.engine.stats().num_waiting == 0
    assert whisper.transcribe(voice.say(SENTENCES[0], seed=1)).text


class Slow:
    """A `Speaker` that waits to be let on."""

    voices, rate = ("a",), 24_000

    def __init__(self) -> None:
        self.said: list[str] = []
        self.go = threading.Semaphore(0)

    def speak(self, text: str, *_: object) -> Iterator[np.ndarray]:
        self.go.acquire()
        self.said.append(text)
        if text == "crash":
            raise RuntimeError("broken")
        yield np.zeros(240, np.float32)

    def close(self) -> None:
        pass


def test_callers_take_turns_within_a_bound() -> None:
    model = Slow()
    engine = LocalSpeech(resolve("hibari"), model, EngineOptions(max_waiting=4))  # type: ignore[attr-defined]

    def ask(text: str, caller: str) -> object:
        request = GenerationRequest(f"{text}-{caller}-{next(NUMBER)}", prompt=text, caller=caller)
        from dataclasses import replace

        return engine.submit(replace(request, saying=Saying()))

    streams = [ask("first", "ann")]
    while not engine.stats().num_running:
        time.sleep(0.01)
    streams += [ask(f"ann {i}", "ann") for i in range(4)]
    with pytest.raises(QueueFullError):
        ask("ann 5", "ann")
    streams.append(ask("bob", "bob"))  # takes the place of ann's newest
    with pytest.raises(QueueFullError):
        streams[4].result(30)  # type: ignore[attr-defined]
    for _ in range(5):  # one for each
        model.go.release()
    for stream in (*streams[:4], streams[5]):
        assert stream.result(30)  # type: ignore[attr-defined]
    assert model.said.index("bob") <= 2
    broken = ask("crash", "ann")
    model.go.release()
    with pytest.raises(llmkit.EngineError, match="broken"):
        broken.result(30)  # type: ignore[attr-defined]
    waiting = ask("last", "ann")
    model.go.release()
    assert waiting.result(30)  # type: ignore[attr-defined]
    left = [ask("never", "ann") for _ in range(2)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine.state.is_gone:
        time.sleep(0.01)
    model.go.release()
    closing.join(30)
    for stream in left[1:]:
        with pytest.raises((ModelUnloadedError, EngineGoneError)):
            stream.result(30)  # type: ignore[attr-defined]
    with pytest.raises(ModelUnloadedError):
        ask("late", "ann")


def test_speech_crosses_the_bridge(whisper: SpeechToText, voice: TextToSpeech) -> None:
    for handle in (whisper, voice):
        server = BridgeServer(handle.engine, None)
        client = BridgeClient(server.connection)
        try:
            assert client.description == handle.model
            if handle is voice:
                assert said(client, SENTENCES[0], seed=5) == said(
                    handle.engine, SENTENCES[0], seed=5
                )
                continue
            sound = voice.say(SENTENCES[0], seed=1).wav
            events = list(Lines().read(client.submit(hearing(sound)).result().text))
            assert isinstance(events[0], Facts) and isinstance(events[1], Segment)
            assert folded(events[1].text) == folded(SENTENCES[0])
            with pytest.raises(InvalidRequestError) as caught:
                client.submit(hearing(b"nonsense")).result()
            assert caught.value.param == "file"
        finally:
            client.close()
            server.close("done")


def test_a_model_in_a_process_of_its_own(voice: TextToSpeech, tmp_path: Path) -> None:
    file = voice.say(SENTENCES[3], seed=1).save(tmp_path / "said.flac")
    folder = linked(tmp_path / "whisper-copy")
    with llmkit.load(folder, name="alone", share=False, isolated=True) as alone:
        assert isinstance(alone, SpeechToText)
        assert folded(alone.transcribe(file).text) == folded(SENTENCES[3])


def test_sound_and_text_as_files(
    whisper: SpeechToText, voice: TextToSpeech, tmp_path: Path
) -> None:
    speech = voice.say(SENTENCES[0], seed=1)
    assert "<audio controls aria-label" in speech._repr_html_()
    for suffix in ("wav", "mp3", "flac", "opus", "ogg"):
        file = speech.save(tmp_path / f"said.{suffix}")
        assert folded(whisper.transcribe(str(file)).text) == folded(SENTENCES[0])
    with pytest.raises(InvalidRequestError):
        speech.save(tmp_path / "said.aac")
    heard = whisper.transcribe(speech.samples, rate=speech.rate)
    assert folded(heard.text) == folded(SENTENCES[0])
    assert cues(heard.save(tmp_path / "a.srt").read_text()) == cues(heard.srt())
    assert heard.save(tmp_path / "a.txt").read_text() == heard.text
    assert whisper.last is heard and heard.text in heard._repr_html_()


def test_the_stop_button_leaves_nothing_running(
    whisper: SpeechToText, voice: TextToSpeech, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmkit.notebook import sounds

    sound = voice.say(" ".join(SENTENCES), seed=1)

    def stop(self: object, segment: Segment) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sounds.LiveText, "add", stop)
    with pytest.raises(Interrupted):
        whisper.transcribe(sound)
    assert whisper.last is not None and len(whisper.last.segments) == 1
    end = time.monotonic() + 30
    while whisper.stats.num_running and time.monotonic() < end:
        time.sleep(0.02)
    assert not whisper.stats.num_running


def test_segments_are_printed_as_they_come(
    whisper: SpeechToText, voice: TextToSpeech, capsys: pytest.CaptureFixture[str]
) -> None:
    whisper.transcribe(voice.say(SENTENCES[0], seed=1), show=True)
    assert folded(capsys.readouterr().out)[-3:] == ["the", "lazy", "dog"]
    whisper.transcribe(voice.say(SENTENCES[0], seed=1))
    assert capsys.readouterr().out == ""


def test_handles_are_like_others(whisper: SpeechToText) -> None:
    assert llmkit.load("whisper-tiny.en") is whisper
    assert llmkit.models["whisper-tiny.en"] is whisper
    assert repr(whisper) == "SpeechToText('whisper-tiny.en', en)"
    stored = {m.id: m for m in llmkit.models()}
    assert stored["hibari"].architecture == "hibari" and not stored["hibari"].fault
    assert stored["whisper-tiny.en"].size_bytes > 70e6
    with pytest.raises(InvalidRequestError, match="other settings"):
        llmkit.load("whisper-tiny.en", threads=1)


def test_a_folder_of_whisper_is_a_model(whisper: SpeechToText, tmp_path: Path) -> None:
    folder = tmp_path / "my-whisper"
    folder.symlink_to(Path(whisper.model.path).parent)
    assert llmkit.load(folder) is whisper
    copy = linked(tmp_path / "copy")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError, match="tokenizer"):
        llmkit.load(copy)
    (copy / "model.bin").unlink()
    (copy / "model.bin").write_bytes(b"nonsense")
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError):
        llmkit.load(copy)


def test_memory_is_given_back(whisper: SpeechToText, tmp_path: Path) -> None:
    folder = linked(tmp_path / "again")
    rss = psutil.Process().memory_info
    before = rss().rss
    handle: Any = llmkit.load(folder, share=False)
    with handle:
        loaded = rss().rss - before
        handle.transcribe(silence(5), rate=RATE)
    assert loaded > 30e6 and rss().rss - before < loaded / 2
    assert handle.closed
    with pytest.raises(ModelUnloadedError):
        handle.transcribe(silence(5), rate=RATE)
