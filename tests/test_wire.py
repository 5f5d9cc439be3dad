"""Neighbouring versions of the bridge: what a newer one adds is ignored, what an older one lacks
has its default, and one that is too old is named on both sides."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, replace
from typing import Any

import msgspec
import pytest
import zmq
from fakes import FakeClient, ask, wait_for

from llmkit.bridge import wire
from llmkit.bridge.client import BridgeClient
from llmkit.bridge.connection import Connection, find_connections
from llmkit.bridge.inquiries import decode_answer, decode_inquiry, encode_answer, encode_inquiry
from llmkit.bridge.server import BridgeServer
from llmkit.errors import EngineError, EngineGoneError, InvalidRequestError
from llmkit.protocol import (
    DescribeVocabulary,
    Detokenize,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Inquiry,
    ListRequests,
    ListSlots,
    ListSteps,
    Media,
    Message,
    Question,
    RenderChat,
    RunningRequest,
    SlotContent,
    Step,
    StepChunk,
    Tokenize,
    TokenizeChat,
    Tokens,
    Tool,
    ToolCall,
    Unload,
    Vocabulary,
)
from llmkit.protocol.images import Drawing
from llmkit.protocol.speech import Hearing

# What llmkit said and wrote before the wire had a version, as recorded.
OLD_DESCRIPTION = {
    "name": "smollm2", "path": "/m/smollm2.gguf", "architecture": "llama", "quantization": "Q4_1",
    "n_params": 134515008, "n_ctx": 1024, "n_ctx_train": 8192, "n_slots": 4, "n_vocab": 49152,
    "weights_bytes": 98862336, "kv_bytes": 94371840, "compute_bytes": 134217728,
    "device_bytes": {}, "embedding_size": 0, "ranks": False, "tool_form": "general",
    "reasoning": "", "device": "cpu", "created": 1790000000,
}  # fmt: skip


@pytest.fixture
def server(fake: FakeClient) -> Iterator[BridgeServer]:
    bridge = BridgeServer(fake)
    yield bridge
    bridge.close()


@pytest.fixture
def sock(server: BridgeServer) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(server.connection.address)
        yield dealer


def heard(sock: zmq.Socket[bytes], kind: bytes) -> bytes:
    """The next message of a kind."""
    while True:
        assert sock.poll(30_000), "nothing came"
        frames = sock.recv_multipart()
        if frames[0] == kind:
            return frames[1]


def test_a_newer_client(server: BridgeServer, sock: zmq.Socket[bytes]) -> None:
    greeting = {"key": server.connection.key, "version": 99, "llmkit": "9.9", "mood": "good"}
    sock.send_multipart([wire.HELLO, json.dumps(greeting).encode(), b"a frame more"])
    sock.send_multipart([b"TELEPATHY", b"{}"])
    assert json.loads(heard(sock, wire.WELCOME))["version"] == wire.VERSION
    request = ask("hello", max_tokens=3)
    body = {**json.loads(wire.encode_request(request)), "mood": "good"}
    about = json.dumps({"id": request.request_id, "colour": "blue"}).encode()
    sock.send_multipart([wire.SUBMIT, json.dumps(body).encode(), about, b"a frame more"])
    while True:
        events = wire.unpack(heard(sock, wire.EVENTS), wire.EVENTS)
        if events.ends:
            break
    assert events.ends[0].finish_reason is FinishReason.LENGTH


def test_a_parameter_that_this_version_cannot_honour_is_no_silence() -> None:
    body = json.loads(wire.encode_request(ask("hello")))
    body["sampling"]["telepathy"] = 1
    with pytest.raises(InvalidRequestError, match=r"telepathy.*another version"):
        wire.decode_request(json.dumps(body).encode())


class Peer:
    """An engine of another version: a socket and a connection file."""

    def __init__(self, like: Connection) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.linger = 0
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.connection = replace(like, address=f"tcp://127.0.0.1:{port}", pid=os.getpid())

    def greeted(self) -> bytes:
        """Wait for a client's greeting; its identity."""
        while True:
            assert self.socket.poll(30_000)
            identity, kind, *_ = self.socket.recv_multipart()
            if kind == wire.HELLO:
                return identity

    def next(self, kind: bytes) -> list[bytes]:
        while True:
            assert self.socket.poll(30_000)
            _, said, *frames = self.socket.recv_multipart()
            if said == kind:
                return frames

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@pytest.fixture
def peer(server: BridgeServer) -> Iterator[Peer]:
    other = Peer(server.connection)
    yield other
    other.close()


