"""`llmkit.attach` over HTTP: the same engine through a gateway, its rules, and what goes wrong."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from access_client import entry
from fakes import FakeClient, ask, interrupt_after, wait_for
from remote_gateway import ANN, RemoteGateway, gateway, remote, slow

import llmkit
from llmkit.bridge import over_http, wire
from llmkit.cluster.address import Address
from llmkit.cluster.remote import RemoteEngine
from llmkit.errors import (
    ContextLengthError,
    EngineGoneError,
    InvalidRequestError,
    ModelNotFoundError,
)
from llmkit.llm import Interrupted
from llmkit.protocol import (
    DescribeVocabulary,
    Detokenize,
    EmbeddingRequest,
    FinishReason,
    GenerationRequest,
    Inquiry,
    ModelDescription,
    SamplingParams,
    Tokenize,
    Unload,
)

__all__ = ["gateway", "remote", "slow"]  # fixtures

MINE = {"llmkit-remote"}
"""Threads that a handle starts."""


def test_a_remote_engine_is_the_same_engine(slow: FakeClient, remote: RemoteEngine) -> None:
    assert remote.description == replace(slow.description, path="fake.gguf")
    assert remote.state.phase == "ready" and remote.origin.kind == "url"
    stream = remote.submit(ask("hello", max_tokens=30))
    assert "".join(stream) == slow.submit(ask("hello", max_tokens=30)).result().text
    completion = stream.result()
    assert completion.usage.completion_tokens == 30 == len(completion.tokens)
    assert completion.metrics.ttft_s > 0 and completion.request_id == stream.request_id
    request = replace(ask("hi", max_tokens=4), n=3, show_tokens=True)
    results = [each.result() for each in remote.submit_choices(request)]
    assert [len(each.tokens) for each in results] == [4, 4, 4]
    assert len({each.request_id for each in results}) == 3
    wait_for(lambda: remote.stats().requests_total >= 5 and not remote.stats().num_running)
    assert remote.stats().num_slots == 4


def test_inquiries_and_vectors(remote: RemoteEngine) -> None:
    def asked(question: Any) -> Any:
        return remote.inquire(Inquiry("q", question)).result(30)

    assert asked(Tokenize("hé")).tokens == (104, 195, 169)
    assert asked(Detokenize((104, 105))) == "hi" and asked(DescribeVocabulary()).eos_token == "\0"
    with pytest.raises(InvalidRequestError, match="out of range"):
        asked(Detokenize((104, 2**70)))
    with pytest.raises(InvalidRequestError, match="lets go"):
        asked(Unload())
    many = tuple("x" * (i % 7 + 1) for i in range(over_http.MAX_TEXTS + 3))
    made = remote.embed(EmbeddingRequest("e", many)).result(30)
    assert made.num_tokens == tuple(map(len, many)) and len(made.data) == 8 * len(many)
    with pytest.raises(InvalidRequestError, match="empty"):
        remote.embed(EmbeddingRequest("e", ("",))).result(30)


def test_errors_keep_their_class(gateway: RemoteGateway, remote: RemoteEngine) -> None:
    with pytest.raises(ContextLengthError) as too_long:
        remote.submit(ask("x" * 6000)).result(30)
    assert (too_long.value.num_tokens, too_long.value.n_ctx) == (6000, 5000)
    with pytest.raises(ContextLengthError):
        remote.submit(ask("x" * 400_000))
    with pytest.raises(InvalidRequestError, match="empty") as empty:
        remote.submit(ask("")).result(30)
    assert empty.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="surrogate"):
        remote.submit(ask("\ud800"))
    with pytest.raises(InvalidRequestError, match="token id"):
        remote.submit(GenerationRequest("t", prompt=(1, 300))).result(30)
    with pytest.raises(ModelNotFoundError, match=r"'other'.*'fake'"):
        RemoteEngine(Address.of(gateway.url, ANN), "other")


def test_closing_a_stream_frees_its_slot(slow: FakeClient, remote: RemoteEngine) -> None:
    streams = [remote.submit(ask("hello", max_tokens=4000)) for _ in range(6)]
    wait_for(lambda: slow.engine.stats.num_running == 4)
    text = next(iter(streams[0]))
    streams[0].close()
    partial = streams[0].wait(30)
    assert partial is not None and partial.finish_reason is FinishReason.ABORT
    assert partial.text.startswith(text) and partial.usage.completion_tokens > 0
    for stream in streams[1:]:
        stream.close()
    del stream, streams
    wait_for(lambda: slow.engine.stats.num_running == slow.engine.stats.num_waiting == 0)
    request = replace(ask("hello", max_tokens=4000), n=2)
    one, two = remote.submit_choices(request)
    wait_for(lambda: slow.engine.stats.num_running == 2)
    one.close()
    assert one.result(30).finish_reason is FinishReason.ABORT and not two.finished
    two.close()
    wait_for(lambda: slow.engine.stats.num_running == 0)


def test_the_stop_button(gateway: RemoteGateway, slow: FakeClient) -> None:
    before = {*threading.enumerate()}
    llm = llmkit.attach(gateway.url, key=ANN, model="fake")
    interrupt_after(llm, 20)
    with pytest.raises(Interrupted):
        llm.generate("Once", max_tokens=4000)
    assert llm.last is not None and llm.last.finish_reason is FinishReason.ABORT
    assert len(llm.last.text) >= 10
    wait_for(lambda: slow.engine.stats.num_running == 0)
    assert llm.generate("The", max_tokens=2).usage.completion_tokens == 2
    assert "fake" in repr(llm) and not llm.closed
    with pytest.raises(InvalidRequestError, match=f"{gateway.url}/v1"):
        llm.serve()
    llm.unload()
    assert "unloaded" in repr(llm)
    wait_for(lambda: not [t for t in threading.enumerate() if t.name in MINE and t not in before])
    with pytest.raises(llmkit.ModelUnloadedError):
        llm.generate("The")


def test_a_server_that_goes_away_and_comes_back(
    gateway: RemoteGateway, remote: RemoteEngine
) -> None:
    running = remote.submit(ask("hello", max_tokens=4000))
    pieces = iter(running)
    next(pieces)
    gateway.stop()
    with pytest.raises(EngineGoneError, match="lost"):
        running.result(30)
    assert running.text and not remote.state.is_gone
    with pytest.raises(EngineGoneError, match=f"nothing answers at {gateway.url}"):
        remote.submit(ask("hello")).result(30)
    assert remote.stats().num_running == 0
    again = RemoteGateway([entry("ann")], base_path="/services/llmkit", port=gateway.port)
    assert remote.submit(ask("hello")).result(30).usage.completion_tokens == 8
    again.stop()
    third = RemoteGateway([entry("ann")], base_path="/services/llmkit", port=gateway.port)
    assert remote.submit(ask("hello")).result(30), "its kept connections were closed"
    third.stop()


def test_closing_ends_everything(remote: RemoteEngine) -> None:
    streams = [remote.submit(ask("hello", max_tokens=4000)) for _ in range(70)]
    pieces = iter(streams[0])
    next(pieces)
    remote.close()
    for stream in streams:
        with pytest.raises(EngineGoneError):
            stream.result(30)
    with pytest.raises(EngineGoneError):
        remote.submit(ask("x"))
    with pytest.raises(EngineGoneError):
        remote.inquire(Inquiry("q", Tokenize("x")))
    assert remote.state.is_gone
    remote.close()


def test_a_forked_child_is_told(gateway: RemoteGateway) -> None:
    code = f"""
