"""`llmkit smoke`: a deployment of its own, others' endpoints, and faults that it must find."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from fakes import wait_for
from terminal import LLMKIT, Script

from llmkit.cli import main
from llmkit.cli.endpoint import Endpoint
from llmkit.cli.findings import Finding
from llmkit.cli.probes import Probes

CHECKS = (
    "health", "models", "chat", "chat, streamed", "completions", "embeddings", "tools",
    "JSON schema", "responses", "Anthropic", "Ollama", "cancel", "errors", "key", "metrics", "docs",
)  # fmt: skip


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LLMKIT, "smoke", *args],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, **environment},
    )


@pytest.mark.model
def test_a_deployment_of_its_own() -> None:
    """All of the gateway, from end to end. The user's settings are not in the way."""
    done = run("--json", LLMKIT_PORT="1", LLMKIT_API_KEY="theirs", LLMKIT_NONSENSE="x")
    said = json.loads(done.stdout)
    found = {f["topic"]: f for f in said["findings"]}
    assert list(found) == ["start", *CHECKS, "stop"]
    bad = {topic: f["text"] for topic, f in found.items() if f["level"] == "bad"}
    assert not bad and said["ok"] and done.returncode == 0, bad
    for topic in CHECKS:
        assert found[topic]["level"] == "ok", found[topic]
        assert found[topic]["seconds"] >= 0
    assert "384 numbers" in found["embeddings"]["text"]


@pytest.mark.model
def test_ctrl_c_leaves_no_process() -> None:
    process = subprocess.Popen(
        [*LLMKIT, "smoke"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    family: list[psutil.Process] = []

    def started() -> bool:
        family[:] = psutil.Process(process.pid).children(recursive=True)
        return len(family) >= 2  # the gateway and a worker

    wait_for(started, 60)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    wait_for(lambda: not any(p.is_running() for p in family))


@pytest.mark.model
def test_a_server_that_does_not_start() -> None:
    done = run("--model", "/nowhere/x.gguf")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert text.startswith("BAD start") and "did not start" in text and "/nowhere/x.gguf" in text


def test_nobody_answers() -> None:
    began = time.monotonic()
    done = run("http://127.0.0.1:9")
    assert done.returncode == 1 and time.monotonic() - began < 60
    (line,) = done.stdout.strip().splitlines()
    assert line.startswith("BAD") and "nothing answers at http://127.0.0.1:9/v1" in line


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "nonsense"]) == 1 and "http://127.0.0.1" in capsys.readouterr().err
    assert main(["smoke", "--timeout", "0"]) == 2


# Others' endpoints, and what can be wrong with one

Answer = tuple[int, dict[str, str], bytes]


def as_answer(status: int, value: Any, kind: str = "application/json") -> Answer:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return status, {"Content-Type": kind}, body


class Deployment(Script):
    """A small third party's endpoint; ``faults`` replace an answer by (method, path)."""

    def __init__(self, **faults: Any) -> None:
        super().__init__([])
        self.faults = faults
        handler: Any = self._server.RequestHandlerClass
        handler.do_GET = handler.do_POST = handler.do_DELETE = lambda h: self._serve(h)

    def _serve(self, handler: Any) -> None:
        size = int(handler.headers.get("content-length") or 0)
        data = handler.rfile.read(size)
        handler._note()
        name = {
            "/v1/models": "models",
            "/v1/models/m": "model",
            "/v1/chat/completions": "chat",
            "/health": "health",
            "/metrics": "metrics",
        }.get(handler.path, "")
        if name == "chat" and handler.command == "DELETE":
            handler._whole(405, {}, b"{}")
            return
        try:
            body = json.loads(data) if data else {}
        except ValueError:
            handler._whole(400, {}, b"{}")
            return
        name += "_stream" if body.get("stream") else ""
        answer = self.faults.get(name, getattr(self, name, None))
        if answer is None:
            handler._whole(404, {}, b"{}")
            return
        made = answer(body) if callable(answer) else answer
        if isinstance(made, tuple):
            handler._whole(*made)
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        for event in made:
            handler._write(f"data: {json.dumps(event)}\n\n")
        handler._write("data: [DONE]\n\n")

    @staticmethod
    def models(_: Any) -> Answer:
        return as_answer(200, {"object": "list", "data": [{"id": "m", "owned_by": "them"}]})

    @staticmethod
    def chat(body: Any, **more: Any) -> Answer:
        content = '{"color": "green"}' if body.get("response_format") else "Hello."
        choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        answer = {"object": "chat.completion", "choices": [choice], "usage": usage}
        return as_answer(200, {**answer, **more})

    @staticmethod
    def chat_stream(_: Any) -> list[Any]:
        return stream()


