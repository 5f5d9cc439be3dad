"""What is broken, too large or never read on a chat socket hurts nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import websockets
from fake_runner import FakeRunner
from governed import until
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from socket_client import PATH, Sockets, settings, sockets, text_of

from llmkit.gateway.access.identity import LOCAL
from llmkit.gateway.failures import ApiError
from llmkit.gateway.sockets import messages, wire

HEAD = (
    f"GET {PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Sec-WebSocket-Protocol: llmkit.chat\r\n\r\n"
).encode()


@pytest.fixture
async def there(tmp_path: Path) -> AsyncIterator[Sockets]:
    async with sockets(tmp_path, max_body_bytes=1 << 20) as found:
        yield found


def frame(data: bytes, opcode: int = 1, fin: bool = True, mask: bytes = b"abcd") -> bytes:
    """A client's frame."""
    size = len(data)
    head = bytes([(0x80 if fin else 0) | opcode])
    if size < 126:
        head += bytes([0x80 | size])
    elif size < 1 << 16:
        head += struct.pack("!BH", 0x80 | 126, size)
    else:
        head += struct.pack("!BQ", 0x80 | 127, size)
    return head + mask + bytes(b ^ mask[i % 4] for i, b in enumerate(data))


async def works(there: Sockets) -> None:
    async with there.chat() as chat:
        await chat.get("hello")
        await chat.ask()
        assert len(text_of(await chat.until("end"))) == 6


async def raw(there: Sockets, data: bytes) -> bytes:
    """Everything the server answers after the handshake, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
    writer.write(HEAD)
    head = await reader.readuntil(b"\r\n\r\n")
    assert b" 101 " in head, head
    writer.write(data)
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize(
    "data",
    [
        frame(b"x", opcode=3),  # no such kind
        frame(b"x", opcode=0),  # continues nothing
        b"\xf1" + frame(b"{}")[1:],  # reserved bits
        frame(b"\xff\xfe"),  # no UTF-8
        frame(b"x", opcode=9, fin=False),  # half a ping
        b"\x89\xfe\x00\x80abcd" + b"x" * 128,  # a long ping
        frame(b"{", fin=False) + frame(b"}"),  # a message within another
        frame(b"", opcode=8),
        frame(b"\x03\xe8", opcode=8),
        frame(b"\x03", opcode=8),
    ],
)
async def test_broken_frames_end_their_socket_and_nothing_else(
    there: Sockets, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    await raw(there, data)
    await until(lambda: not len(there.room))
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
    await works(there)


async def test_random_bytes_end_their_socket_and_nothing_else(
    there: Sockets, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(13)
    for _ in range(30):
        data = rng.randbytes(rng.randint(1, 3000))
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        writer.write(HEAD + data)
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
    await until(lambda: not len(there.room))
    assert not [r for r in caplog.records if r.levelname == "ERROR"], caplog.text
    await works(there)


BAD = [
    "", "null", "[]", "1", '"x"', "{", "{}", "nul", '{"type":1}', '{"type":"x"}', '{"type":"send"}',
    '{"type":"send","content":1}', '{"type":"send","content":"a","x":1}',
    '{"type":"send","content":"a","messages":[]}', '{"type":"send","content":"a","ref":1}',
    '{"type":"send","content":"a","session":"sess_0"}', '{"type":"send","content":"a","ref":"' +
    "r" * 300 + '"}', '{"type":"send","content":"a","settings":{"temperatur":1}}',
    '{"type":"send","content":"a","settings":{"temperature":"hot"}}',
    '{"type":"send","content":"a","model":"none"}', '{"type":"send","content":"a","parent":"m"}',
    '{"type":"edit","session":"s","message":"m"}', '{"type":"edit","session":"s","message":"m",'
    '"content":"x"}', '{"type":"regenerate"}', '{"type":"regenerate","session":"s"}',
    '{"type":"cancel"}', '{"type":"cancel","turn":"t"}', '{"type":"resume","turn":"t"}',
    '{"type":"resume","turn":"t","after":"x"}', '{"type":"ping","data":{}}',
    '{"type":"send","content":"a","settings":' + "[" * 5000 + "]" * 5000 + "}",
    '{"messages":1}', '{"messages":[{"role":"x"}]}', '{"messages":[],"prompt":1}', '{"prompt":7}',
]  # fmt: skip


async def test_wrong_messages_are_answered_one_by_one(there: Sockets) -> None:
    async with there.chat() as chat:
        await chat.get("hello")
        for text in BAD:
            await chat.ws.write_message(text)
            answer = await chat.next()
            assert answer is not None and answer["error"]["message"], text
            assert answer["error"]["code"] != "internal_error", (text, answer)
        await chat.ws.write_message(b'{"type":"ping"}', binary=True)
        assert (await chat.refused())["code"] == "invalid_message"
        await chat.ask()
        await chat.until("end")


async def test_an_error_names_the_field_and_the_message(there: Sockets) -> None:
    async with there.chat() as chat:
        await chat.get("hello")
        await chat.say("resume", ref="mine", turn="t", after="x")
        answer = await chat.get("error")
        assert answer["ref"] == "mine" and answer["error"]["param"] == "after"


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(
        ["type", "ref", "messages", "prompt", "content", "turn", "key"]), inner),
    max_leaves=20,
).map(json.dumps))  # fmt: skip
def test_reading_a_message_raises_nothing_but_errors_for_clients(text: str) -> None:
    data = text.encode("utf-8", "replace")
    try:
        if not messages.head_of(data).is_body:
            messages.read(data)
    except ApiError as error:
        assert error.status in (400, 413) and error.message


async def test_a_message_that_is_too_large_is_refused_in_words(there: Sockets) -> None:
    url = there.url.replace("http", "ws") + PATH
    async with websockets.connect(url, subprotocols=["llmkit.chat"], max_size=None) as ws:
        await ws.recv()
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await ws.send("x" * (8 << 20))
            error = json.loads(await ws.recv())
            assert error["error"]["code"] == "request_too_large"
            assert str(1 << 20) in error["error"]["message"]
            await ws.recv()
        assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
    await until(lambda: not len(there.room))
    await works(there)


async def test_so_is_one_in_pieces(there: Sockets) -> None:
    piece = frame(b"x" * (300 << 10), fin=False)
    rest = frame(b"x" * (300 << 10), opcode=0, fin=False)
    answer = await raw(there, piece + rest * 5)
    assert b"request_too_large" in answer and b"\x03\xf1" in answer


async def test_before_its_key_a_client_sends_little(tmp_path: Path) -> None:
    async with sockets(tmp_path, "secret") as there:
        answer = await raw(there, frame(b"x" * (70 << 10)))
        assert b"request_too_large" in answer and b"Authenticate first" in answer


async def test_large_messages_count_as_held_until_they_are_taken(tmp_path: Path) -> None:
    async with sockets(tmp_path, max_body_bytes=16 << 20) as there:
        writers = []
        for _ in range(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
            writer.write(HEAD)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(struct.pack("!BBQ", 0x81, 0xFF, 15 << 20) + b"abcd")
            writers.append((reader, writer))
        answers = [r for r, _ in writers]
        done, _ = await asyncio.wait(
            [asyncio.ensure_future(_until(r, b"too_much_held")) for r in answers],
            return_when=asyncio.FIRST_COMPLETED,
            timeout=30,
        )
        assert done
        for _, writer in writers:
            writer.close()
        await until(lambda: not len(there.room))
        assert there.gateway.held.of("address local") == 0


async def _until(reader: asyncio.StreamReader, text: bytes) -> None:
    found = b""
    while text not in found:
        more = await reader.read(4096)
        if not more:
            await asyncio.Event().wait()
        found += more


async def test_a_long_message_is_a_turn_like_any(tmp_path: Path) -> None:
    """A paste of 10 MB is refused in words, as is what the model's context has no room for."""
    async with (
        sockets(tmp_path, runner=FakeRunner(n_ctx=200_000, max_batch_tokens=4096)) as there,
        there.chat() as chat,
    ):
        await chat.get("hello")
        await chat.say("send", content="a" * (10 << 20), settings=settings(3))
        error = (await chat.until("error"))[-1]["error"]
        assert "too long for a session" in error["message"]
        await chat.say("send", content="a" * (3 << 20), settings=settings(3))
        error = (await chat.until("error"))[-1]["error"]
        assert error["code"] == "context_length_exceeded", error
        await chat.say("send", content="a" * (150 << 10), settings=settings(3))
        assert len(text_of(await chat.until("end"))) == 3


