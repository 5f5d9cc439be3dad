"""Routes of the services that people come from: each README's own requests, over real sockets."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from compat_gateway import curl
from fakes import FakeClient
from gateway_client import serve
from governed import CALLER, Governed, governed

from llmkit.gateway.compat.otron import matching
from llmkit.gateway.guards import Guards, Terms

MESSAGES = [{"role": "user", "content": "Hello!"}]
GREEDY = {"model": "fake", "max_tokens": 6, "temperature": 0}


@pytest.fixture
async def gateway() -> AsyncIterator[Governed]:
    async with governed() as made:
        yield made


async def text_of(gateway: Governed, messages: list[dict[str, str]], **more: Any) -> str:
    """The same answer by OpenAI's route."""
    body = {**GREEDY, "messages": messages, **more}
    reply = await curl(gateway.api.url, "/v1/chat/completions", body)
    return str(reply.json["choices"][0]["message"]["content"])


# The service with /v1/generate and one model at a time.


async def test_generate_sends_token_events(gateway: Governed) -> None:
    reply = await curl(
        gateway.api.url,
        "/v1/generate",
        {"prompt": "Hello!", "sampling_params": {"temperature": 0.0, "max_tokens": 6}},
    )
    assert reply.code == 200 and reply.headers["content-type"] == "text/event-stream"
    *tokens, last = reply.objects
    assert all(set(t) == {"token", "done"} and t["done"] is False for t in tokens)
    assert "".join(t["token"] for t in tokens) == await text_of(gateway, MESSAGES)
    assert last["done"] is True and last["token"] == "" and last["completion_tokens"] == 6
    raw = await curl(
        gateway.api.url,
        "/v1/generate",
        {
            "prompt": "Hello!",
            "use_chat_template": False,
            "sampling_params": {"temperature": 0, "max_tokens": 6, "tfs_z": 1.0, "n_keep": 4},
        },
    )
    plain = await curl(gateway.api.url, "/v1/completions", {**GREEDY, "prompt": "Hello!"})
    said = "".join(t["token"] for t in raw.objects)
    assert said == plain.json["choices"][0]["text"]
    assert raw.headers["x-llmkit-ignored"] == "sampling_params.n_keep, sampling_params.tfs_z"


async def test_generate_names_what_is_wrong(gateway: Governed) -> None:
    for body, field in (
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "sampling_params": {"temperature": -1}}, "sampling_params"),
        ({"prompt": "x", "sampling_params": {"stop_sequences": [""]}}, "sampling_params"),
        ({"prompt": "x", "sampling_params": {"heat": 1}}, "sampling_params"),
        ({}, "prompt"),
    ):
        reply = await curl(gateway.api.url, "/v1/generate", body)
        assert reply.code == 400 and reply.json["error"]["param"] == field, reply.text


async def test_what_the_service_says_of_itself(gateway: Governed) -> None:
    health = (await curl(gateway.api.url, "/v1/health")).json
    assert health["status"] == "ok" and health["uptime_seconds"] >= 0
    assert (health["queue_size"], health["active_requests"], health["queue_capacity"]) == (0, 0, 4)
    assert (await curl(gateway.api.url, "/health")).json == {"status": "ok"}
    status = (await curl(gateway.api.url, "/v1/status")).json
    assert status["status"] == "running" and status["queue_capacity"] == 4
    for path in ("/v1/model/info", "/v1/models/active"):
        info = (await curl(gateway.api.url, path)).json
        assert (info["context_size"], info["gpu_layers"]) == (5000, 0)
        assert info["model_path"] == "fake.gguf"


async def test_strangers_see_no_queue() -> None:
    async for api in serve("secret-key"):
        reply = await curl(api.url, "/v1/health")
        assert reply.code == 503 and "uptime" not in reply.text
        assert (await curl(api.url, "/v1/status")).code == 401


@pytest.fixture
def named_like_routes() -> Iterator[None]:
    from llmkit.bridge.server import BridgeServer

    clients = [FakeClient(name) for name in ("active", "list", "load", "fake")]
    bridges = [BridgeServer(client) for client in clients]
    yield
    for bridge, client in zip(bridges, clients, strict=True):
        bridge.close()
        client.close()


async def test_models_named_like_routes_are_there(named_like_routes: None) -> None:
    async for api in serve(None):
        for name in ("active", "list", "load"):
            reply = await curl(api.url, f"/v1/models/{name}")
            assert reply.code == 200 and reply.json["id"] == name, name
            assert reply.json["object"] == "model"
        assert (await curl(api.url, "/v1/models/unload")).code == 404
        assert (await curl(api.url, "/v1/models/unload", {})).code == 501
        assert (await curl(api.url, "/models/load", {"model": "load"})).code == 501
        assert (await curl(api.url, "/models/load")).json["name"] == "load"