def stream(
    first: Any = None, last: str | None = "stop", ids: tuple[str, ...] = ("a",), usages: int = 1
) -> list[Any]:
    first = {"role": "assistant", "content": ""} if first is None else first
    deltas = [(first, None), ({"content": "Hello"}, None), ({}, last)]
    events: list[Any] = [
        {"id": ids[i % len(ids)], "choices": [{"delta": delta, "finish_reason": finish}]}
        for i, (delta, finish) in enumerate(deltas)
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 1}
    return [*events, *[{"id": ids[0], "choices": [], "usage": usage}] * usages]


def check(deployment: Deployment, **more: Any) -> dict[str, Finding]:
    with deployment:
        probes = Probes(Endpoint(deployment.url), more.get("model", ""), 30.0)
        return {finding.topic: finding for finding in probes.run()}


def test_what_is_not_offered_is_no_fault() -> None:
    found = check(Deployment())
    levels = {topic: finding.level for topic, finding in found.items()}
    assert set(found) == set(CHECKS) and "bad" not in levels.values(), found
    there = {topic for topic, level in levels.items() if level == "ok"}
    assert there == {"models", "chat", "chat, streamed", "JSON schema", "cancel", "errors"}
    assert "status 404" in found["Anthropic"].text


def bad_usage(body: Any) -> Answer:
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 9}
    return Deployment.chat(body, usage=usage)


def long_answer(body: Any) -> Answer:
    usage = {"prompt_tokens": 5, "completion_tokens": 300, "total_tokens": 305}
    return Deployment.chat(body, usage=usage)


@pytest.mark.parametrize(
    "topic, name, answer, words",
    [
        ("health", "health", as_answer(500, {}), "status 500"),
        ("models", "models", as_answer(200, {"object": "list", "data": []}), "no model is listed"),
        ("models", "models", as_answer(200, b"<html>"), "not JSON"),
        ("models", "models", as_answer(200, []), "another form"),
        ("models", "model", as_answer(200, {"id": "other"}), "another id"),
        ("chat", "chat", bad_usage, "does not add up"),
        ("chat", "chat", long_answer, "max_tokens"),
        ("chat", "chat", as_answer(200, {"object": "chat.completion"}), "another form"),
        ("chat", "chat", as_answer(200, None), "another form"),
        ("chat", "chat", as_answer(401, {"error": {"message": "Wrong key."}}), "--api-key"),
        ("chat, streamed", "chat_stream", [], "no event came"),
        ("chat, streamed", "chat_stream", stream(ids=("a", "b")), "several ids"),
        ("chat, streamed", "chat_stream", stream(first={"content": ""}), "no role"),
        ("chat, streamed", "chat_stream", stream(last=None), "why it ended"),
        ("chat, streamed", "chat_stream", stream(usages=0), "usage"),
        ("chat, streamed", "chat_stream", stream(usages=2), "usage"),
        ("chat, streamed", "chat_stream", [{"error": {"message": "it broke"}}], "it broke"),
        ("metrics", "metrics", as_answer(200, b"# TYPE a counter\n", "text/html"), "text/html"),
        ("metrics", "metrics", as_answer(200, b"nothing", "text/plain"), "no metrics"),
    ],
)  # fmt: skip
def test_a_fault_is_found(topic: str, name: str, answer: Any, words: str) -> None:
    found = check(Deployment(**{name: answer}))
    assert found[topic].level == "bad" and words in found[topic].text, found[topic]
    # One fault does not hide the others' answers.
    assert len(found) == len(CHECKS)


def test_an_answer_that_does_not_fit_its_schema() -> None:
    def chat(body: Any) -> Answer:
        return Deployment.chat({})

    found = check(Deployment(chat=chat))
    assert found["JSON schema"].level == "bad" and "does not fit" in found["JSON schema"].text


def test_a_server_that_is_too_slow() -> None:
    def sleepy(body: Any) -> Answer:
        time.sleep(3)
        return Deployment.chat(body)

    with Deployment(chat=sleepy) as deployment:
        probes = Probes(Endpoint(deployment.url), "m", 0.5)
        found = {finding.topic: finding for finding in probes.run()}
    assert found["chat"].level == "bad" and "in time" in found["chat"].text
    assert found["docs"].level == "none" or "in time" in found["docs"].text


def test_a_model_that_embeds_is_passed_over() -> None:
    def models(_: Any) -> Answer:
        return as_answer(200, {"object": "list", "data": [{"id": "vectors"}, {"id": "m"}]})

    def chat(body: Any) -> Answer:
        if body["model"] == "vectors":
            return as_answer(400, {"error": {"message": "it embeds"}})
        return Deployment.chat(body)

    faults: dict[str, Callable[[Any], Answer]] = {"models": models, "chat": chat}
    found = check(Deployment(**faults))
    assert found["chat"].text.startswith("m: ")
    assert check(Deployment(**faults), model="vectors")["chat"].level == "bad"