async def test_a_socket_that_never_reads_is_dropped_and_its_turns_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire.ChatWire.__init__, "__defaults__", (0.5,))
    runner = FakeRunner(n_ctx=20000, n_slots=4, step_s=0.001)
    async with sockets(tmp_path, runner=runner) as there:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", there.port))
        await loop.sock_sendall(client, HEAD)
        for n in range(4):
            text = {"type": "send", "content": f"n{n}", "settings": settings(6000)}
            await loop.sock_sendall(client, frame(json.dumps(text).encode()))
        await until(lambda: len(there.room) == 1)
        [connection] = there.room._who
        protocol: Any = connection._wire._protocol
        most = 0

        def gone() -> bool:
            nonlocal most
            most = max(most, len(protocol.stream._write_buffer or b""))
            return not len(there.room)

        await until(gone)
        assert most < 64 << 10, most
        client.close()
        turns = there.gateway.turns
        assert len(turns.running(LOCAL)) == 4  # they outlive it
        await until(lambda: not turns.running(LOCAL), 60)
        async with there.chat() as chat:
            await chat.get("hello")
            for turn in list(turns._turns.values()):
                await chat.say("resume", turn=turn.id)
                frames = await chat.until("end")
                assert len(text_of(frames)) == 6000
                assert len(frames) < 2000  # what is behind comes in large pieces


async def test_a_flood_of_pings_that_nobody_reads_holds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire.ChatWire.__init__, "__defaults__", (0.5,))
    async with sockets(tmp_path) as there:
        _, writer = await asyncio.open_connection("127.0.0.1", there.port, limit=1024)
        writer.write(HEAD)
        await until(lambda: len(there.room) == 1)
        ping = json.dumps({"type": "ping", "data": "x" * 1000}).encode()
        low = frame(os.urandom(100), opcode=9)
        chunk = (frame(ping) + low) * 100
        ended = asyncio.ensure_future(until(lambda: not len(there.room), 30))
        with pytest.raises(ConnectionError):
            while not ended.done():
                writer.write(chunk)
                await asyncio.wait(
                    [asyncio.ensure_future(writer.drain()), ended],
                    return_when=asyncio.FIRST_COMPLETED,
                )
            raise ConnectionError
        await ended
        writer.close()
        await works(there)
