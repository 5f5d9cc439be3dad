"""What the chat socket costs: milliseconds a turn beside a chat request, and idle sockets.

The gateway runs in this process in front of an engine without a model, over a real connection; a
turn is measured against the same streamed `/v1/chat/completions`, and against a streamed turn over
HTTP, in alternating rounds on connections that stay open. The difference of the medians is the
cost. Idle sockets are opened from a child: what this process grows by, and the processor time that
it takes in ``--idle-s`` seconds, is theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
from tornado.netutil import bind_sockets

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

CHILD = """
import asyncio, sys
import websockets
async def main(url, count):
    opened = [await websockets.connect(url, subprotocols=["llmkit.chat"]) for _ in range(count)]
    for ws in opened:
        await ws.recv()
    print("open", flush=True)
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


async def post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: object
) -> None:
    """A streamed request on an open connection."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    await reader.readuntil(b"0\r\n\r\n")


async def rounds(
    ways: dict[str, Callable[[], Awaitable[None]]], reps: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(reps + 10):
        for name, way in ways.items():
            begin = time.perf_counter()
            await way()
            if i >= 10:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return times


async def turns(port: int, reps: int, tokens: int) -> None:
    """Print milliseconds of a request and of a turn, medians and differences."""
    import websockets

    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    ws = await websockets.connect(f"ws://127.0.0.1:{port}/v1/chat/ws", compression=None)
    settings = {"max_tokens": tokens, "temperature": 0}

    async def chat() -> None:
        body = {"messages": [{"role": "user", "content": "hello"}], "stream": True, **settings}
        await post(reader, writer, "/v1/chat/completions", body)

    async def rest() -> None:
        body = {"content": "hello", "stream": True, "settings": settings}
        await post(reader, writer, "/v1/sessions/new/messages", body)

    async def plain() -> None:
        body = {"messages": [{"role": "user", "content": "hello"}], **settings}
        await ws.send(json.dumps(body))
        while await ws.recv() != "[DONE]":
            pass

    async def turn() -> None:
        await ws.send(json.dumps({"type": "send", "content": "hello", "settings": settings}))
        while '"type":"end"' not in await ws.recv():
            pass

    ways = {"chat": chat, "turn over HTTP": rest, "body over a socket": plain, "turn": turn}
    times = await rounds(ways, reps)
    base = statistics.median(times["chat"])
    for name, each in times.items():
        middle = statistics.median(each)
        p95 = statistics.quantiles(each, n=20)[-1]
        print(f"{name:20} {middle:7.2f} ms  p95 {p95:7.2f}  {middle - base:+.2f} ms")
    await ws.close()
    writer.close()


async def idle(port: int, count: int, seconds: float) -> None:
    """Print what sockets that say nothing take."""
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    command = [sys.executable, "-c", CHILD, f"ws://127.0.0.1:{port}/v1/chat/ws", str(count)]
    child = await asyncio.create_subprocess_exec(
        *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdin is not None
    await child.stdout.readline()
    used = time.process_time()
    await asyncio.sleep(seconds)
    used = time.process_time() - used
    grown = process.memory_info().rss - before
    print(f"{count} idle sockets: {grown / 1e6:.1f} MB, {used / seconds:.2%} of a processor")
    child.stdin.close()
    await child.wait()


async def main(args: argparse.Namespace) -> None:
    from fake_runner import FakeRunner
    from fakes import FakeClient

    from llmkit.bridge.server import BridgeServer
    from llmkit.gateway.access.keys import Keys
    from llmkit.gateway.app import Gateway, make_app, make_server
    from llmkit.gateway.conversations.shelf import Shelf
    from llmkit.gateway.directory import EngineDirectory
    from llmkit.store.database import open_database

    model = FakeClient(runner=FakeRunner(n_ctx=4096, step_s=args.step_ms / 1e3))
    bridge = BridgeServer(model)
    directory = EngineDirectory()
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(lambda: open_database(f"sqlite:///{folder}/sockets.db"))
        gateway = Gateway(directory, sessions=shelf)
        server = make_server(make_app(gateway, Keys(None, "127.0.0.1")))
        bound = bind_sockets(0, "127.0.0.1")
        server.add_sockets(bound)
        port = bound[0].getsockname()[1]
        await turns(port, args.reps, args.tokens)
        await asyncio.sleep(1)
        used = time.process_time()
        await asyncio.sleep(args.idle_s)
        used = time.process_time() - used
        print(f"no socket: {used / args.idle_s:.2%} of a processor, engine and bridge included")
        await idle(port, args.sockets, args.idle_s)
        server.stop()
        await gateway.turns.close()
        await gateway.sockets.close()
        await server.close_all_connections()
    directory.close()
    bridge.close()
    model.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=2.0, help="what a token takes")
    parser.add_argument("--sockets", type=int, default=200)
    parser.add_argument("--idle-s", type=float, default=35.0)
    with tempfile.TemporaryDirectory() as runtime:
        os.environ["JUPYTER_RUNTIME_DIR"] = runtime
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard > 0 else soft, hard))
        asyncio.run(main(parser.parse_args()))
