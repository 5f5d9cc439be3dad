"""Both ends of the bridge over real ZMQ, with the fake model behind it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from fake_runner import FakeRunner
from fakes import FakeClient, ask, wait_for

from llmkit.bridge import connection as files
from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.server import PEER_TIMEOUT_S, BridgeServer
from llmkit.errors import (
    ContextLengthError,
    EngineGoneError,
    InvalidRequestError,
    ModelUnloadedError,
    QueueFullError,
)
from llmkit.protocol import (
    Completion,
    FinishReason,
    GenerationRequest,
    Grammar,
    Media,
    Message,
    RequestMetrics,
    SamplingParams,
    Tool,
    ToolCall,
    Usage,
)


@pytest.fixture
def slow() -> Iterator[FakeClient]:
    client = FakeClient(runner=FakeRunner(n_ctx=50_000, step_s=0.002))
    yield client
    client.close()


@pytest.fixture
def server(slow: FakeClient) -> Iterator[BridgeServer]:
    bridge = BridgeServer(slow)
    yield bridge
    bridge.close()


@pytest.fixture
def remote(server: BridgeServer) -> Iterator[BridgeClient]:
    client = BridgeClient(server.connection)
    yield client
    client.close()


def test_a_remote_engine_is_the_same_engine(slow: FakeClient, remote: BridgeClient) -> None:
    request = ask("hello", max_tokens=30)
    stream = remote.submit(request)
    assert "".join(stream).encode() == slow.runner.reference(b"hello", 30)
    local = slow.submit(ask("hello", max_tokens=30)).result(30)
    assert stream.result(30) == replace(
        local, request_id=request.request_id, usage=replace(local.usage, cached_tokens=0)
    )
    wait_for(lambda: remote.stats().requests_total == 2)
    assert remote.description == slow.description


def test_errors_keep_their_class(remote: BridgeClient) -> None:
    with pytest.raises(ContextLengthError) as too_long:
        remote.submit(ask("x" * 60_000)).result(30)
    assert (too_long.value.num_tokens, too_long.value.n_ctx) == (60_000, 50_000)
    with pytest.raises(InvalidRequestError, match="empty"):
        remote.submit(ask("")).result(30)


def hello(server: BridgeServer) -> bytes:
    return wire.encode(wire.Hello(server.connection.key, version=wire.VERSION))


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequestError("no", "p"),
        ContextLengthError(9, 4),
        QueueFullError("full"),
        ModelUnloadedError("gone"),
        EngineGoneError("away"),
    ],
)
def test_every_error_travels(error: Exception) -> None:
    back = wire.decode(wire.encode(wire.Failure.of(error)), wire.Failure).error()
    assert type(back) is type(error) and str(back) == str(error) and vars(back) == vars(error)


def test_requests_and_completions_travel() -> None:
    for request in (
        GenerationRequest(
            "a", SamplingParams(stop=("x",), logit_bias=((3, -1.5),), seed=4), prompt="p"
        ),
        GenerationRequest("b", prompt=(1, 2, 3)),
        GenerationRequest("c", messages=(Message("user", "hi", "me"), Message("system", ""))),
        GenerationRequest("d", messages=(Message("user", ("this", Media("5d41", "image"), "?")),)),
        GenerationRequest(
            "e",
            SamplingParams(grammar=Grammar("regex", "[0-9]+")),
            messages=(Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),)),),
            tools=(Tool("f", "does", {"type": "object", "maximum": 10**30}),),
            lora=(("french", 0.5),),
        ),
    ):
        assert wire.decode_request(wire.encode_request(request)) == request
    completion = Completion(
        "text",
        FinishReason.LENGTH,
        Usage(1, 2, 1),
        RequestMetrics(0.1, 0.2, 0.3, 0.4),
        (5, 6),
        "id",
        None,
    )
    end = wire.unpack(
        wire.pack(wire.Events(ends=[wire.End.of("id", completion)])), wire.EVENTS
    ).ends[0]
    assert end.completion("text", ()) == completion


def test_one_message_a_step_for_all_streams(slow: FakeClient, server: BridgeServer) -> None:
    slow.runner.step_s = 0.03
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(server.connection.address)
    sock.send_multipart([wire.HELLO, hello(server)])
    for i in range(4):
        request = ask("p" * (i + 1), max_tokens=20)
        about = wire.encode(wire.About(request.request_id))
        sock.send_multipart([wire.SUBMIT, wire.encode_request(request), about])
    together, ended = [], 0
    while ended < 4:
        sock.send_multipart([wire.PING, b"{}"])
        assert sock.poll(30_000)
        kind, payload = sock.recv_multipart()
        if kind == wire.EVENTS:
            events = wire.unpack(payload, kind)
            together.append(len(events.news))
            ended += len(events.ends)
    sock.close(0)
    context.term()
    # A late thread may merge steps, but never split one; 80 tokens are there in all.
    assert len(together) <= len(slow.runner.batches) < 80 - 4, (together, slow.runner.batches)


def test_abort_and_drop_free_the_slot(slow: FakeClient, remote: BridgeClient) -> None:
    stream = remote.submit(ask("a", max_tokens=40_000))
    wait_for(lambda: stream.text)
    stream.close()
    assert stream.wait(30).finish_reason is FinishReason.ABORT  # type: ignore[union-attr]
    for _ in remote.submit(ask("b", max_tokens=40_000)):
        break
    wait_for(lambda: slow.stats().num_running == 0)


def test_a_wrong_key_gets_nothing(slow: FakeClient, server: BridgeServer) -> None:
    stranger = BridgeClient(replace(server.connection, key="0" * 64))
    with pytest.raises(EngineGoneError):
        stranger.submit(ask("a")).result(30)
    stranger.close()
    assert slow.stats().requests_total == 0 and server.num_peers == 0


@contextmanager
def another_process(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Python in a process of its own that has printed "on"; its standard input ends with the
    block."""
    imports = (
        "import sys, time; sys.path[:0] = sys.argv[1:]\n"
        "from fake_runner import FakeRunner; from fakes import FakeClient, ask\n"
        "from llmkit.bridge.client import BridgeClient; "
        "from llmkit.bridge.server import BridgeServer\n"
        "from llmkit.bridge.connection import find_connections; "
        "from llmkit.errors import EngineGoneError\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", imports + code, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == b"on\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def stop_process(pid: int) -> None:
    """SIGSTOP, until all of its threads stand."""
    os.kill(pid, signal.SIGSTOP)

    def stands() -> bool:
        try:
            threads = [p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/stat")]
        except OSError:  # one of them has just ended
            return False
        return all(text.rsplit(")", 1)[1].split()[0] == "T" for text in threads)

    wait_for(stands)


def test_thousands_of_messages_to_a_stopped_reader_are_not_lost() -> None:
    with another_process(
        "b = BridgeServer(FakeClient('other', FakeRunner(n_slots=16), max_waiting=9999)); "
        "print('on', flush=True); sys.stdin.read(); b.close()"
    ) as owner:
        remote = BridgeClient(files.find_connections()[0])
        assert remote.submit(ask("a")).result(30)
        stop_process(owner.pid)
        streams = [remote.submit(ask("b", max_tokens=1)) for _ in range(4000)]
        os.kill(owner.pid, signal.SIGCONT)
        answered = 0
        for stream in streams:
            with contextlib.suppress(QueueFullError):  # more than are read at once
                answered += stream.result(30).usage.completion_tokens
        assert answered >= 1000
        remote.close()


def test_garbage_changes_nothing(
    slow: FakeClient, server: BridgeServer, remote: BridgeClient
) -> None:
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(server.connection.address)
    for frames in (
        [b"x"],
        [wire.HELLO, b"{"],
        [wire.HELLO, b"[]"],
        [wire.HELLO, b'{"key":1}'],
        [wire.SUBMIT, b"{}"],
        [b"", b"", b""],
        [wire.PING, b"\xff"],
    ):
        sock.send_multipart(frames)
    sock.send_multipart([wire.HELLO, hello(server)])
    for payload in (
        {},
        {"id": 1},
        {"id": "q", "sampling": {"nope": 1}, "prompt": "a", "messages": None},
        [],
        None,
        "x",
    ):
        packed = json.dumps(payload).encode()
        sock.send_multipart([wire.SUBMIT, packed])
        sock.send_multipart([wire.SUBMIT, packed, wire.encode(wire.About("q"))])
    assert remote.submit(ask("still here")).result(30).finish_reason is FinishReason.LENGTH
    sock.close(0)
    context.term()


def test_a_gateway_that_vanishes_has_its_requests_aborted(
    slow: FakeClient, server: BridgeServer, remote: BridgeClient
) -> None:
    code = (
        "s = BridgeClient(find_connections()[0]).submit(ask('a', max_tokens=40_000)); "
        "it = iter(s); next(it); print('on', flush=True); time.sleep(60)"
    )
    with another_process(code) as other:
        mine = remote.submit(ask("mine", max_tokens=40_000))
        wait_for(lambda: slow.stats().num_running == 2)
        other.kill()
    start = time.monotonic()
    wait_for(lambda: slow.stats().num_running == 1)
    assert time.monotonic() - start < 5 * PEER_TIMEOUT_S and not mine.finished
    mine.close()


def test_unloading_says_goodbye(
    slow: FakeClient, server: BridgeServer, remote: BridgeClient
) -> None:
    stream = remote.submit(ask("a", max_tokens=40_000))
    wait_for(lambda: stream.text)
    path = server.connection.path
    server.close()
    with pytest.raises(EngineGoneError, match="unloaded"):
        stream.result(30)
    with pytest.raises(EngineGoneError, match="unloaded"):
        remote.submit(ask("b"))
    assert (
        not path.exists()
        and not Path(server.connection.address.removeprefix("ipc://")).parent.exists()
    )
    wait_for(lambda: slow.stats().num_running == 0)


def test_a_silent_process_is_waited_for_not_given_up() -> None:
    """The owner is stopped (as if C code held its GIL): requests wait, and go on when it does."""
    with another_process(
        "b = BridgeServer(FakeClient('other')); print('on', flush=True); sys.stdin.read(); "
        "b.close()"
    ) as owner:
        remote = BridgeClient(files.find_connections()[0])
        assert remote.submit(ask("a")).result(30)
        stop_process(owner.pid)
        stream = remote.submit(ask("b"))
        assert stream.wait(3) is None and not remote.state.is_gone
        os.kill(owner.pid, signal.SIGCONT)
        assert stream.result(30)
    wait_for(lambda: remote.state.is_gone)
    assert "no longer served" in str(remote.state.reason)
    remote.close()


def test_a_client_that_was_stopped_for_long_begins_again(
    slow: FakeClient, server: BridgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: the client is stopped, after a while its request is aborted; awake
    again, it is told so once, and goes on."""
    code = (
        "c = BridgeClient(find_connections()[0]); s = c.submit(ask('a', max_tokens=40_000)); "
        "it = iter(s); next(it); print('on', flush=True)\n"
        "try: list(it)\n"
        "except EngineGoneError as e: print('told', 'aborted' in str(e), flush=True)\n"
        "print([c.submit(ask('b')).result(30).usage.completion_tokens for _ in range(20)] "
        "== [8] * 20, flush=True); c.close()"
    )
    with another_process(code) as other:
        stop_process(other.pid)
        with monkeypatch.context() as patch:
            patch.setattr("llmkit.bridge.server.STOPPED_S", 0.5)  # a minute, really
            wait_for(lambda: slow.stats().num_running == 0)
        os.kill(other.pid, signal.SIGCONT)
        assert other.stdout is not None and other.stdout.read() == b"told True\nTrue\n"


def test_a_killed_owner_is_noticed(private_runtime: Path) -> None:
    with another_process(
        "b = BridgeServer(FakeClient('other', FakeRunner(n_ctx=50_000, step_s=0.01))); "
        "print('on', flush=True); sys.stdin.read()"
    ) as owner:
        remote = BridgeClient(files.find_connections()[0])
        pieces = iter(remote.submit(ask("a", max_tokens=40_000)))
        next(pieces)
        owner.kill()
        with pytest.raises(EngineGoneError, match="killed"):
            list(pieces)
    assert files.find_connections() == [] and not list(private_runtime.glob("llmkit-*"))
    remote.close()


def test_over_tcp_it_is_encrypted(slow: FakeClient) -> None:
    server = BridgeServer(slow, tcp=True)
    address = server.connection.address
    assert (
        address.startswith("tcp://127.0.0.1:")
        and not address.endswith("*")
        and files.find_connections() == [server.connection]
    )
    remote = BridgeClient(files.find_connections()[0])
    assert "".join(remote.submit(ask("hello", max_tokens=30))).encode() == slow.runner.reference(
        b"hello", 30
    )
    remote.close()
    with zmq.Context() as context:
        for key in (None, zmq.curve_keypair()[0]):  # somebody who knows the port, and not the file
            with context.socket(zmq.DEALER) as sock:
                sock.linger = 0
                if key is not None:
                    sock.curve_serverkey, (sock.curve_publickey, sock.curve_secretkey) = (
                        key,
                        zmq.curve_keypair(),
                    )
                sock.connect(address)
                sock.send_multipart([wire.HELLO, hello(server)])
                assert not sock.poll(500)
    server.close()
    assert not server.connection.path.exists()
    for wrong in ({"server_key": ""}, {"address": address.replace("127.0.0.1", "0.0.0.0")}):
        path = files.write(replace(server.connection, **wrong))
        assert files.read(path) is None
        path.unlink()