import llmkit, os
llm = llmkit.attach({gateway.url!r}, key={ANN!r})
pid = os.fork()
if pid == 0:
    try: llm.generate("a", max_tokens=1)
    except llmkit.EngineGoneError as e: print("child:", "fork" in str(e), flush=True)
    again = llmkit.attach({gateway.url!r}, key={ANN!r})
    print("again:", again.generate("a", max_tokens=1).usage.completion_tokens, flush=True)
    again.unload()
    raise SystemExit
os.waitpid(pid, 0)
print("parent:", llm.generate("a", max_tokens=1).usage.completion_tokens)
s = llm.stream("a", max_tokens=3000); print(len(next(iter(s))) > 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "child: True\nagain: 1\nparent: 1\nTrue\n" and not done.stderr, done


HEAVY = (
    "llama_cpp", "llguidance", "gguf", "safetensors", "huggingface_hub", "pandas", "matplotlib",
    "ipywidgets", "IPython", "jupyter_server", "jupyter_core", "numpy", "zmq", "jinja2", "pydantic",
    "sqlalchemy", "typer",
)  # fmt: skip


def test_a_notebook_needs_next_to_nothing(gateway: RemoteGateway) -> None:
    """Neither llama.cpp nor a compiler, and it is there at once."""
    code = f"""
import sys, time
for name in {HEAVY!r}: sys.modules[name] = None
began = time.process_time()
import llmkit; llm = llmkit.attach({gateway.url!r}, model="fake")
took = time.process_time() - began
text = llm.generate("hi", max_tokens=3, temperature=0).text
print(len(text), "".join(llm.stream("hi", max_tokens=3, temperature=0)) == text)
print(llm.tokenize("hi"), llm.count("hi") if hasattr(llm, "count") else 2, took < 1.0)
print(took, file=sys.stderr)
"""
    env = {**os.environ, "LLMKIT_API_KEY": ANN}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.stdout.splitlines() == ["3 True", "[104, 105] 2 True"], done


class Other(http.server.BaseHTTPRequestHandler):
    """A server of another kind: its answers are by path."""

    seen: list[str]

    def do_GET(self) -> None:
        type(self).seen.append(self.headers.get("Authorization", ""))
        kind = self.path.split("/")[1]
        answers: dict[str, tuple[int, bytes]] = {
            "page": (404, b"<html>Not found"),
            "openai": (404, b'{"error":{"message":"?","type":"x","param":null,"code":null}}'),
            "html": (200, b"<html>Welcome"),
            "json": (200, b"{}"),
            "proxy": (503, b"Service Unavailable"),
            "moved": (302, b""),
            "old": (200, wire.encode(over_http.Engine("m", ModelDescription("m", ""), 4, "0.0.9"))),
        }
        status, body = answers[kind]
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_address[1]}/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def other() -> Iterator[str]:
    Other.seen = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    "kind, what",
    [
        ("page", "no llmkit gateway at .*status 404.*openai package"),
        ("openai", "no llmkit gateway at .*status 404"),
        ("html", "no llmkit gateway at .*Welcome"),
        ("json", "no llmkit gateway at "),
        ("proxy", "not there at the moment .*503"),
        ("moved", "sends everybody to http"),
        ("old", r"cannot be used: .*llmkit 0\.0\.9"),
    ],
)
def test_another_server(other: str, kind: str, what: str) -> None:
    with pytest.raises(EngineGoneError, match=what):
        llmkit.attach(f"{other}/{kind}", key="k")
    assert Other.seen == ["Bearer k"], "asked once, and no redirect was followed"