# The service without a prefix.


async def test_completions_have_text_at_the_top(gateway: Governed) -> None:
    body = {
        "model": "fake",
        "prompt": "Once upon a time",
        "max_tokens": 10,
        "temperature": 0.0,
        "top_p": 0.95,
        "stop": ["\n\n"],
        "stream": False,
    }
    reply = await curl(gateway.api.url, "/completions", body)
    same = (await curl(gateway.api.url, "/v1/completions", body)).json
    assert reply.json["text"] == reply.json["choices"][0]["text"] == same["choices"][0]["text"]
    assert reply.json["tokens"] == 10 and reply.json["model"] == "fake" and "text" not in same
    streamed = await curl(gateway.api.url, "/completions", {**body, "stream": True})
    assert streamed.events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in streamed.events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == reply.json["text"]
    short = await curl(gateway.api.url, "/completions", {"prompt": "x", "temperature": 0})
    assert short.json["tokens"] == 128, "as long as there, when nobody says"


PROMPTED = {
    "model-name": "fake",
    "prompt": "What is async/await in Rust?",
    "max-token": 12,
    "temperature": 0,
    "top-p": 0.95,
    "top-k": 40,
    "repeat-penalty": 1.0,
    "system-prompt": "You are a Rust expert",
    "stop": [],
    "device": "cpu",
}


async def test_a_prompt_is_answered_in_bare_events(gateway: Governed) -> None:
    reply = await curl(gateway.api.url, "/chat/completions", PROMPTED)
    assert reply.code == 200 and reply.headers["content-type"] == "text/event-stream"
    messages = [
        {"role": "system", "content": "You are a Rust expert"},
        {"role": "user", "content": "What is async/await in Rust?"},
    ]
    expected = await text_of(gateway, messages, max_tokens=12)
    assert "".join(reply.events) == expected and "[DONE]" not in reply.text
    # As their clients read it: each line without "data: ".
    lines = [line for line in reply.text.split("\n") if line.startswith("data: ")]
    assert "".join(line[6:] for line in lines) == expected
    whole = await curl(gateway.api.url, "/chat/completions", {**PROMPTED, "stream": False})
    assert whole.json["text"] == expected and whole.json["tokens"] == 12


async def test_a_session_has_the_name_that_its_client_gives_it(gateway: Governed) -> None:
    url = gateway.api.url
    first = {**PROMPTED, "session-id": "my-session", "max-token": 4}
    said = "".join((await curl(url, "/chat/completions", first)).events)
    await curl(url, "/chat/completions", {**first, "prompt": "And then?"})
    asked = gateway.records[-1].requests[0].messages
    assert asked is not None
    told = [(m.role, m.text) for m in asked]
    assert ("assistant", said) in told and told[-1] == ("user", "And then?")
    listed = (await curl(url, "/v1/sessions")).json["data"]
    assert [session["title"] for session in listed] == ["my-session"]
    body = {
        "prompt": "And now?",
        "sampling_params": {"session_id": "my-session", "max_tokens": 3},
    }
    assert (await curl(url, "/v1/generate", body)).objects[-1]["done"]
    asked = gateway.records[-1].requests[0].messages
    assert asked is not None and ("user", "And then?") in [(m.role, m.text) for m in asked]
    other = await curl(url, "/chat/completions", first, headers={CALLER: "other"})
    assert other.code == 200 and len((await curl(url, "/v1/sessions")).json["data"]) == 1


@pytest.mark.parametrize("is_header", [False, True])
async def test_a_prompt_without_a_template_goes_on_with_no_session(
    gateway: Governed, is_header: bool
) -> None:
    named, url = f"sess_{'0' * 24}", gateway.api.url
    sampling = {"max_tokens": 3, **({} if is_header else {"session_id": named})}
    body = {"prompt": "x", "use_chat_template": False, "sampling_params": sampling}
    headers = {"session-id": named if is_header else "its own"}
    reply = await curl(url, "/v1/generate", body, headers=headers)
    assert reply.code == 400 and "session_id" in reply.json["error"]["message"]


