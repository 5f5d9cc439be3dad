"""What callers send to models of speech costs what it is worth: texts that spell out, sound files
that go on for ever, arrays of any type, threads that die, clients that linger."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from speech import encoded, silence, tone, wav

import llmkit
from llmkit.errors import EngineError, EngineGoneError, InvalidRequestError, ModelUnloadedError
from llmkit.gateway import lingering
from llmkit.gateway.forms import fields_of
from llmkit.media.resampling import Resampler
from llmkit.models.registry import ModelSpec, resolve
from llmkit.notebook.sounds import sound_bytes
from llmkit.protocol import GenerationRequest
from llmkit.protocol.speech import MAX_SPOKEN_CHARS, Hearing, Segment
from llmkit.runtime.speech import LocalSpeech
from llmkit.settings.options import EngineOptions
from llmkit.sound import SpeechToText, TextToSpeech
from llmkit.speech import hibari
from llmkit.speech.decoding import RATE, pcm_of
from llmkit.speech.sentences import MAX_CHARS, sentences_of
from llmkit.wanted import worker_task
from llmkit.workers.budget import Need, need_of

CHARACTERS = random.Random(1)
NUMBERS = "777777777777777 " * 64
TEXTS = {
    "one long number": "7" * MAX_SPOKEN_CHARS,
    "many numbers": "777777777777777 " * 256,
    "NULs": "\0" * MAX_SPOKEN_CHARS,
    "emoji": "😀" * MAX_SPOKEN_CHARS,
    "hyphens": "a-" * (MAX_SPOKEN_CHARS // 2),
    "cases": "aB" * (MAX_SPOKEN_CHARS // 2),
    "digits and letters": "1a" * (MAX_SPOKEN_CHARS // 2),
    "signs": "@/" * (MAX_SPOKEN_CHARS // 2),
    "brackets": "[" * MAX_SPOKEN_CHARS,
    "superscripts": "²" * MAX_SPOKEN_CHARS,
    "links": "[a](/" * 800,
    "ASCII": "".join(chr(CHARACTERS.randrange(32, 127)) for _ in range(MAX_SPOKEN_CHARS)),
    "Unicode": "".join(chr(CHARACTERS.randrange(1, 0x3000)) for _ in range(MAX_SPOKEN_CHARS)),
}


class Counting:
    """A voice's library in place of the model: it counts what is asked of it."""

    def __init__(self, voice: hibari.Hibari) -> None:
        (self._real,) = voice._loaded.values()
        self.longest = self.total = 0
        self.split_sentences, self.ids = self._real.split_sentences, self._real.ids

    def g2p(self, sentence: str) -> str:
        assert len(sentence) <= MAX_CHARS
        return str(self._real.g2p(sentence))

    def from_ids(self, ids: list[int], *_: object) -> np.ndarray:
        self.longest, self.total = max(self.longest, len(ids)), self.total + len(ids)
        return np.zeros(240, np.float32)


@pytest.fixture(scope="module")
def voice() -> Iterator[hibari.Hibari]:
    voice = hibari.Hibari()
    yield voice
    voice.close()


