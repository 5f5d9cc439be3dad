"""`/v1/audio` of `llmkit serve smollm2 whisper-tiny.en hibari`, with the stock SDK."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fakes import wait_for
from gateway_client import serve
from speech import HOSTILE, SENTENCES, cues, decoded, encoded, folded, silence, tone
from test_cli import Served

import llmkit
from llmkit.errors import InvalidRequestError
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.forms import fields_of
from llmkit.gateway.openai.audio_objects import TranscriptionBody
from llmkit.gateway.openai.image_objects import ImageEditBody
from llmkit.gateway.reading import words_of
from llmkit.models.registry import resolve
from llmkit.runtime.speech import LocalSpeech
from llmkit.settings.options import EngineOptions

pytestmark = pytest.mark.model
TEXT = " ".join(SENTENCES[:2])
LONG = " ".join(SENTENCES * 8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("speech")
    server = Served(
        "smollm2", "whisper-tiny.en", "hibari", "--port", "0", "--n-ctx", "512", "--n-slots", "2",
        "--audio-mb", "3", "--audio-minutes", "3", "--log-level", "warning", "--no-access-log",
        JUPYTER_RUNTIME_DIR=str(folder), XDG_DATA_HOME=str(folder / "data"),
    )  # fmt: skip
    wait_for(lambda: server.health() == 200, 120)
    names = {"smollm2", "whisper-tiny.en", "hibari"}
    wait_for(lambda: loaded(server) == names, 120)
    yield server
    code, errors = server.stop(signal.SIGINT)
    assert code == 0 and "Traceback" not in errors, errors


def loaded(server: Served) -> set[str]:
    models = httpx.get(server.url + "/models", timeout=60).json()["data"]
    return {m["id"] for m in models if m["status"]["value"] == "loaded"}


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def sound(client: openai.OpenAI) -> bytes:
    return say(client, response_format="wav", extra_body={"seed": 1})


def say(client: openai.OpenAI, text: str = TEXT, **options: Any) -> bytes:
    made = client.audio.speech.create(
        **{"model": "hibari", "voice": "alloy", "input": text, **options}
    )
    return made.read()


def test_models_are_listed_and_told_apart(server: Served, client: openai.OpenAI) -> None:
    assert {m.id for m in client.models.list()} == {"smollm2", "whisper-tiny.en", "hibari"}
    reply = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
    )
    assert reply.model == "smollm2"
    for model in ("whisper-tiny.en", "hibari"):
        with pytest.raises(openai.BadRequestError, match="/v1/audio/"):
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=3
            )
    with pytest.raises(openai.BadRequestError, match="cannot speak"):
        say(client, model="whisper-tiny.en")
    with pytest.raises(openai.NotFoundError, match="tts-1"):
        say(client, model="tts-1")


def test_every_format_of_speech(client: openai.OpenAI) -> None:
    pcm = say(client, response_format="pcm", extra_body={"seed": 3})
    for kind in ("mp3", "opus", "flac", "wav"):
        data = say(client, response_format=kind, extra_body={"seed": 3})
        samples, rate = decoded(data)
        assert abs(len(samples) / rate - len(pcm) / 48_000) <= 0.05
        assert data == say(client, response_format=kind, extra_body={"seed": 3})
    assert decoded(say(client))[1] == 24_000  # MP3
    assert len(say(client, response_format="pcm", speed=2.0)) < 0.7 * len(pcm)


def test_what_speech_refuses_is_named(client: openai.OpenAI) -> None:
    for options, param in (
        ({"response_format": "aac"}, "response_format"),
        ({"speed": 5.0}, "speed"),
        ({"voice": "nobody"}, "voice"),
        ({"input": ""}, "input"),
        ({"input": "x" * 4097}, "input"),
        ({"extra_body": {"stream_format": "midi"}}, "stream_format"),
        ({"extra_body": {"pitch": 3}}, "pitch"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            say(client, **options)  # type: ignore[arg-type]
        assert caught.value.param == param
        if param == "response_format":
            assert "mp3, opus, flac, wav, pcm" in str(caught.value)
    reply = client.audio.speech.with_raw_response.create(
        model="default", voice={"id": "heart"}, input="Yes.", instructions="Sing."
    )
    assert reply.headers["x-llmkit-ignored"] == "instructions"


async def test_the_first_sound_is_there_before_the_last_sentence() -> None:
    model = Slow()
    engine = LocalSpeech(resolve("hibari"), model, EngineOptions())

    class Source:
        def find(self) -> dict[Any, Any]:
            return {"only": lambda: engine}

    async for api in serve(None, directory=EngineDirectory([Source()])):
        body = {"input": "One. Two.", "response_format": "mp3"}
        url = api.url + "/v1/audio/speech"
        model.go.release()
        async with (
            httpx.AsyncClient(timeout=30) as client,
            client.stream("POST", url, json=body) as reply,
        ):
            assert reply.headers["content-type"] == "audio/mpeg"
            parts = reply.aiter_raw()
            first = await anext(parts)
            assert first and model.num_said == 1  # it waits to be let on
            model.go.release()
            rest = [part async for part in parts]
        samples, rate = decoded(first + b"".join(rest))
        assert abs(len(samples) / rate - 2) <= 0.05 and model.num_said == 2


class Slow:
    """A `Speaker` of two sentences, each of which waits to be let on."""

    voices, rate = ("a",), 24_000

    def __init__(self) -> None:
        self.num_said = 0
        self.go = threading.Semaphore(0)

    def speak(self, text: str, *_: Any) -> Iterator[np.ndarray]:
        for _sentence in range(2):
            self.go.acquire()
            self.num_said += 1
            sound = tone(1, 24_000)
            sound[:2400] = 0
            yield sound

    def close(self) -> None:
        pass


def stats(server: Served, model: str) -> dict[str, Any]:
    state = httpx.get(server.url.removesuffix("/v1") + "/status", timeout=60).json()
    return next(m for m in state["models"] if m["id"] == model)


def test_speech_as_events(server: Served, client: openai.OpenAI) -> None:
    body = {"model": "hibari", "input": TEXT, "response_format": "wav", "stream_format": "sse"}
    reply = httpx.post(server.url + "/audio/speech", json={**body, "seed": 1}, timeout=60)
    events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.strip()]
    import base64

    parts = [base64.b64decode(e["audio"]) for e in events if e["type"] == "speech.audio.delta"]
    assert b"".join(parts) == say(client, response_format="wav", extra_body={"seed": 1})
    assert events[-1]["type"] == "speech.audio.done"
    assert events[-1]["usage"]["output_tokens"] > 100 and len(parts) >= 2


def test_every_format_of_a_transcript(client: openai.OpenAI, sound: bytes) -> None:
    hear = client.audio.transcriptions.create
    files = {"file": ("a.wav", sound), "model": "whisper-tiny.en"}
    plain = hear(**files)  # type: ignore[call-overload]
    assert folded(plain.text) == folded(TEXT)
    assert plain.usage.type == "tokens" and plain.usage.input_tokens > 100
    assert folded(hear(**files, response_format="text")) == folded(TEXT)  # type: ignore[call-overload]
    for kind in ("srt", "vtt"):
        read = cues(hear(**files, response_format=kind))  # type: ignore[call-overload]
        assert folded(" ".join(text for _, _, text in read)) == folded(TEXT)
    told = hear(**files, response_format="verbose_json")  # type: ignore[call-overload]
    assert told.language == "en" and told.words is None and len(told.segments) >= 1
    assert abs(told.duration - (len(sound) - 44) / 48_000) < 0.01
    told = hear(  # type: ignore[call-overload]
        **files,
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
        language="en",
        prompt="Dogs.",
        temperature=0.0,
    )
    assert folded(" ".join(w.word for w in told.words)) == folded(TEXT) and told.segments
    assert all(0 <= w.start <= w.end <= told.duration for w in told.words)
    only = hear(  # type: ignore[call-overload]
        **files, response_format="verbose_json", timestamp_granularities=["word"]
    )
    assert only.words and only.segments is None


def test_a_transcript_as_a_stream(client: openai.OpenAI, sound: bytes) -> None:
    events = list(
        client.audio.transcriptions.create(
            file=("a.wav", sound), model="default", stream=True, response_format="json"
        )
    )
    assert [e.type for e in events][-1] == "transcript.text.done"
    deltas = "".join(e.delta for e in events if e.type == "transcript.text.delta")
    assert folded(deltas) == folded(TEXT) and deltas == events[-1].text  # type: ignore[union-attr]


def test_what_a_transcription_refuses_is_named(
    server: Served, client: openai.OpenAI, sound: bytes
) -> None:
    hear = client.audio.transcriptions.create
    for options, param in (
        ({"language": "de"}, "language"),
        ({"response_format": "yaml"}, "response_format"),
        ({"temperature": 3.0}, "temperature"),
        ({"timestamp_granularities": ["word"]}, "timestamp_granularities"),
        ({"stream": True, "response_format": "srt"}, "stream"),
        ({"extra_body": {"tuning": "C"}}, "tuning"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            hear(file=("a.wav", sound), model="whisper-tiny.en", **options)  # type: ignore[call-overload]
        assert caught.value.param == param
    url = server.url + "/audio/translations"
    reply = httpx.post(url, files={"file": ("a.wav", sound)}, timeout=60)
    assert reply.status_code == 400
    said = reply.json()["error"]["message"]
    assert "knows English only" in said and "needs a multilingual Whisper" in said
    url = server.url + "/audio/transcriptions"
    reply = httpx.post(url, json={"model": "whisper-tiny.en"}, timeout=60)
    assert reply.status_code == 400 and "multipart/form-data" in reply.text
    reply = httpx.post(url, files={"model": (None, "whisper-tiny.en")}, timeout=60)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "file"


def test_hostile_sound_is_refused_and_the_server_lives(
    server: Served, client: openai.OpenAI, sound: bytes
) -> None:
    hear = client.audio.transcriptions.create
    pid = stats(server, "whisper-tiny.en")["pid"]
    for name, data in HOSTILE.items():
        with pytest.raises(openai.BadRequestError) as caught:
            hear(file=("a.wav", data), model="whisper-tiny.en")
        assert caught.value.param == "file", name
    hours = encoded(silence(3 * 3600, 8000), 8000, format="FLAC")
    with pytest.raises(openai.BadRequestError, match="longer than 3 minutes"):
        hear(file=("a.flac", hours), model="whisper-tiny.en")
    with pytest.raises(openai.APIStatusError) as large:
        hear(file=("a.wav", bytes(4_000_000)), model="whisper-tiny.en")
    assert large.value.status_code == 413
    assert hear(file=("a.wav", sound), model="whisper-tiny.en").text
    assert stats(server, "whisper-tiny.en")["pid"] == pid


def test_an_attached_notebook_may_not_send_more_than_callers(server: Served) -> None:
    hours = encoded(silence(3 * 3600, 8000), 8000, format="FLAC")
    whisper: Any = llmkit.attach(server.url.removesuffix("/v1"), model="whisper-tiny.en")
    try:
        with pytest.raises(InvalidRequestError, match="longer than 3 minutes") as caught:
            whisper.transcribe(hours)
        assert caught.value.param == "file"
        assert whisper.transcribe(silence(1), rate=16_000).text == ""
    finally:
        whisper.unload()


async def test_a_caller_who_leaves_ends_the_work(server: Served, sound: bytes) -> None:
    samples = say(openai.OpenAI(base_url=server.url, api_key="k"), LONG, response_format="flac")

    def running() -> int:
        count: int = stats(server, "whisper-tiny.en")["num_running"]
        return count

    async with openai.AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0) as client:
        task = asyncio.ensure_future(
            client.audio.transcriptions.create(
                file=("a.flac", samples), model="whisper-tiny.en", response_format="json"
            )
        )
        await asyncio.to_thread(wait_for, lambda: running() == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(wait_for, lambda: running() == 0)


def test_a_worker_that_dies_is_started_again(
    server: Served, client: openai.OpenAI, sound: bytes
) -> None:
    os.kill(stats(server, "whisper-tiny.en")["pid"], signal.SIGKILL)

    def heard() -> bool:
        try:
            reply = client.audio.transcriptions.create(
                file=("a.wav", sound), model="whisper-tiny.en"
            )
        except openai.APIStatusError as error:
            assert error.status_code in (500, 503)
            return False
        return folded(reply.text) == folded(TEXT)

    wait_for(heard, 60)
    assert server.health() == 200


def test_metrics_count_speech(server: Served, client: openai.OpenAI, sound: bytes) -> None:
    say(client)
    client.audio.transcriptions.create(file=("a.wav", sound), model="whisper-tiny.en")
    text = httpx.get(server.url.removesuffix("/v1") + "/metrics", timeout=60).text
    for model, operation in (("hibari", "speech"), ("whisper-tiny.en", "transcription")):
        assert any(
            f'model="{model}"' in line and f'operation="{operation}"' in line
            for line in text.splitlines()
        )
    document = httpx.get(server.url.removesuffix("/v1") + "/openapi.json", timeout=60).json()
    form = document["paths"]["/v1/audio/transcriptions"]["post"]["requestBody"]["content"]
    assert list(form) == ["multipart/form-data"]


async def test_without_such_a_model_the_answer_says_what_to_install() -> None:
    async for api in serve(None, directory=EngineDirectory([])):
        code, answer = await api.post("/v1/audio/speech", {"model": "hibari", "input": "Hi"})
        assert code in (404, 503)
        code, answer = await api.post("/v1/audio/speech", {"input": "Hi"})
        assert code == 404 and 'pip install "llmkit[speech]"' in answer["error"]["message"]
        async with httpx.AsyncClient(timeout=60) as client:
            reply = await client.post(
                api.url + "/v1/audio/transcriptions", files={"file": ("a.wav", b"x")}
            )
        assert reply.status_code == 404 and "whisper-tiny.en" in reply.text


def part(name: str, value: str, more: str = "") -> bytes:
    """Of a form."""
    head = f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return (head + value + "\r\n").encode()


def test_text_of_a_form_stays_as_it_is_written() -> None:
    """Whatever it looks like; what is no text there becomes what it is."""
    names = ("model", "prompt", "user", "language", "response_format", "timestamp_granularities[]")
    more = ("temperature", "stream")
    body = b"".join(part(name, "007") for name in names) + part("temperature", "007")
    lists = frozenset({"timestamp_granularities"})
    found = fields_of(
        "multipart/form-data; boundary=x",
        body + part("stream", "true") + b"--x--",
        lists,
        words_of(TranscriptionBody),
    )
    assert [found.pop(name) for name in more] == [7, True]
    assert found.pop("timestamp_granularities") == ("007",)
    assert set(found.values()) == {"007"} and len(found) == 5
    words = words_of(ImageEditBody)
    assert {"prompt", "model", "negative_prompt", "user", "size", "quality"} < words
    assert not words & {"n", "seed", "steps", "cfg_scale", "strength", "stream", "image", "mask"}


def test_forms_are_read_strictly() -> None:
    kind = "multipart/form-data; boundary=x"
    body = part("n", "3") + part("t", "0.5") + part("b", "true") + part("s", "x y")
    body += part("l[]", "a") + part("l[]", "b") + part("f", "12", '; filename="f"') + b"--x--"
    assert fields_of(kind, body, frozenset({"l"})) == {
        "n": 3, "t": 0.5, "b": True, "s": "x y", "l": ("a", "b"), "f": b"12",
    }  # fmt: skip
    for bad in (
        b"",
        b"--x--"[:4],
        part("n", "1"),
        part("n", "1") * 2 + b"--x--",
        part("f", "1", '; filename="f"') * 2 + b"--x--",
        part("n", "y" * 70_000) + b"--x--",
        b'--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n\xff\xfe\r\n--x--',
        part("n", "1") * 200 + b"--x--",
    ):
        with pytest.raises(InvalidRequestError):
            fields_of(kind, bad, frozenset())
    for wrong in ("", "multipart/form-data", "application/json", "text/plain; boundary=x"):
        with pytest.raises(InvalidRequestError):
            fields_of(wrong, body, frozenset())