def test_no_server_and_no_address(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EngineGoneError, match=f"nothing answers at {url}"):
            llmkit.attach(url)
    with pytest.raises(EngineGoneError, match=r"does not speak TLS|nothing answers"):
        llmkit.attach(other.replace("http", "https"))
    with pytest.raises(EngineGoneError, match=r"nothing answers at http://nowhere\.invalid"):
        llmkit.attach("http://nowhere.invalid")
    for bad in ("ftp://x", "http://", "http://a b", "http://u:p@h", "http://h:x", "http://h?q"):
        with pytest.raises(InvalidRequestError, match="address"):
            llmkit.attach(bad)
    with pytest.raises(InvalidRequestError, match="key"):
        llmkit.attach(other, key="a\nb")
    with pytest.raises(InvalidRequestError, match="once"):
        llmkit.attach("a", model="b")


def test_events_come_at_once_and_pass_proxies(
    gateway: RemoteGateway, slow: FakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is an event of its own, with the headers that keep proxies from buffering: the next
    is computed when it has come."""
    go_on, execute = threading.Semaphore(1), slow.runner.execute
    monkeypatch.setattr(
        slow.runner, "execute", lambda batch: (go_on.acquire(timeout=1), execute(batch))[1]
    )
    body = wire.encode_request(ask("hello", max_tokens=300))
    request = urllib.request.Request(
        f"{gateway.url}/engine/submit?model=fake", body, {"Authorization": f"Bearer {ANN}"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.headers["X-Accel-Buffering"] == "no"
        assert reply.headers["Content-Type"] == "text/event-stream"
        lines = []
        for line in reply:
            if line != b"\n":
                lines.append(line)
                go_on.release()
    events = [over_http.unpack_event(line[6:].strip()) for line in lines]
    assert len(events) > 250 and len(events[-1].ends) == 1
    assert sum(news.num_tokens for each in events for news in each.news) == 300


def test_no_slow_reader_is_waited_for_by_others(remote: RemoteEngine) -> None:
    unread = [remote.submit(ask("x", max_tokens=300)) for _ in range(3)]
    assert remote.submit(ask("y", max_tokens=3)).result(30).usage.completion_tokens == 3
    assert [s.result(30).usage.completion_tokens for s in unread] == [300] * 3


def test_sampling_that_is_not_said_is_the_server_s(slow: FakeClient) -> None:
    assert over_http.given(
        wire.encode_request(
            GenerationRequest("r", SamplingParams(max_tokens=4, temperature=0), prompt="x")
        )
    ) == {"max_tokens", "temperature"}
