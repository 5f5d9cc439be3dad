"""A real model with a projector that sees colours: every stock client asks it what it sees, and so
do a notebook's handle, its sessions, and whoever sends a tool's result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest
from pictures import BLUE, RED, address, encoded, picture
from PIL import Image
from scripted_model import ServedModels
from toy_models import write_colours

from llmkit.llm import LLM
from llmkit.runtime.local import LocalEngine

pytestmark = pytest.mark.model
ASKED = " is the word. Which word did I say?"
RGB = {"red": RED, "blue": BLUE}
SEEN = {"red": picture(RED, (14, 14), "WEBP"), "blue": picture(BLUE, (14, 14), "PNG")}
KEY: Any = {"api_key": "none"}
MODEL = "smollm2"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalEngine]:
    """SmolLM2 with a projector that knows four colours."""
    path = write_colours(tmp_path_factory.mktemp("colours") / "mmproj.gguf", MODEL)
    engine = LocalEngine(MODEL, n_ctx=1024, n_slots=2, projector=str(path))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, engine: LocalEngine) -> Iterator[ServedModels]:
    served = ServedModels(tmp_path_factory.mktemp("served"), engine)  # type: ignore[arg-type]
    yield served
    served.stop()


@pytest.fixture(scope="module")
def llm(engine: LocalEngine) -> LLM:
    return LLM(engine)


def by_openai(url: str, name: str) -> str:
    client = openai.OpenAI(base_url=url + "v1", **KEY)
    parts: Any = [
        {"type": "image_url", "image_url": {"url": address(SEEN[name])}},
        {"type": "text", "text": ASKED},
    ]
    done = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=12
    )
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.to_dict()["image_tokens"] == 1
    return done.choices[0].message.content or ""


def by_responses(url: str, name: str) -> str:
    client = openai.OpenAI(base_url=url + "v1", **KEY)
    parts: Any = [
        {"type": "input_image", "image_url": address(SEEN[name])},
        {"type": "input_text", "text": ASKED},
    ]
    first = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": parts}], temperature=0, max_output_tokens=12
    )
    return first.output_text


def by_anthropic(url: str, name: str) -> str:
    client = anthropic.Anthropic(base_url=url, **KEY)
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(SEEN[name])}
    parts: Any = [{"type": "image", "source": source}, {"type": "text", "text": ASKED}]
    messages: Any = [{"role": "user", "content": parts}]
    with client.messages.stream(
        model=MODEL, max_tokens=12, messages=messages, extra_body={"temperature": 0}
    ) as stream:
        done = stream.get_final_message()
    counted = client.messages.count_tokens(model=MODEL, messages=messages).input_tokens
    assert counted == done.usage.input_tokens + (done.usage.cache_read_input_tokens or 0)
    return done.content[0].text  # type: ignore[union-attr]


def by_ollama(url: str, name: str) -> str:
    client = ollama.Client(url)
    done = client.chat(
        MODEL,
        [{"role": "user", "content": ASKED, "images": [SEEN[name]]}],
        options={"temperature": 0, "num_predict": 12},
    )
    assert "vision" in (client.show(MODEL).capabilities or [])
    return done.message.content or ""


@pytest.mark.parametrize("ask", [by_openai, by_responses, by_anthropic, by_ollama])
def test_every_client_is_told_the_colour(served: ServedModels, ask: Any) -> None:
    for name in RGB:
        said = ask(served.url, name).lower()
        assert name in said, said


def test_a_handle_and_its_sessions(llm: LLM) -> None:
    for name, colour in RGB.items():
        asked = {"temperature": 0, "max_tokens": 12}
        images = Image.new("RGB", (14, 14), colour)
        assert name in llm.chat(ASKED, images=images, **asked).text.lower()
        session = llm.session(**asked)
        assert name in session.say(ASKED, images=images).text.lower()
        session.say("And now?")
        assert session.messages[0].media and session.num_tokens > 20


def test_a_tools_result_keeps_its_picture(served: ServedModels) -> None:
    client = anthropic.Anthropic(base_url=served.url, **KEY)
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(SEEN["blue"])}
    messages: Any = [
        {"role": "user", "content": "Which word is on the wall? Look at it."},
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
                        {"type": "text", "text": "The word on the wall is"},
                        {"type": "image", "source": source},
                    ],
                }
            ],
        },
    ]
    done = client.messages.create(
        model=MODEL, max_tokens=16, messages=messages, extra_body={"temperature": 0}
    )
    assert "blue" in done.content[0].text.lower(), done.content  # type: ignore[union-attr]


def test_a_file_that_is_cut_is_a_400_and_the_server_goes_on(served: ServedModels) -> None:
    cut = picture(RED, (300, 200), "JPEG")
    part = {"type": "image_url", "image_url": {"url": address(cut[: len(cut) * 2 // 3])}}
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
    for stream in (False, True):
        reply = httpx.post(
            served.url + "v1/chat/completions", json={**body, "stream": stream}, timeout=60
        )
        assert reply.status_code == 400, reply.text
        assert "cut off or broken" in reply.json()["error"]["message"]
    assert "red" in by_openai(served.url, "red").lower()