def test_a_newer_engine(peer: Peer) -> None:
    remote = BridgeClient(peer.connection)
    identity = peer.greeted()
    description: dict[str, Any] = {**asdict(peer.connection.model), "name": "new", "colour": "blue"}
    welcome = {"description": description, "version": 99, "llmkit": "9.9", "mood": "good"}
    peer.socket.send_multipart([identity, wire.WELCOME, json.dumps(welcome).encode(), b"more"])
    peer.socket.send_multipart([identity, b"TELEPATHY", b"\xff"])
    stats = {**asdict(EngineStats(requests_total=7)), "quantum_flux": 1}
    peer.socket.send_multipart([identity, wire.PONG, msgspec.msgpack.encode(stats)])
    wait_for(lambda: remote.stats().requests_total == 7)
    assert remote.description.name == "new"
    stream = remote.submit(ask("hello"))
    body, about = peer.next(wire.SUBMIT)
    request_id = json.loads(about)["id"]
    assert wire.decode_request(body).request_id == request_id
    news = [[request_id, "text", 1, [], [5], "a field more"]]
    end = [
        request_id,
        "stop",
        {"prompt_tokens": 3, "dreams": 1},
        {"queue_s": 0.5, "x": 1},
        [5],
        None,
        None,
        [],
        None,
        1,
    ]
    peer.socket.send_multipart(
        [identity, wire.EVENTS, msgspec.msgpack.encode([news, [end], "more"])]
    )
    done = stream.result(30)
    assert (done.text, done.tokens, done.usage.prompt_tokens) == ("text", (5,), 3)
    remote.close()


def test_an_engine_from_before_versions(peer: Peer) -> None:
    remote = BridgeClient(peer.connection)
    welcome = json.dumps({"description": OLD_DESCRIPTION}, separators=(",", ":")).encode()
    peer.socket.send_multipart([peer.greeted(), wire.WELCOME, welcome])
    wait_for(lambda: remote.state.is_gone)
    assert "older llmkit" in str(remote.state.reason) and "restart" in str(remote.state.reason)
    with pytest.raises(EngineGoneError, match="older llmkit"):
        remote.submit(ask("hello"))
    remote.close()


def test_an_engine_that_knows_no_pictures_to_start_from(peer: Peer) -> None:
    """It would ignore the field, and draw the prompt alone."""
    remote = BridgeClient(peer.connection)
    identity = peer.greeted()
    older = {**OLD_DESCRIPTION, "image_size": "64x64"}
    answers = ((older, "older llmkit"), ({**older, "inputs": ["image"]}, ""))
    for description, refusal in answers:
        welcome = {"description": description, "version": wire.VERSION, "llmkit": "0.0"}
        peer.socket.send_multipart([identity, wire.WELCOME, json.dumps(welcome).encode()])
        wait_for(lambda d=description: remote.description.inputs == tuple(d.get("inputs", ())))  # type: ignore[misc]
        wait_for(lambda: remote.description.image_size == "64x64")
        for drawing in (Drawing(), Drawing(image="5d41", strength=0.5)):
            asked = GenerationRequest(f"r{refusal}{drawing.image}", prompt="x", drawing=drawing)
            if drawing.image and refusal:
                with pytest.raises(InvalidRequestError, match=refusal):
                    remote.submit(asked)
            else:
                remote.submit(asked)
                body, _ = peer.next(wire.SUBMIT)
                assert wire.decode_request(body).drawing == drawing
    remote.close()


def test_a_client_from_before_versions(server: BridgeServer, sock: zmq.Socket[bytes]) -> None:
    greeting = {"key": server.connection.key, "owner": [1, 2.0]}
    sock.send_multipart([wire.HELLO, json.dumps(greeting, separators=(",", ":")).encode()])
    reason = json.loads(heard(sock, wire.GOODBYE))["reason"]
    assert "older llmkit" in reason and "restart" in reason


def test_a_connection_file_with_more_in_it(server: BridgeServer) -> None:
    path = server.connection.path
    data = json.loads(path.read_text())
    model = {**data["model"], "colour": "blue"}
    path.write_text(json.dumps({**data, "mood": "good", "model": model}))
    (found,) = find_connections()
    assert found.model == server.connection.model


def test_sound_travels_as_it_is() -> None:
    """Megabytes in a frame of their own: as text they would hold up whoever writes and reads."""
    request = GenerationRequest("x", prompt="", hearing=Hearing(b"\x00\xff" * 999, "en"))
    rest, sound = wire.apart(request)
    assert sound == b"\x00\xff" * 999 and len(wire.encode_request(rest)) < 1000
    assert wire.together(wire.decode_request(wire.encode_request(rest)), sound) == request
    text = ask("x")
    assert wire.apart(text) == (text, b"") and wire.together(text, b"y") == text


def test_a_picture_travels_and_is_refused_in_words(engine: Any) -> None:
    """Every layer carries it; this model takes none."""
    picture = replace(
        ask("x"), prompt=None, messages=(Message("user", ("What is ", Media("5d41", "image"))),)
    )
    assert wire.decode_request(wire.encode_request(picture)) == picture
    bridge = BridgeServer(engine)
    remote = BridgeClient(bridge.connection)
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]: this model takes no images"):
        remote.submit(picture).result(30)
    remote.close()
    bridge.close()