@pytest.fixture
def counting(voice: hibari.Hibari, monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(voice)
    monkeypatch.setattr(voice, "_loaded", {voice.voices[0]: counting})
    return counting


@pytest.mark.model
@pytest.mark.parametrize("name", TEXTS)
def test_no_text_is_too_much_for_the_voice(
    voice: hibari.Hibari, counting: Counting, name: str
) -> None:
    for speed in (1.0, 0.25):
        before = counting.total
        try:
            for _ in voice.speak(TEXTS[name], None, speed, 1):
                pass
        except InvalidRequestError as error:
            assert error.param == "input" and counting.total == before
    assert counting.longest <= hibari.MOST + 2
    assert counting.total <= 2 * hibari.MAX_S * hibari.PHONEMES_S


@pytest.mark.model
def test_numbers_are_spoken_in_pieces_and_can_be_stopped(
    voice: hibari.Hibari, counting: Counting
) -> None:
    asked = itertools.count()
    assert len(list(voice.speak(NUMBERS, None, 1.0, 1, lambda: next(asked) < 0))) >= 32
    assert counting.longest <= hibari.MOST + 2
    before = counting.total
    assert not list(voice.speak(NUMBERS, None, 1.0, 1, lambda: True))
    assert counting.total == before


@pytest.mark.model
def test_usual_texts_sound_as_the_library_says_them(voice: hibari.Hibari) -> None:
    text = "Dr. Smith paid $9.99 on the 3rd of March 2024, at 7:30 pm.\nA state-of-the-art e-mail!"
    (library,) = voice._loaded.values()
    made = np.concatenate(list(voice.speak(text, None, 1.0, 3)))
    assert np.array_equal(made, library(text, seed=3))


@pytest.mark.model
def test_numbers_without_a_name_are_read_digit_by_digit(voice: hibari.Hibari) -> None:
    assert sentences_of("I have " + "7" * 40, lambda text: [text]) == ["I have " + "7 " * 39 + "7"]
    assert sum(map(len, voice.speak("7" * 40, None, 1.0, 1))) > 5 * voice.rate


@pytest.mark.model
def test_what_a_library_fails_of_is_the_texts_fault(
    voice: hibari.Hibari, counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(sentence: str) -> str:
        raise IndexError("list index out of range")

    monkeypatch.setattr(counting, "g2p", fail)
    with pytest.raises(InvalidRequestError, match="cannot read 'Hello'") as caught:
        list(voice.speak("Hello", None, 1.0, 1))
    assert caught.value.param == "input"


@pytest.mark.parametrize("rate", [4001, 8000, 11025, 22050, 44100, 44101, 96000, 191_999])
def test_every_rate_keeps_time(rate: int) -> None:
    resampler, sound = Resampler(rate, RATE), tone(5, rate)
    made = np.concatenate([*map(resampler.push, np.array_split(sound, 7)), resampler.end()])
    expected = tone(5, RATE)
    assert abs(len(made) - len(expected)) <= 1
    inner = slice(500, len(expected) - 500)
    assert np.abs(made[inner] - expected[inner]).max() < 2e-3


def test_eight_channels_are_heard_together() -> None:
    sound = np.stack([tone(1, 48_000)] * 8, axis=1)
    made = pcm_of(encoded(sound, 48_000, format="WAV", subtype="FLOAT"))
    assert np.abs(made[500:15_500] - tone(1, RATE)[500:15_500]).max() < 1e-3


def test_a_file_is_read_no_further_once_nobody_waits() -> None:
    asked = itertools.count(1)
    sound = encoded(silence(3600, 8000), 8000, format="FLAC")
    made = pcm_of(sound, None, lambda: next(asked) > 3)
    assert next(asked) == 5 and len(made) < 60 * RATE


@pytest.mark.parametrize(
    "head", [b".snd\0\0\0\x18", b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3", b"MATLAB"]
)
def test_other_formats_reach_no_decoder(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import soundfile

    monkeypatch.setattr(soundfile, "SoundFile", None)
    with pytest.raises(InvalidRequestError, match="Supported formats: WAV") as caught:
        pcm_of(head + bytes(4000))
    assert caught.value.param == "file"


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "float64"])
def test_arrays_are_scaled_by_their_type(kind: str) -> None:
    sound = tone(1, RATE)
    middle, half = 0.0, 1.0
    if kind != "float64":
        half = 32768.0 if kind == "int64" else 2.0 ** (8 * np.dtype(kind).itemsize - 1)
        middle = half if kind.startswith("u") else 0.0
    array = (sound.astype(np.float64) * half + middle).astype(kind)
    assert np.abs(pcm_of(sound_bytes(array, RATE)) - sound).max() < (0.01 if "8" in kind else 1e-3)


def test_what_arrays_cannot_be_is_said() -> None:
    good = tone(1, RATE)
    for array, rate, param in (
        (good, 3999, "rate"),
        (good, 192_001, "rate"),
        (good, float("nan"), "rate"),
        (good > 0, RATE, "sound"),
        (np.full(9000, 1 << 20), RATE, "sound"),
        (np.zeros((2, 16_000)), RATE, "sound"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            sound_bytes(array, rate)  # type: ignore[arg-type]
        assert caught.value.param == param


class Broken:
    """A `Transcriber` whose thread ends."""

    languages = ("en",)

    def __init__(self) -> None:
        self.go = threading.Event()

    def segments(self, *_: object) -> Iterator[object]:
        self.go.wait(30)
        raise SystemExit("the thread ends")
        yield

    def close(self) -> None:
        pass


def test_no_reader_waits_for_a_thread_that_has_ended() -> None:
    model = Broken()
    spec = resolve("hibari")
    engine = LocalSpeech(spec, model, EngineOptions())  # type: ignore[arg-type]
    hearing = Hearing(wav(tone(1, RATE)))
    streams = [
        engine.submit(GenerationRequest(f"r{i}", prompt="", hearing=hearing)) for i in range(2)
    ]
    model.go.set()
    for stream in streams:
        with pytest.raises(EngineGoneError, match="the thread ends"):
            stream.result(30)
    assert engine.state.is_gone and engine.stats().num_running == 0
    with pytest.raises(EngineGoneError):
        engine.submit(GenerationRequest("late", prompt="", hearing=hearing))
    engine.close()


class Ears(Broken):
    """Hears nothing, and does not break."""

    def segments(self, *_: object) -> Iterator[object]:
        yield from ()


def test_a_request_that_is_collected_as_its_turn_comes() -> None:
    """The garbage collector aborts on any thread: on the engine's, while it chooses."""
    engine = LocalSpeech(resolve("hibari"), Ears(), EngineOptions())  # type: ignore[arg-type]
    aborting = ["dropped"]

    class Caller(str):
        def __hash__(self) -> int:
            if aborting and threading.current_thread() is engine._thread:
                engine.abort(aborting.pop())
            return super().__hash__()

    hearing = Hearing(wav(tone(1, RATE)))
    with engine._lock:  # both wait when it looks
        streams = [
            engine.submit(GenerationRequest(name, prompt="", hearing=hearing, caller=Caller("a")))
            for name in ("dropped", "kept")
        ]
    reasons = [stream.result(30).finish_reason.value for stream in streams]
    assert reasons == ["abort", "stop"] and not engine.state.is_gone
    assert engine.stats().num_waiting == 0 == len(engine._admission)
    engine.close()


class Patient:
    """Hears or speaks one piece, and then waits until nobody wants the rest."""

    languages, voices, rate = ("en",), ("a",), 24_000

    def __init__(self) -> None:
        self.begun = threading.Event()

    def heard(
        self, pcm: np.ndarray, options: Hearing, prompt: str, is_over: Callable[[], bool]
    ) -> Iterator[Segment]:
        yield Segment("One", 0.0, 0.5)
        self._wait(is_over)

    def speak(
        self, text: str, voice: Any, speed: float, seed: Any, is_over: Callable[[], bool]
    ) -> Iterator[np.ndarray]:
        yield np.zeros(240, np.float32)
        self._wait(is_over)

    def _wait(self, is_over: Callable[[], bool]) -> None:
        self.begun.set()
        while not is_over():
            threading.Event().wait(0.01)

    def close(self) -> None:
        pass


class PatientEars(Patient):
    """The same as a `Transcriber`."""

    segments = Patient.heard


@pytest.fixture(params=[SpeechToText, TextToSpeech], ids=["hears", "speaks"])
def patient(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Any, Patient, Callable[[], object]]]:
    """A handle, its model, and what asks it for something."""
    (tmp_path / "model.bin").write_bytes(b"x")
    model = PatientEars() if request.param is SpeechToText else Patient()
    spec = ModelSpec("patient", tmp_path / "model.bin")
    handle = request.param(LocalSpeech(spec, model, EngineOptions()))  # type: ignore[arg-type]
    sound = wav(tone(1, RATE))
    ask = (lambda: handle.transcribe(sound)) if handle.model.hears else (lambda: handle.say("hm"))
    yield handle, model, ask
    handle.unload()


def test_unloading_meanwhile_is_an_error(
    patient: tuple[Any, Patient, Callable[[], object]],
) -> None:
    handle, model, ask = patient

    def unload() -> None:
        model.begun.wait(30)
        handle.unload()

    thread = threading.Thread(target=unload)
    thread.start()
    with pytest.raises(ModelUnloadedError, match="during this request"):
        ask()
    thread.join(30)
    if handle.model.hears:
        assert [segment.text for segment in handle.last.segments] == ["One"]


def test_what_was_ended_elsewhere_is_an_error(
    patient: tuple[Any, Patient, Callable[[], object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, model, ask = patient
    monkeypatch.setattr("llmkit.sound.new_id", lambda: "asked")

    def end() -> None:
        model.begun.wait(30)
        handle.engine.abort("asked")

    thread = threading.Thread(target=end)
    thread.start()
    with pytest.raises(EngineError, match="ended before it was done"):
        ask()
    thread.join(30)


@pytest.mark.parametrize("name", ["whisper-tiny.en", "hibari"])
def test_what_a_server_counts_is_the_estimate(name: str) -> None:
    estimate = llmkit.estimate(name)
    assert estimate.total_bytes > 300 << 20 and "KV" not in repr(estimate)
    task = worker_task(name, name="a", tuned=False, force=False)
    assert need_of(task) == Need(estimate.ram_bytes)
    on_gpu = llmkit.estimate(name, n_gpu_layers=-1)
    assert (on_gpu.gpu_bytes > 1 << 30) is (name == "whisper-tiny.en")
    task = worker_task(name, name="a", tuned=False, force=False, n_gpu_layers=-1)
    assert need_of(task) == Need(estimate.ram_bytes, on_gpu.gpu_bytes)


def test_a_form_names_its_boundary_briefly() -> None:
    head = "multipart/form-data; " + "a=b; " * 100 + "boundary=x"
    with pytest.raises(InvalidRequestError, match="at most 500"):
        fields_of(head, b"--x--", frozenset())


async def test_few_connections_linger_and_none_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lingering, "MOST", 3)
    monkeypatch.setattr(lingering, "LINGER_S", 60.0)
    closed: list[int] = []

    def connection(number: int) -> SimpleNamespace:
        stream = SimpleNamespace(closed=lambda: False)
        return Connection(stream=stream, _read_finished=False, close=lambda: closed.append(number))

    all_five = [connection(number) for number in range(5)]
    for each in all_five:
        lingering.linger(each)
        each.close()
    assert closed == [0, 1]
    all_five[3]._read_finished = True
    async with asyncio.timeout(30):
        while len(closed) < 3:
            await asyncio.sleep(0.01)
    assert closed == [0, 1, 3]
    all_five[2].stream, all_five[4]._read_finished = None, True
    async with asyncio.timeout(30):
        while len(closed) < 5:
            await asyncio.sleep(0.01)


class Connection(SimpleNamespace):
    """One that is told apart by what it is, as Tornado's are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__
