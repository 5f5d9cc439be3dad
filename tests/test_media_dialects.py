"""Pictures and sounds in requests of all dialects, from stock clients, to the files that an engine
gets. The model only says what it was told."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from pictures import BLUE, RED, address, bomb, encoded, picture
from scripted_model import ScriptedModel, ServedModels
from speech import tone, wav

import llmkit
from llmkit.gateway.app import FORM_BYTES, Gateway
from llmkit.gateway.directory import EngineDirectory
from llmkit.media import pictures
from llmkit.media.taking import MAX_MEDIA
from llmkit.protocol import GenerationRequest, Media, Message

PNG, OTHER = picture(RED), picture(BLUE)
DIGESTS = {hashlib.sha256(data).hexdigest(): data for data in (PNG, OTHER)}
KEY = {"api_key": "none"}
ASKED = "What is this?"


@pytest.fixture(scope="module")
def model() -> ScriptedModel:
    model = ScriptedModel("seer", inputs=("image", "audio"))
    model.token_s = 0.0
    return model


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory, model: ScriptedModel
) -> Iterator[ServedModels]:
    blind = ScriptedModel("blind")
    served = ServedModels(tmp_path_factory.mktemp("media"), model, blind)
    yield served
    served.stop()


def asked(model: ScriptedModel) -> GenerationRequest:
    """What the model was asked last: whole, and with the files it names."""
    request = model.asked[-1]
    items = [item for message in request.messages or () for item in message.media]
    assert {item.digest for item in items} == set(request.media)
    for item in items:
        assert hashlib.sha256(request.media[item.digest]).hexdigest() == item.digest
    return request


def told(model: ScriptedModel) -> list[tuple[str, list[str | bytes]]]:
    """The same as roles and parts, with files in place of their digests."""
    request = asked(model)
    return [
        (m.role, [p if isinstance(p, str) else request.media[p.digest] for p in m.parts])
        for m in request.messages or ()
    ]


def post(served: ServedModels, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(served.url + path, json=body, timeout=30)


def refused(served: ServedModels, url: str, **more: Any) -> str:
    """The message of the 400 that a picture is answered with."""
    part = {"type": "image_url", "image_url": {"url": url}}
    body = {"model": "seer", "messages": [{"role": "user", "content": [part]}], **more}
    reply = post(served, "v1/chat/completions", body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == "messages"
    message: str = reply.json()["error"]["message"]
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_openai_chat(served: ServedModels, model: ScriptedModel, stream: bool) -> None:
    client = openai.OpenAI(base_url=served.url + "v1", **KEY)
    sound = wav(tone(0.2, 16_000))
    reply = client.chat.completions.create(
        model="seer",
        stream=stream,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": ASKED},
                    {"type": "image_url", "image_url": {"url": address(PNG), "detail": "auto"}},
                    {"type": "image_url", "image_url": {"url": address(OTHER, "image/jpeg")}},
                    {
                        "type": "input_audio",
                        "input_audio": {"data": encoded(sound), "format": "wav"},
                    },
                ],
            }
        ],
    )  # type: ignore[call-overload]
    if stream:
        assert "".join(c.choices[0].delta.content or "" for c in reply if c.choices)
    assert told(model) == [("user", [ASKED, PNG, OTHER, sound])]
    kinds = [item.kind for m in asked(model).messages or () for item in m.media]
    assert kinds == ["image", "image", "audio"]


def test_openai_chat_also_takes_the_address_alone(
    served: ServedModels, model: ScriptedModel
) -> None:
    parts = [{"type": "image_url", "image_url": address(PNG)}]
    body = {"model": "seer", "messages": [{"role": "user", "content": parts}]}
    assert post(served, "chat/completions", body).status_code == 200
    assert told(model) == [("user", [PNG])]


def test_low_detail_is_made_smaller_here(served: ServedModels, model: ScriptedModel) -> None:
    large = picture(RED, (2000, 1000))
    part = {"type": "image_url", "image_url": {"url": address(large), "detail": "low"}}
    body = {"model": "seer", "messages": [{"role": "user", "content": [part]}]}
    assert post(served, "v1/chat/completions", body).status_code == 200
    (file,) = asked(model).media.values()
    facts = pictures.facts(file)
    assert (facts.width, facts.height) == (512, 256)
    assert (pictures.pixels(file) == RED).all()


def test_openai_responses(served: ServedModels, model: ScriptedModel) -> None:
    client = openai.OpenAI(base_url=served.url + "v1", **KEY)
    first = client.responses.create(
        model="seer",
        input=[
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": ASKED},
                    {"type": "input_image", "image_url": address(PNG), "detail": "auto"},
                ],
            },
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
            {
                "type": "function_call_output",
                "call_id": "c1",
                "output": [{"type": "input_image", "image_url": address(OTHER), "detail": "auto"}],
            },
        ],
    )
    assert told(model) == [("user", [ASKED, PNG]), ("assistant", []), ("tool", [OTHER])]
    client.responses.create(model="seer", input="And?", previous_response_id=first.id)
    assert told(model)[0] == ("user", [ASKED, PNG]) and told(model)[-1] == ("user", ["And?"])
    with pytest.raises(openai.BadRequestError, match="no uploaded files"):
        client.responses.create(
            model="seer",
            input=[
                {
                    "role": "user",
                    "content": [{"type": "input_image", "file_id": "file_1", "detail": "auto"}],
                }
            ],
        )


def test_anthropic(served: ServedModels, model: ScriptedModel) -> None:
    client = anthropic.Anthropic(base_url=served.url, **KEY)
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(PNG)}
    other: Any = {"type": "base64", "media_type": "image/png", "data": encoded(OTHER)}
    messages: Any = [
        {
            "role": "user",
            "content": [{"type": "image", "source": source}, {"type": "text", "text": ASKED}],
        },
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "t1", "name": "look", "input": {}}],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [
                        {"type": "text", "text": "Seen:"},
                        {"type": "image", "source": other},
                    ],
                }
            ],
        },
    ]
    expected = [("user", [PNG, ASKED]), ("assistant", []), ("tool", ["Seen:", OTHER])]
    client.messages.create(model="seer", max_tokens=8, messages=messages)
    assert told(model) == expected
    with client.messages.stream(model="seer", max_tokens=8, messages=messages) as stream:
        stream.get_final_message()
    assert told(model) == expected
    assert client.messages.count_tokens(model="seer", messages=messages).input_tokens > 0
    for bad in (
        {"type": "url", "url": "https://example.org/a.png"},
        {"type": "file", "file_id": "f"},
    ):
        content: Any = [{"type": "image", "source": bad}]
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(
                model="seer", max_tokens=8, messages=[{"role": "user", "content": content}]
            )


def test_ollama(served: ServedModels, model: ScriptedModel, tmp_path: Path) -> None:
    client = ollama.Client(served.url)
    (tmp_path / "red.png").write_bytes(PNG)
    client.chat(
        "seer", [{"role": "user", "content": ASKED, "images": [tmp_path / "red.png", OTHER]}]
    )
    assert told(model) == [("user", [PNG, OTHER, ASKED])]
    client.generate("seer", ASKED, images=[PNG])
    assert told(model) == [("user", [PNG, ASKED])]
    with pytest.raises(ollama.ResponseError, match="raw or suffix"):
        client.generate("seer", ASKED, images=[PNG], raw=True)
    assert "vision" in (client.show("seer").capabilities or [])
    assert "vision" not in (client.show("blind").capabilities or [])


def test_what_a_model_takes_is_said(served: ServedModels) -> None:
    data = httpx.get(served.url + "v1/models", timeout=30).json()["data"]
    modalities = {m["id"]: m["architecture"]["input_modalities"] for m in data}
    assert modalities == {"seer": ["text", "image", "audio"], "blind": ["text"]}
    for name, sees in (("seer", True), ("blind", False)):
        props = httpx.get(served.url + f"props?model={name}", timeout=30).json()
        assert props["modalities"] == {"vision": sees, "video": False, "audio": sees}


def test_a_model_without_a_projector_says_so(served: ServedModels) -> None:
    message = refused(served, address(PNG), model="blind")
    assert "the model blind takes no images" in message and "mmproj" in message
    reply = post(
        served,
        "api/generate",
        {"model": "blind", "prompt": "x", "images": [encoded(PNG)]},
    )
    assert reply.status_code == 400 and "takes no images" in reply.json()["error"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/svg+xml;base64," + encoded(b"<svg/>"), "JPEG, PNG, WebP, GIF, BMP, AVIF"),
        (address(b"<html></html>"), "SVG, HTML"),
        (address(bomb()), "12000 × 12000"),
        (address(b""), "empty"),
        (address(PNG[:20]), "cut off"),
        ("data:image/png;base64,###", "base64"),
        ("data:image/png,raw", "base64"),
        ("file:///etc/passwd", "must be sent"),
        ("http://169.254.169.254/latest", "must be sent"),
        ("https://169.254.169.254/latest", "fetches nothing"),
        ("https://example.org/a.png", "fetches nothing"),
        ("gopher://example.org", "must be sent"),
        ("/etc/passwd", "must be sent"),
        ("llmkit-media:" + "0" * 64, "must be sent"),  # as in stored items only
    ],
)
def test_what_is_no_picture_is_refused(served: ServedModels, url: str, reason: str) -> None:
    assert reason in refused(served, url)


def test_more_than_a_model_is_told_are_too_many(served: ServedModels, model: ScriptedModel) -> None:
    parts = [{"type": "image_url", "image_url": {"url": address(PNG)}}] * (MAX_MEDIA + 1)
    body = {"model": "seer", "messages": [{"role": "user", "content": parts}]}
    reply = post(served, "v1/chat/completions", body)
    assert reply.status_code == 400 and f"at most {MAX_MEDIA}" in reply.json()["error"]["message"]
    body["messages"][0]["content"] = parts[:MAX_MEDIA]  # type: ignore[index]
    assert post(served, "v1/chat/completions", body).status_code == 200
    assert len(asked(model).media) == 1


def test_a_model_that_draws_has_no_chats_with_pictures(tmp_path: Path) -> None:
    painter = ScriptedModel("painter", inputs=("image",), image_size="64x64")
    served = ServedModels(tmp_path, painter)
    assert ollama.Client(served.url).show("painter").capabilities == ["image"]
    modalities = httpx.get(served.url + "props?model=painter", timeout=30).json()["modalities"]
    assert not any(modalities.values())
    listed = httpx.get(served.url + "v1/models", timeout=30).json()
    assert listed["models"][0]["capabilities"] == [], "nothing that llama-server's clients know"
    assert listed["data"][0]["architecture"] == {
        "input_modalities": ["text", "image"], "output_modalities": ["image"],
    }  # fmt: skip
    (shown,) = httpx.get(served.url + "status?no_track_activity=1", timeout=30).json()["models"]
    assert shown["inputs"] == []  # by which the page offers to attach pictures
    served.stop()


@pytest.mark.parametrize(
    ("description", "status"),
    [({"inputs": ("image",)}, 200), ({}, 413), ({"inputs": ("image",), "image_size": "8x8"}, 413)],
)
def test_bodies_may_be_large_where_a_model_sees(
    tmp_path: Path, description: dict[str, Any], status: int
) -> None:
    model = ScriptedModel("m", **description)
    served = ServedModels(tmp_path, model, max_body_bytes=2000, max_media_bytes=50_000)
    part = {"type": "text", "text": "x" * 10_000}
    body = {"model": "m", "messages": [{"role": "user", "content": [part]}]}
    assert post(served, "v1/chat/completions", body).status_code == status
    assert post(served, "v1/embeddings", body).status_code == 413
    body["messages"][0]["content"][0]["text"] = "x" * 60_000  # type: ignore[index]
    assert post(served, "v1/chat/completions", body).status_code == 413
    served.stop()


class Offered:
    """A source whose models come and go."""

    def __init__(self) -> None:
        self.here: list[ScriptedModel] = []

    def find(self) -> dict[Any, Any]:
        return {e.description.name: lambda e=e: e for e in self.here}  # type: ignore[misc]


def test_limits_are_those_of_what_may_be_loaded() -> None:
    source = Offered()
    directory = EngineDirectory([source], offered=lambda: ["seer", "plain"])
    sizes = {"max_body_bytes": 1000, "max_media_bytes": 5000, "max_sound_bytes": 6000}
    gateway = Gateway(directory, **sizes)  # type: ignore[arg-type]

    def limits() -> tuple[int, int]:
        directory.look_again()
        paths = ("/v1/chat/completions", "/engine/submit")
        chat, attached = (gateway.body_limit(SimpleNamespace(path=p)) for p in paths)  # type: ignore[arg-type]
        assert gateway.message_limit() == chat
        return chat, attached

    sound = 8000 + FORM_BYTES
    assert limits() == (5000, sound), "nobody knows them yet"
    source.here = [ScriptedModel("plain")]
    assert limits() == (5000, sound)
    source.here = [ScriptedModel("seer", inputs=("image",))]
    assert limits() == (5000, 5000), "each was here: none hears"
    source.here = []
    assert limits() == (5000, 5000), "as it was when it was here"
    source.here = [ScriptedModel("seer"), ScriptedModel("ears", hears=True)]
    assert limits() == (1000, sound), "it was loaded without its projector"
    source.here = []
    assert limits() == (1000, 1000)
    found = Gateway(EngineDirectory([source], finds=True), **sizes)  # type: ignore[arg-type]
    assert found.message_limit() == 5000
    assert Gateway(EngineDirectory([source]), **sizes).message_limit() == 1000  # type: ignore[arg-type]


def test_llama_servers_data_is_for_chats_only(served: ServedModels) -> None:
    prompt = {"prompt_string": "<__media__>", "multimodal_data": [encoded(PNG)]}
    reply = post(served, "completion", {"model": "seer", "prompt": prompt})
    assert reply.status_code == 400 and "/v1/chat/completions" in reply.text


def test_attached_over_http_a_digest_must_be_the_files(
    served: ServedModels, model: ScriptedModel
) -> None:
    engine = llmkit.attach(served.url, model="seer").engine
    digest = hashlib.sha256(PNG).hexdigest()
    messages = (Message("user", (ASKED, Media(digest, "image"))),)
    engine.submit(GenerationRequest("r1", messages=messages, media={digest: PNG})).result()
    assert told(model) == [("user", [ASKED, PNG])]
    for number, media in enumerate(({digest: OTHER}, {})):
        request = GenerationRequest(f"bad{number}", messages=messages, media=media)
        with pytest.raises(llmkit.InvalidRequestError, match=r"digest|missing"):
            engine.submit(request).result()
    engine.close()


def test_the_command_sends_a_picture(
    served: ServedModels, model: ScriptedModel, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(PNG)

    def run(name: str, file: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmkit", "chat", "--base-url", served.url + "v1"]
        command += ["--api-key", "none", "--model", name, "--image", str(tmp_path / file), ASKED]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, input="")

    done = run("seer", "red.png")
    assert (done.returncode, done.stdout) == (0, f"You said: {ASKED}\n"), done.stderr
    assert told(model) == [("user", [PNG, ASKED])]
    assert "cannot be read" in run("seer", "none.png").stderr
    assert "takes no images" in run("blind", "red.png").stderr