def test_what_a_request_took_leaves_the_engine_as_data(
    fake: FakeClient, server: BridgeServer
) -> None:
    remote = BridgeClient(server.connection)
    metrics = remote.submit(ask("abab" * 5, max_tokens=9)).result(30).metrics
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.completion_tokens) == (20, 0, 9)
    assert metrics.draft_tokens >= metrics.accepted_tokens >= 0
    assert metrics.queue_s <= metrics.ttft_s and metrics.tpot_s == metrics.decode_s / 8
    remote.close()


QUESTIONS = (
    Tokenize("a", add_special=False, with_pieces=True),
    Detokenize((1, 2)),
    RenderChat((Message("user", "hi"),), (Tool("f", "does", {"type": "object"}),), {"x": [1]}),
    TokenizeChat((Message("assistant", "", tool_calls=(ToolCall("1", "f", '{"a": '),)),)),
    DescribeVocabulary(),
    ListSteps(),
    ListSlots(),
    ListRequests(),
    Unload(),
)
ANSWERS = (
    Tokens((1, 2), (b"\xff", b"a")),
    "text",
    "text",
    Tokens(()),
    Vocabulary("<s>", "</s>", True, None),
    (Step(-1.0, 0.5, (StepChunk(0, "r", 4, 1, False),)),),
    (SlotContent(0, 5, 2), SlotContent(1, 5, 2, "r")),
    (RunningRequest("r", "ann", None, 3, 2, 1, 0.5),),
    True,
)


@pytest.mark.parametrize(("question", "answer"), [*zip(QUESTIONS, ANSWERS, strict=True)])
def test_a_question_and_its_answer_travel(question: Question[Any], answer: Any) -> None:
    inquiry = Inquiry("1", question, "ann")
    assert decode_inquiry(encode_inquiry(inquiry)) == inquiry
    said = wire.decode(wire.encode(encode_answer("1", answer)), wire.Answer)
    assert decode_answer(bytes(said.found), question) == answer


def test_all_questions_are_tried() -> None:
    tried = {type(question).__name__ for question in QUESTIONS}
    assert tried == {kind.__name__ for kind in Question.__subclasses__()}


def test_a_question_of_a_newer_version_is_refused_by_name() -> None:
    body = json.dumps({"request_id": "1", "kind": "weigh", "question": {}}).encode()
    with pytest.raises(InvalidRequestError, match="another version, cannot answer 'weigh'"):
        decode_inquiry(body)


def test_an_answer_that_cannot_be_read_fails_its_question_alone(
    fake: FakeClient, server: BridgeServer
) -> None:
    remote = BridgeClient(server.connection)
    done: Future[Any] = Future()
    done.set_result({"tokens": "of a form to come"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake, "inquire", lambda _: done)
        with pytest.raises(EngineError, match="could not be read"):
            remote.inquire(Inquiry("1", Tokenize("a"))).result(30)
    assert remote.inquire(Inquiry("2", Tokenize("ab"))).result(30) == Tokens((97, 98))
    remote.close()


def test_numbers_and_texts_of_numpy_travel() -> None:
    """What a notebook computes with, in a request to a model of another process."""
    import numpy as np

    request = ask(str(np.str_("hello")), temperature=np.linspace(0, 1, 5)[1])
    assert wire.decode_request(wire.encode_request(request)).sampling.temperature == 0.25
    texts = tuple(np.array(["a", "b"]))
    assert json.loads(wire.encode({"inputs": texts})) == {"inputs": ["a", "b"]}


def test_a_header_that_lies_leaves_nothing_behind(
    server: BridgeServer, sock: zmq.Socket[bytes]
) -> None:
    hello = wire.Hello(server.connection.key, version=wire.VERSION)
    sock.send_multipart([wire.HELLO, wire.encode(hello)])
    body = wire.encode_request(ask("hello"))
    for about in ({"id": "a", "n": 10**12}, {"id": "a", "n": 0}, {"id": "x" * 10_000}):
        sock.send_multipart([wire.SUBMIT, body, json.dumps(about).encode()])
    sock.send_multipart([wire.SUBMIT, body, wire.encode(wire.About("another", n=3))])
    ends: list[Any] = []
    while len(ends) < 3:
        ends += wire.unpack(heard(sock, wire.EVENTS), wire.EVENTS).ends
    assert [end.id for end in ends] == ["another-0", "another-1", "another-2"]
    assert all(end.failure and "differ" in end.failure.message for end in ends)
    (peer,) = server._peers.values()
    wait_for(lambda: not peer.preparing and not peer.streams)


def test_a_text_without_utf8_ends_its_request_alone(fake: FakeClient, server: BridgeServer) -> None:
    def broken(_: Any) -> Any:
        raise InvalidRequestError("half of a pair: \ud800", "\ud800")

    remote = BridgeClient(server.connection)
    fake.submit = broken  # type: ignore[method-assign]
    with pytest.raises(InvalidRequestError, match="half of a pair"):
        remote.submit(ask("hello")).result(30)
    assert not remote.state.is_gone and server.alive
    remote.close()
