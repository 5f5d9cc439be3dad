"""What observing costs a gateway: microseconds a request, and milliseconds a scrape of `/metrics`.

In one process, with engines that compute nothing: an answered chat request is noted again and again
by each observer, which is the time that it holds up the event loop. Traces are sampled, and go to a
collector on loopback. A scrape is read on the event loop and written as text on a thread. Each
figure is the median of ``--reps`` rounds.
"""

from __future__ import annotations

import argparse
import http.server
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest

from llmkit.gateway.access.identity import LOCAL
from llmkit.gateway.directory import EngineDirectory
from llmkit.gateway.ops.after import after
from llmkit.gateway.ops.logs import FORMATTERS, LogHandler, access_log
from llmkit.gateway.ops.metrics import Metrics
from llmkit.gateway.ops.tracing import Tracer
from llmkit.gateway.record import Record
from llmkit.protocol import (
    Completion,
    EngineState,
    EngineStats,
    FinishReason,
    GenerationRequest,
    Message,
    ModelDescription,
    Origin,
    RequestMetrics,
    SamplingParams,
    Usage,
)

NUM_TOKENS = 64
TIMES = RequestMetrics(
    queue_s=0.001, ttft_s=0.05, decode_s=0.8, max_itl_s=0.02, prompt_tokens=400, cached_tokens=300,
    completion_tokens=NUM_TOKENS,
)  # fmt: skip


class Engines:
    """A source of engines that compute nothing."""

    def __init__(self, number: int) -> None:
        self.clients: list[Any] = [
            SimpleNamespace(
                description=ModelDescription(f"model{i}", f"model{i}.gguf", n_ctx=4096, n_slots=4),
                state=EngineState("ready"),
                origin=Origin.here(),
                stats=EngineStats,
                close=lambda: None,
            )
            for i in range(number)
        ]

    def find(self) -> Mapping[Hashable, Callable[[], Any]]:
        return {i: (lambda c=client: c) for i, client in enumerate(self.clients)}


def answered(client: Any) -> Any:
    """An exchange whose chat has been answered: what observers read of one."""
    record = Record(status=200, request_id="0af7651916cd43dd8448eb211c80319c")
    params = SamplingParams(max_tokens=NUM_TOKENS)
    request = GenerationRequest("chatcmpl-1", messages=[Message("user", "hello")], sampling=params)
    record.begin(client, [request])
    usage = Usage(TIMES.prompt_tokens, TIMES.completion_tokens, TIMES.cached_tokens)
    record.progress(Completion("hello", FinishReason.STOP, usage, TIMES), 0)
    return SimpleNamespace(
        record=record,
        request_id=record.request_id,
        method="POST",
        path="/v1/chat/completions",
        route="/v1/chat/completions",
        identity=LOCAL,
        address="127.0.0.1",
        streaming=True,
        header=lambda name: None,
    )


def per_request(observer: Callable[[Any], Any], exchange: Any, reps: int) -> float:
    """Microseconds of one request, without what an observer that does nothing takes."""

    def once(look: Callable[[Any], Any], number: int = 1000) -> float:
        began = time.perf_counter()
        for _ in range(number):
            with look(exchange):
                pass
        return 1e6 * (time.perf_counter() - began) / number

    nothing = after(lambda _: None)
    once(observer)
    return statistics.median(once(observer) - once(nothing) for _ in range(reps))


def scrape(number: int, reps: int) -> tuple[float, float]:
    """Milliseconds of a scrape with so many models: on the event loop, and on a thread."""
    engines = Engines(number)
    metrics = Metrics(EngineDirectory([engines]))
    for client in engines.clients:
        with metrics.observer(answered(client)):
            pass
    loop, thread = [], []
    for _ in range(reps):
        began = time.perf_counter()
        families = list(metrics.collect())
        read = time.perf_counter()
        generate_latest(SimpleNamespace(collect=lambda families=families: families))
        loop.append(1000 * (read - began))
        thread.append(1000 * (time.perf_counter() - read))
    return statistics.median(loop), statistics.median(thread)


class Collector(http.server.BaseHTTPRequestHandler):
    """Takes whatever is exported."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=21, help="rounds of each measurement")
    reps = parser.parse_args().reps
    exchange = answered(Engines(1).clients[0])

    handler = LogHandler(lambda _: None, FORMATTERS["pretty"]())
    logger = logging.getLogger("llmkit.access")
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracer = Tracer(f"http://127.0.0.1:{server.server_port}", {})
    try:
        for name, observer in (
            ("metrics", Metrics(EngineDirectory([])).observer),
            ("a line of the log", access_log()),
            ("a trace", tracer.observer),
        ):
            print(f"{name:24} {per_request(observer, exchange, reps):6.0f} µs a request")
    finally:
        handler.close()
        tracer.close()
        server.shutdown()
    for number in (1, 10):
        loop, thread = scrape(number, reps)
        name = f"a scrape of {number} model{'s' * (number > 1)}"
        print(f"{name:24} {loop:6.1f} ms on the event loop, {thread:.1f} ms on a thread")
    return 0


if __name__ == "__main__":
    sys.exit(main())