async def test_openais_client_without_a_prefix(gateway: Governed) -> None:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=gateway.api.url, api_key="k") as client:
        assert [m.id async for m in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).id == "fake"
        chat = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "Hello!"}],
            max_tokens=6,
            temperature=0,
        )
        assert chat.choices[0].message.content == await text_of(gateway, MESSAGES)
        stream = await client.completions.create(
            model="fake", prompt="x", max_tokens=6, temperature=0, stream=True
        )
        text = "".join([chunk.choices[0].text async for chunk in stream])
        whole = await client.completions.create(
            model="fake", prompt="x", max_tokens=6, temperature=0
        )
        assert text == whole.choices[0].text


async def test_messages_without_a_prefix_are_openais(gateway: Governed) -> None:
    reply = await curl(gateway.api.url, "/chat/completions", {**GREEDY, "messages": MESSAGES})
    assert reply.json["choices"][0]["message"]["content"] == await text_of(gateway, MESSAGES)
    dashed = {"model-name": "fake", "messages": MESSAGES, "max-token": 6, "temperature": 0}
    streamed = await curl(gateway.api.url, "/chat/completions", {**dashed, "device": "auto"})
    chunks = [json.loads(event) for event in streamed.events[:-1]]
    said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert said == await text_of(gateway, MESSAGES)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"device": "cuda"}, "device"),
        ({"device": "abacus"}, "device"),
        ({"max-token": 0}, "max-token"),
        ({"top-p": 2.0}, "top-p"),
        ({"prompt": ""}, "prompt"),
        ({"session-id": "\n"}, "session-id"),
        ({"modell": "x"}, "modell"),
    ],
)
async def test_what_a_prompt_asks_is_honoured_or_refused(
    gateway: Governed, change: dict[str, Any], word: str
) -> None:
    reply = await curl(gateway.api.url, "/chat/completions", {**PROMPTED, **change})
    error = reply.json["error"]
    assert reply.code == 400 and word in error["message"], error


async def test_models_without_a_prefix(gateway: Governed) -> None:
    reply = (await curl(gateway.api.url, "/models")).json
    assert reply["models"] == ["fake"] and reply["data"][0]["id"] == "fake"
    one = (await curl(gateway.api.url, "/models/fake")).json
    assert (one["id"], one["name"], one["context_length"]) == ("fake", "fake", 5000)
    assert (await curl(gateway.api.url, "/models/none")).code == 404


# The service with /api/llms, whose paths are Ollama's too.


async def test_llms_lists_generates_and_chats(gateway: Governed) -> None:
    (model,) = (await curl(gateway.api.url, "/api/llms")).json
    assert model["id"] == "fake" and model["capabilities"] == ["text-generation", "chat"]
    body = {"prompt": "Hello!", **GREEDY}
    reply = (await curl(gateway.api.url, "/api/generate", body)).json
    expected = await text_of(gateway, MESSAGES)
    assert reply == {
        "text": expected,
        "model": "fake",
        "tokens_generated": 6,
        "finish_reason": "length",
    }
    reply = (await curl(gateway.api.url, "/api/chat", {**GREEDY, "messages": MESSAGES})).json
    assert reply["message"] == {"role": "assistant", "content": expected}
    streamed = await curl(gateway.api.url, "/api/chat/stream", {**GREEDY, "messages": MESSAGES})
    assert "".join(event["content"] for event in streamed.objects) == expected
    streamed = await curl(gateway.api.url, "/api/generate/stream", body)
    assert "".join(event["text"] for event in streamed.objects) == expected
    streamed = await curl(gateway.api.url, "/api/generate", {**body, "stream": True})
    assert "".join(event["text"] for event in streamed.objects) == expected
    whole = await curl(gateway.api.url, "/api/generate", {**body, "stream": False})
    assert whole.json["text"] == expected
    plain = await curl(gateway.api.url, "/v1/completions", body)
    for path in ("/api/completions", "/api/completions/stream"):
        reply = await curl(gateway.api.url, path, body)
        made = reply.objects if path.endswith("stream") else [reply.json]
        assert "".join(m["text"] for m in made) == plain.json["choices"][0]["text"]


@pytest.mark.parametrize(
    ("body", "is_ollamas"),
    [
        ({"max_tokens": 3}, False),
        ({"temperature": 0.5}, False),
        ({"top_p": 0.5}, False),
        ({"options": {"num_predict": 3}}, True),
        ({}, True),
        ({"stop": ["x"]}, None),  # Ollama has it in options only: an error of Ollama's
    ],
)
async def test_the_fields_tell_the_dialects_apart(
    gateway: Governed, body: dict[str, Any], is_ollamas: bool | None
) -> None:
    common = {"model": "fake", "stream": False} if is_ollamas else {"model": "fake"}
    for path, more in (("generate", {"prompt": "x"}), ("chat", {"messages": MESSAGES})):
        reply = await curl(gateway.api.url, f"/api/{path}", {**common, **more, **body})
        if is_ollamas is None:
            assert reply.code == 400 and "stop" in reply.json["error"]
        else:
            assert ("done" in reply.json) is is_ollamas, reply.text


