"""What a session costs: milliseconds that its turn takes longer than the same chat request.

One gateway as `llmkit serve` puts it together, before an engine whose steps only take time, in a
process of its own as a served model is, with its sessions in SQLite (or in ``--db-url``). A client
process sends, in turns: a chat with the whole history in its body, a turn of a session with that
history, and a chat that names such a session by ``session_id``. Each session gets one turn, so all
have the same length. Medians in pairs: to the first text of a stream, to its end, and CPU time of
the gateway, which depends less on what else the machine does (Linux).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from tornado.netutil import bind_sockets  # noqa: E402

from llmkit.gateway.app import make_server  # noqa: E402
from llmkit.gateway.composition import Composition  # noqa: E402
from llmkit.gateway.directory import EngineDirectory  # noqa: E402
from llmkit.gateway.ops.logs import log_to  # noqa: E402
from llmkit.gateway.sources import ConnectionFiles  # noqa: E402
from llmkit.settings.serving import read_settings  # noqa: E402

CLIENT = """
import http.client, json, os, pathlib, statistics, sys, time
port, turns, tokens, reps, gateway = map(int, sys.argv[1:6])
connection = http.client.HTTPConnection("127.0.0.1", port)
connection.connect()
import socket
connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

def call(method, path, body):
    connection.request(method, path, json.dumps(body))
    reply = connection.getresponse()
    data = reply.read()
    assert reply.status == 200, data
    return json.loads(data)

def cpu_ms():
    tasks = pathlib.Path(f"/proc/{gateway}/task")
    return sum(int((t / "schedstat").read_text().split()[0]) for t in tasks.iterdir()) / 1e6

def timed(path, body, mark):
    text = json.dumps(body)
    time.sleep(0.005)  # what the request before left to be done
    used, begin = cpu_ms(), time.perf_counter()
    connection.request("POST", path, text)
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    data, first = b"", 0.0
    while True:
        part = reply.read1(65536)
        if not part:
            break
        data += part
        if not first and mark in data:
            first = time.perf_counter() - begin
    end = time.perf_counter() - begin
    time.sleep(0.005)
    return 1e3 * first, 1e3 * end, cpu_ms() - used

history = []
for i in range(turns):
    history += [{"role": "user", "content": f"question {i} " + "x" * 20},
                {"role": "assistant", "content": f"answer {i} " + "y" * 80}]
question = {"role": "user", "content": "And now?"}
sampling = {"max_tokens": tokens, "temperature": 0.5, "ignore_eos": True}
text = b'"delta": {"content": "'
rows = {"chat": [], "turn": [], "chat in a session": []}
for rep in range(reps + 20):
    first, second = (call("POST", "/v1/sessions", {"messages": history})["id"] for _ in "ab")
    if rep % 2:  # as a conversation goes on: what was read before is known
        call("GET", f"/v1/sessions/{first}/messages", None)
        call("GET", f"/v1/sessions/{second}/messages", None)
    asks = {
        "chat": ("/v1/chat/completions",
                 {**sampling, "stream": True, "messages": [*history, question]}, text),
        "turn": (f"/v1/sessions/{first}/messages",
                 {"content": question["content"], "stream": True, "settings": sampling},
                 b"event: delta"),
        "chat in a session": ("/v1/chat/completions",
                 {**sampling, "stream": True, "messages": [question], "session_id": second},
                 text),
    }
    for name, ask in asks.items():
        figures = timed(*ask)
        if rep >= 20:
            rows[name].append(figures)
    call("DELETE", f"/v1/sessions/{first}", None)
    call("DELETE", f"/v1/sessions/{second}", None)
print(json.dumps(rows))
"""

ENGINE = """
import sys
sys.path.insert(0, sys.argv[2])
from fake_runner import FakeRunner
from fakes import FakeClient
from llmkit.bridge.server import BridgeServer
bridge = BridgeServer(FakeClient(runner=FakeRunner(n_ctx=200_000, step_s=float(sys.argv[1]))))
print("ready", flush=True)
sys.stdin.read()
bridge.close()
"""


async def run(args: argparse.Namespace, folder: str) -> None:
    model = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ENGINE, str(args.step_ms / 1000), str(ROOT / "tests"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert model.stdin is not None and model.stdout is not None
    await model.stdout.readline()
    url = args.db_url or f"sqlite:///{folder}/llmkit.db"
    settings = read_settings({"port": 0, "db_url": url}, environment={})
    parts = Composition(
        settings, EngineDirectory([ConnectionFiles(lambda origin: origin.pid == model.pid)])
    )
    server = make_server(parts.app())
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    port = sockets[0].getsockname()[1]
    for turns in args.turns:
        given = [str(x) for x in (port, turns, args.tokens, args.reps, os.getpid())]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, *given, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        show(turns, json.loads(out))
    server.stop()
    await parts.close()
    await server.close_all_connections()
    model.stdin.close()
    await model.wait()


def show(turns: int, rows: dict[str, list[Any]]) -> None:
    from statistics import median

    for name, figures in rows.items():
        firsts, ends, cpu = ([f[i] for f in figures] for i in range(3))
        more = [
            median(f[i] - base[i] for f, base in zip(figures, rows["chat"], strict=True))
            for i in range(3)
        ]
        print(
            f"{2 * turns} messages, {name}: {median(firsts):.2f} ms to the first text "
            f"({more[0]:+.2f}), {median(ends):.2f} ms to the end ({more[1]:+.2f}), "
            f"{median(cpu):.2f} ms of the gateway's CPU ({more[2]:+.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--turns", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--step-ms", type=float, default=2.0, help="of the engine")
    parser.add_argument("--reps", type=int, default=100)
    parser.add_argument("--db-url")
    args = parser.parse_args()
    log_to("pretty", "warning")
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(args, folder))


if __name__ == "__main__":
    main()
