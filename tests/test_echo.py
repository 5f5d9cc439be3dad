"""The echo: an engine without a model, and `llmkit serve echo` as clients see it."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import ollama
import openai
import psutil
import pytest
from fakes import wait_for
from socket_client import ChatClient
from test_cli import Served

from llmkit.cli import main
from llmkit.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.protocol import (
    Detokenize,
    EmbeddingRequest,
    FinishReason,
    GenerationRequest,
    Grammar,
    Inquiry,
    ListRequests,
    ListSteps,
    Message,
    SamplingParams,
    Tokenize,
    TokenizeChat,
    Tool,
)
from llmkit.runtime.echo import EchoEngine

HELLO = (Message("system", "Be brief."), Message("user", "Hello, world"))


def asked(number: int = 0, /, **sampling: Any) -> GenerationRequest:
    params = SamplingParams(**{"max_tokens": None, **sampling})
    return GenerationRequest(f"r{number}", params, messages=HELLO)


@pytest.fixture
def engine() -> Iterator[EchoEngine]:
    engine = EchoEngine(n_ctx=200, n_slots=2, max_waiting=2, step_s=0.001)
    yield engine
    engine.close()


# The engine


def test_it_answers_with_the_last_message_token_by_token(engine: EchoEngine) -> None:
    stream = engine.submit(asked())
    pieces = list(stream)
    done = stream.result()
    assert "".join(pieces) == done.text == "Echo: Hello, world" and len(pieces) == 5
    assert done.finish_reason is FinishReason.STOP
    assert done.usage.completion_tokens == len(done.tokens) == 5
    question = Inquiry("q", TokenizeChat(HELLO))
    assert done.usage.prompt_tokens == len(engine.inquire(question).result().tokens)
    assert done.metrics.ttft_s > 0 and done.metrics.decode_s > 0


@pytest.mark.parametrize(
    ("sampling", "text", "reason"),
    [
        ({"max_tokens": 2}, "Echo: He", FinishReason.LENGTH),
        ({"max_tokens": 5}, "Echo: Hello, world", FinishReason.STOP),
        ({"max_tokens": 0}, "", FinishReason.LENGTH),
        ({"stop": ("lo, w",)}, "Echo: Hel", FinishReason.STOP),
        ({"stop": ("nothing",)}, "Echo: Hello, world", FinishReason.STOP),
    ],
)
def test_it_ends_as_a_model_does(
    engine: EchoEngine, sampling: dict[str, Any], text: str, reason: FinishReason
) -> None:
    stream = engine.submit(asked(**sampling))
    assert "".join(stream) == text
    done = stream.result()
    assert (done.text, done.finish_reason) == (text, reason)
    assert done.stop == ("lo, w" if "lo, w" in sampling.get("stop", ()) else None)


def test_prompts_choices_and_log_probabilities(engine: EchoEngine) -> None:
    tokens = engine.inquire(Inquiry("q", Tokenize("Grüße 🎈"))).result().tokens
    assert engine.inquire(Inquiry("q", Detokenize(tokens))).result() == "Grüße 🎈"
    for prompt in ("Grüße 🎈", tokens):
        done = engine.submit(GenerationRequest("r", prompt=prompt)).result()
        assert done.text == "Echo: Grüße 🎈"
    of_another_model = GenerationRequest("r", prompt=(1, 128_000))
    assert engine.submit(of_another_model).result().text == "Echo: <1><128000>"
    request = GenerationRequest(
        "r", SamplingParams(logprobs=1, prompt_logprobs=0), prompt="ab", n=2
    )
    for stream in engine.submit_choices(request):
        done = stream.result()
        assert [entry.logprob for entry in done.logprobs] == [0.0] * len(done.tokens)
        assert [entry.logprob for entry in done.prompt_logprobs] == [None]


def test_what_it_cannot_do_is_an_error(engine: EchoEngine) -> None:
    with pytest.raises(ContextLengthError):
        engine.submit(GenerationRequest("r", prompt="x" * 1000))
    with pytest.raises(InvalidRequestError, match="empty"):
        engine.submit(GenerationRequest("r", prompt=""))
    with pytest.raises(InvalidRequestError, match="only an echo"):
        engine.submit(asked(grammar=Grammar.of(choice=["yes"])))
    with pytest.raises(InvalidRequestError, match="only an echo"):
        engine.inquire(Inquiry("q", object()))  # type: ignore[arg-type]
    assert engine.inquire(Inquiry("q", ListSteps())).result() == ()
    with_tools = GenerationRequest(
        "r", SamplingParams(grammar=Grammar.of(choice=["x"])), messages=HELLO, tools=(Tool("f"),)
    )
    assert engine.submit(with_tools).result().text == "Echo: Hello, world"


def test_it_queues_aborts_and_ends() -> None:
    engine = EchoEngine(n_slots=1, max_waiting=1, step_s=0.02)
    long = GenerationRequest("long", messages=(Message("user", "word " * 1000),))
    first = engine.submit(long)
    wait_for(lambda: engine.stats().num_running == 1)
    (running,) = engine.inquire(Inquiry("q", ListRequests())).result()
    assert running.request == "long"
    second = engine.submit(asked(2))
    assert engine.stats().num_waiting == 1
    with pytest.raises(QueueFullError):
        engine.submit(asked(3))
    first.close()
    assert first.wait(30) is not None
    assert second.result(30).text == "Echo: Hello, world"
    waits = engine.submit(long)
    engine.close()
    with pytest.raises(ModelUnloadedError):
        waits.result(30)
    with pytest.raises(ModelUnloadedError):
        engine.submit(asked(4))
    assert engine.state.is_gone and engine.stats().requests_total == 2


def test_vectors_depend_on_the_words_alone(engine: EchoEngine) -> None:
    texts = ("a red house", "House red a", "the blue sea")
    made = engine.embed(EmbeddingRequest("e", texts)).result()
    same = engine.embed(EmbeddingRequest("f", texts)).result()
    size = 4 * made.size
    first, second, third = (made.data[i * size : (i + 1) * size] for i in range(3))
    assert made == same and first == second != third
    with pytest.raises(InvalidRequestError):
        engine.embed(EmbeddingRequest("e", ("",)))


# The server


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("--model", "echo", "--port", "0", "--n-slots", "2", LLMKIT_API_KEY="k")
    wait_for(lambda: server.health() == 200, 30)
    yield server
    assert not psutil.Process(server.process.pid).children(), "there is no worker"
    code, errors = server.stop()
    assert code == 0 and "Traceback" not in errors


def test_openai(served: Served) -> None:
    client = openai.OpenAI(base_url=served.url, api_key="k", max_retries=0)
    raw = client.chat.completions.with_raw_response.create(
        model="gpt-4o", messages=[{"role": "user", "content": "Hi"}]
    )
    reply = raw.parse()
    assert raw.headers["x-llmkit-echo"] == "true" and reply.model == "echo"
    assert str(reply.system_fingerprint).endswith("-echo")
    assert reply.choices[0].message.content == "Echo: Hi" and reply.usage is not None
    chunks = list(
        client.chat.completions.create(
            model="any/name:at-all",
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "Echo: Hi" and chunks[-1].usage is not None
    assert client.completions.create(model="x", prompt="Hi").choices[0].text == "Echo: Hi"
    assert client.responses.create(model="x", input="Hi").output_text == "Echo: Hi"
    vectors = client.embeddings.create(model="text-embedding-3-small", input=["a", "a"]).data
    assert vectors[0].embedding == vectors[1].embedding
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("gpt-4o").id == "gpt-4o"
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for choice in ("auto", "required", "none"):
        called = client.chat.completions.create(
            model="x",
            messages=[{"role": "user", "content": "Hi"}],
            tools=tools,
            tool_choice=choice,  # type: ignore[arg-type]
        )
        assert called.choices[0].message.content == "Echo: Hi", choice
    with pytest.raises(openai.BadRequestError, match="only an echo"):
        client.chat.completions.create(
            model="x",
            messages=[{"role": "user", "content": "Hi"}],
            response_format={"type": "json_object"},
        )
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=served.url, api_key="wrong", max_retries=0).models.list()


def test_it_loads_no_models_and_says_so(served: Served) -> None:
    def ask(path: str, body: bytes | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(served.url + path, body, {"Authorization": "Bearer k"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    assert ask("/models/list") == (200, {"models": []}), "a file, not a model called list"
    for path in ("load", "reload", "unload"):
        status, said = ask(f"/models/{path}", b"{}")
        assert status == 501 and said["error"]["type"] == "not_supported_error", path
    (model,) = ask("/models")[1]["data"]
    assert model["meta"]["n_vocab"] < 1e6, "clients allocate by it"


def test_anthropic(served: Served) -> None:
    client = anthropic.Anthropic(base_url=served.url.removesuffix("/v1"), api_key="k")
    with client.messages.stream(
        model="claude-x", max_tokens=50, messages=[{"role": "user", "content": "Hi"}]
    ) as stream:
        assert "".join(stream.text_stream) == "Echo: Hi"
        assert stream.get_final_message().stop_reason == "end_turn"
        assert stream.response.headers["x-llmkit-echo"] == "true"


def test_ollama(served: Served) -> None:
    client = ollama.Client(
        host=served.url.removesuffix("/v1"), headers={"Authorization": "Bearer k"}
    )
    parts = client.chat(model="llama3", messages=[{"role": "user", "content": "Hi"}], stream=True)
    assert "".join(str(part.message.content) for part in parts) == "Echo: Hi"
    assert client.generate("llama3:latest", "Hi").response == "Echo: Hi"
    assert len(client.embed("x", "Hi").embeddings[0]) > 1
    assert client.show("llama3").details is not None


def test_errors_and_pages_are_marked_too(served: Served) -> None:
    base = served.url.removesuffix("/v1")
    for path, status in (("/v1/nothing", 404), ("/health", 200), ("/openapi.json", 200)):
        request = urllib.request.Request(base + path, headers={"Authorization": "Bearer k"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                found, headers = reply.status, reply.headers
        except urllib.error.HTTPError as error:
            found, headers = error.code, error.headers
        assert found == status and headers["x-llmkit-echo"] == "true", path


async def test_many_callers_are_answered_each_with_its_own(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="k", max_retries=0) as client:
        replies = await asyncio.gather(
            *(client.completions.create(model="m", prompt=f"number {i}") for i in range(30))
        )
    texts = [reply.choices[0].text for reply in replies]
    assert texts == [f"Echo: number {i}" for i in range(30)]


def test_limits_and_the_settings_file_hold_for_it(tmp_path: Path) -> None:
    file = tmp_path / "llmkit.toml"
    file.write_text('rate = "2/minute"\nmax_tokens_limit = 2\n[models.dev]\nmodel = "echo"\n')
    server = Served("--config", str(file), "--port", "0")
    try:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        wait_for(lambda: server.health() == 200, 30)
        reply = client.completions.create(model="whatever", prompt="Hello, world")
        assert reply.model == "dev" and reply.choices[0].text == "Echo: He"
        assert reply.choices[0].finish_reason == "length"
        client.completions.create(model="whatever", prompt="Hello, world")
        with pytest.raises(openai.RateLimitError) as limited:
            client.completions.create(model="whatever", prompt="Hello, world")
        assert limited.value.response.headers["x-llmkit-echo"] == "true"
    finally:
        server.stop()


async def test_sessions_and_the_socket_work_with_it(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/llmkit.db"
    server = Served("echo", "--port", "0", "--db-url", database, "--log-level", "warning")
    base = server.url.removesuffix("/v1")
    try:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none") as client:
            session = (await client.post("/sessions", body={}, cast_to=httpx.Response)).json()
            for said in ("one", "two"):
                reply = await client.chat.completions.create(
                    model="any",
                    messages=[{"role": "user", "content": said}],
                    extra_body={"session_id": session["id"]},
                )
                assert reply.choices[0].message.content == f"Echo: {said}"
            path = f"/sessions/{session['id']}/messages"
            listed = (await client.get(path, cast_to=httpx.Response)).json()["data"]
        assert [m["content"] for m in listed] == ["one", "Echo: one", "two", "Echo: two"]
        async with ChatClient.open(base) as chat:
            await chat.say("send", content="three", session=session["id"], model="any")
            text = ""
            while (frame := json.loads(await chat.text() or "null"))["type"] != "end":
                assert frame["type"] != "error", frame
                text += frame.get("text", "")
        assert text == "Echo: three"
    finally:
        server.stop()


def test_it_is_served_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "echo", "smollm2", "--port", "0"]) == 1
    assert "serve it alone" in capsys.readouterr().err
    assert main(["config", "show", "echo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["value"] == ["echo"]