@pytest.mark.parametrize("dialect", ["ollama", "llms"])
async def test_a_setting_settles_the_dialect(dialect: str) -> None:
    async with governed(api_dialect=dialect) as gateway:
        body = {"model": "fake", "prompt": "x", "max_tokens": 3}
        reply = await curl(gateway.api.url, "/api/generate", body)
        assert reply.code == (400 if dialect == "ollama" else 200)
        reply = await curl(gateway.api.url, "/api/generate", {"model": "fake", "prompt": "x"})
        is_lines = reply.headers["content-type"] == "application/x-ndjson"
        assert is_lines is (dialect == "ollama")


async def test_llms_errors_have_a_code(gateway: Governed) -> None:
    url = gateway.api.url
    for path in ("/api/chat/stream", "/api/chat"):
        body = {"model": "none", "messages": MESSAGES, "max_tokens": 3}
        reply = await curl(url, path, body)
        assert reply.code == 404 and "none" in reply.json["error"]
        assert reply.json["code"] == "UNSUPPORTED_MODEL", path
        reply = await curl(url, path, {**GREEDY, "messages": []})
        assert reply.code == 400 and reply.json["code"] == "BAD_REQUEST", path
        strange = {**GREEDY, "messages": MESSAGES, "session_id": "sess_" + "0" * 24}
        reply = await curl(url, path, strange)
        assert reply.code == 404 and reply.json["code"] == "NOT_FOUND", path
    ollamas = {"model": "none", "messages": MESSAGES}
    assert (await curl(url, "/api/chat", ollamas)).json.keys() == {"error"}, "as Ollama says it"
    async with governed(api_dialect="llms") as other:
        reply = await curl(other.api.url, "/api/chat", b"{")
        assert reply.json["code"] == "BAD_REQUEST", "before anything tells whose body it is"
        reply = await curl(other.api.url, "/api/generate")
        assert reply.code == 405 and reply.json["code"] == "METHOD_NOT_ALLOWED"


async def test_a_body_of_llama_servers_gets_its_errors_without_a_prefix(gateway: Governed) -> None:
    body = {"prompt": "x", "model": "none"}
    reply = await curl(gateway.api.url, "/completions", {**body, "n_predict": 3})
    assert reply.json["error"]["type"] == "not_found_error" and reply.json["error"]["code"] == 404
    reply = await curl(gateway.api.url, "/completions", body)
    assert reply.json["error"]["code"] == "model_not_found"


async def test_the_llms_chat_goes_on_with_a_session(gateway: Governed) -> None:
    url, first = gateway.api.url, {**GREEDY, "messages": MESSAGES, "session_id": "garden"}
    said = (await curl(url, "/api/chat", first)).json["message"]["content"]
    more = {**first, "messages": [{"role": "user", "content": "And then?"}]}
    streamed = await curl(url, "/api/chat/stream", more)
    assert "".join(event["content"] for event in streamed.objects)
    asked = gateway.records[-1].requests[0].messages
    assert asked is not None
    assert [m.text for m in asked] == ["Hello!", said, "And then?"]
    (session,) = (await curl(url, "/v1/sessions")).json["data"]
    assert session["title"] == "garden"


# otron.


async def test_otron_answers_an_unknown_model_with_400() -> None:
    guards = Guards(Terms(max_repetitions=4))
    async with governed(guards=guards) as gateway:
        gateway.gateway._stages.append(matching)
        for path in ("/v1/chat/completions", "/chat/completions"):
            reply = await curl(gateway.api.url, path, {"model": "none", "messages": MESSAGES})
            error = reply.json["error"]
            assert reply.code == 400 and error["type"] == "model_mismatch", error
            assert error["param"] == "model" and "none" in error["message"]
        assert (await curl(gateway.api.url, "/v1/models/none")).code == 404
        body = {**GREEDY, "messages": MESSAGES, "max_tokens": 400}
        reply = await curl(gateway.api.url, "/v1/chat/completions", body)
        assert reply.json["usage"]["completion_tokens"] <= 400
        (request,) = gateway.records[-1].requests
        assert request.sampling.max_repetitions == 4
        await curl(gateway.api.url, "/v1/chat/completions", {**body, "max_repetitions": 9})
        assert gateway.records[-1].requests[0].sampling.max_repetitions == 9
