"""The log of a gateway: one line a record, whatever is in it, and never in a request's way."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fakes import FakeClient, wait_for
from gateway_client import CHAT, Api, serve
from governed import until

from llmkit.gateway.exchange import Exchange
from llmkit.gateway.failures import ApiError
from llmkit.gateway.ops import logs
from llmkit.gateway.ops.logs import JsonFormatter, LogHandler, access_log, log_to, set_level

KEY = "sk-very-secret"


class Sink:
    """Where lines go; ``fault`` is raised in place of a write, ``gate`` holds it up."""

    def __init__(self) -> None:
        self.data = b""
        self.fault: OSError | None = None
        self.gate = threading.Event()
        self.gate.set()

    def write(self, data: bytes) -> None:
        self.gate.wait(30)
        if self.fault is not None:
            raise self.fault
        self.data += data

    @property
    def lines(self) -> list[str]:
        return self.data.decode().splitlines()


@pytest.fixture
def sink() -> Sink:
    return Sink()


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging as it was."""
    root = logging.getLogger()
    before = root.handlers[:], root.level, sys.excepthook, threading.excepthook
    stderr = sys.stderr
    yield
    sys.stderr = stderr
    for handler in root.handlers[:]:
        if isinstance(handler, LogHandler):
            root.removeHandler(handler)
            handler.close()
    root.handlers[:], sys.excepthook, threading.excepthook = before[0], before[2], before[3]
    root.setLevel(before[1])
    logging.captureWarnings(False)


@pytest.fixture
async def api(model: FakeClient, sink: Sink) -> AsyncIterator[Api]:
    log_to("json", "info", write=sink.write)
    async for api in serve(KEY, observers=[access_log()]):
        yield api


async def entries(sink: Sink, number: int, logger: str = "llmkit.access") -> list[dict[str, Any]]:
    """The records of a logger, once there are as many as expected."""
    found: list[dict[str, Any]] = []
    for _ in range(1500):
        found = [e for line in sink.lines if (e := json.loads(line))["logger"] == logger]
        if len(found) >= number:
            break
        await asyncio.sleep(0.02)
    assert len(found) == number, found
    return found


async def test_each_request_is_one_line(api: Api, sink: Sink) -> None:
    await api.fetch("POST", "/v1/chat/completions", CHAT, {"x-request-id": "mine-1"})
    await api.events("/v1/chat/completions", CHAT)
    await api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": "ab"})
    await api.fetch("POST", "/v1/chat/completions", {**CHAT, "temperature": -1})
    await api.fetch("GET", "/v1/nowhere")
    await Api(api.url, "wrong").fetch("GET", "/v1/models")
    whole, stream, vectors, refused, nowhere, stranger = await entries(sink, 6)
    assert whole["message"] == "POST /v1/chat/completions 200" and whole["level"] == "info"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", whole["time"])
    assert whole["request_id"] == "mine-1" and whole["identity"] == "owner"
    assert whole["address"] == "127.0.0.1" and whole["method"] == "POST"
    assert (whole["model"], whole["operation"], whole["status"]) == ("fake", "chat", 200)
    assert (whole["prompt_tokens"], whole["completion_tokens"]) == (8, 6)
    assert 0 <= whole["queue_ms"] <= whole["ttft_ms"] <= whole["total_ms"] < 60_000
    assert not whole["stream"] and stream["stream"] and stream["cached_tokens"] > 0
    assert (vectors["operation"], vectors["prompt_tokens"]) == ("embeddings", 2)
    assert refused["status"] == 400 and refused["error"] and "model" not in refused
    assert nowhere["route"] == "/v1/nowhere" and nowhere["error"] == "not_found"
    assert stranger["status"] == 401 and stranger["error"] == "invalid_api_key"
    assert "identity" not in stranger, "whoever it says it is"


async def test_no_prompt_answer_or_key_is_logged(api: Api, sink: Sink) -> None:
    logging.getLogger().setLevel("DEBUG")
    secret = "the patient is called Ann Example"
    chat = {**CHAT, "messages": [{"role": "user", "content": secret}], "max_tokens": 3}
    status, answer = await api.post("/v1/chat/completions", chat)
    assert status == 200
    await api.fetch("POST", "/v1/chat/completions", {**chat, "temperature": "hot"})
    await api.fetch("POST", "/v1/embeddings", {"model": "fake", "input": secret})
    await api.fetch("GET", f"/v1/models?token={KEY}&q=Ann+Example")
    await entries(sink, 4)
    text = "\n".join(sink.lines)
    assert "Ann" not in text and KEY not in text
    assert answer["choices"][0]["message"]["content"] not in ("", text)


async def test_health_and_metrics_are_for_debugging(api: Api, sink: Sink) -> None:
    for path in ("/health", "/health/live", "/health/ready", "/readiness"):
        await api.fetch("GET", path)
    set_level("debug")
    await api.fetch("GET", "/health/live")
    (line,) = await entries(sink, 1)
    assert line["level"] == "debug" and line["route"] == "/health/live"


async def test_the_lines_of_a_request_have_its_id(model: FakeClient, sink: Sink) -> None:
    """Also those of a stage and of an error that nobody expected, which is one record."""
    log_to("json", "info", write=sink.write)

    class Trouble(Exception):
        pass

    def refuse(_: Exchange) -> Any:
        logging.getLogger("llmkit.gateway").warning("in a stage")
        raise Trouble("unforeseen\nINFO forged: line")

    async for api in serve(None, stages=[refuse], observers=[access_log()]):
        reply = await api.fetch("POST", "/v1/chat/completions", CHAT)
        assert reply.code == 500
        own = reply.headers["x-request-id"]
        first, error = await entries(sink, 2, "llmkit.gateway")
        (access,) = await entries(sink, 1)
        assert own == first["request_id"] == error["request_id"] == access["request_id"]
        assert "Trouble: unforeseen\nINFO forged" in error["exception"]
        assert "in refuse" in error["exception"] and error["level"] == "error"
        assert access["level"] == "warning" and access["error"] == "internal_error"


async def test_concurrent_requests_keep_their_ids(api: Api, sink: Sink) -> None:
    names = [f"request-{i}" for i in range(20)]
    await asyncio.gather(
        *(api.fetch("POST", "/v1/chat/completions", CHAT, {"x-request-id": name}) for name in names)
    )
    assert sorted(e["request_id"] for e in await entries(sink, 20)) == sorted(names)


HOSTILE = [
    "a\nb", "a\r\nb", "\x1b[31mred\x1b[0m", "nul\0", "\x85next", "line\u2028sep", "\u202eflip",
    "half \ud800", '"quote" \\ back', "tab\t", "ünï ✓", "%s %d %(x)s", "x" * 50_000,
]  # fmt: skip


@pytest.mark.parametrize("form", ["pretty", "json"])
@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_in_a_record_makes_another_line(form: Any, text: str, sink: Sink) -> None:
    handler = log_to(form, "info", write=sink.write)
    logger = logging.getLogger("llmkit.test")
    logger.info("said: %s", text, extra={"fields": {"identity": text}})
    logger.info(text)
    handler.close()
    assert len(sink.lines) == 2 and len(sink.data) < 150_000
    for line in sink.data.decode().split("\n"):
        assert all(c.isprintable() for c in line)
    if form == "json":
        value = json.loads(sink.lines[0])
        assert value["message"].startswith(f"said: {text}"[:8000])
        assert value["identity"] == text


def test_a_traceback_cannot_pass_for_other_records(sink: Sink) -> None:
    handler = log_to("pretty", "info", write=sink.write)
    try:
        raise ValueError("one\n2026-01-01 00:00:00.000 INFO    llmkit: forged\x1b[2J")
    except ValueError:
        logging.getLogger("llmkit").exception("failed")
    handler.close()
    first, *rest = sink.lines
    assert "ERROR" in first and "failed" in first
    assert rest and all(line.startswith("  | ") and line.isprintable() for line in rest)
    assert any("forged" in line for line in rest)


def test_a_text_line_reads_well(sink: Sink) -> None:
    handler = log_to("pretty", "info", write=sink.write)
    logging.getLogger("llmkit").info("ready", extra={"fields": {"a": 1, "b": "x y", "c": 'q"'}})
    handler.close()
    pattern = r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} INFO    llmkit: ready a=1 b="x y" c="q\\""'
    assert re.fullmatch(pattern, sink.lines[0]), sink.lines


def test_bad_records_are_written_all_the_same(sink: Sink) -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("no text")

        __repr__ = __str__

    handler = log_to("json", "info", write=sink.write)
    logger = logging.getLogger("llmkit")
    logger.info("%d files", "many")
    logger.info("%s", Odd())
    logger.info("fine", extra={"fields": {"odd": Odd()}})
    logger.info(Odd())
    logger.info("last")
    handler.close()
    assert len(sink.lines) == 5
    assert "%d files" in sink.lines[0] and "last" in sink.lines[-1]


@pytest.mark.parametrize("fault", [BrokenPipeError(errno.EPIPE, "no reader"),
                                   OSError(errno.ENOSPC, "no space"),
                                   OSError(errno.EBADF, "closed")])  # fmt: skip
async def test_a_log_that_cannot_be_written_stops_nothing(
    api: Api, sink: Sink, fault: OSError
) -> None:
    sink.fault = fault
    for _ in range(5):
        assert (await api.post("/v1/chat/completions", CHAT))[0] == 200
    (handler,) = (h for h in logging.getLogger().handlers if isinstance(h, LogHandler))
    await until(lambda: handler.num_lost == 5)
    sink.fault = None
    assert (await api.post("/v1/chat/completions", CHAT))[0] == 200
    (line,) = await entries(sink, 1)
    (said,) = await entries(sink, 1, "llmkit.log")
    assert line["status"] == 200 and "5 lines of the log were lost" in said["message"]


def test_a_reader_that_sleeps_holds_up_nobody(sink: Sink) -> None:
    """Standard error is a pipe whose reader has stopped: memory is bounded, time is not lost."""
    handler = LogHandler(sink.write, JsonFormatter(), most=20_000)
    logger = logging.Logger("llmkit.test")
    logger.addHandler(handler)
    sink.gate.clear()
    start = time.perf_counter()
    for i in range(2000):
        logger.info("line %d", i)
    assert time.perf_counter() - start < 20
    assert handler.num_lost > 1000
    sink.gate.set()
    wait_for(lambda: any("lines of the log were lost" in line for line in sink.lines) or (
        logger.info("more") or False))  # fmt: skip
    handler.close()
    said = sum(
        int(m[1]) for line in sink.lines if (m := re.search(r"(\d+) lines of the log", line))
    )
    assert said == handler.num_lost


def test_the_level_changes_while_it_runs(sink: Sink) -> None:
    handler = log_to("pretty", "warning", write=sink.write)
    logger = logging.getLogger("llmkit.gateway")
    logger.info("no")
    set_level("info")
    logger.info("yes")
    set_level("error")
    logger.warning("no")
    handler.close()
    assert len(sink.lines) == 1 and "yes" in sink.lines[0]


def test_uncaught_errors_and_warnings_are_records(sink: Sink) -> None:
    handler = log_to("json", "info", write=sink.write)

    def fail() -> None:
        raise LookupError("in a thread")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    sys.excepthook(KeyError, KeyError("in main"), None)
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(True)
        warnings.warn("soon gone", stacklevel=1)
        logging.captureWarnings(False)
    handler.close()
    one, two, three = map(json.loads, sink.lines)
    assert one["level"] == "critical" and "LookupError: in a thread" in one["exception"]
    assert "KeyError" in two["exception"] and "soon gone" in three["message"]


def test_what_is_printed_is_json_too(sink: Sink) -> None:
    handler = log_to("json", "error", write=sink.write)
    print("llmkit: the model is", end=" ", file=sys.stderr)
    print("ready\nand more\x1b[1m\r\n\n", file=sys.stderr, flush=True)
    sys.stderr.write("x" * 20_000)
    handler.close()
    found = [json.loads(line) for line in sink.lines]
    assert [e["message"][:30] for e in found] == [
        "llmkit: the model is ready", "and more\x1b[1m", "x" * 30,
    ]  # fmt: skip
    assert {e["logger"] for e in found} == {"stderr"} and sys.stderr.fileno() == 2


def test_it_ends_whole_and_without_standard_error() -> None:
    """What was logged last is written; a process without standard error writes nowhere."""
    code = (
        "import logging; from llmkit.gateway.ops.logs import log_to; log_to('json', 'info')\n"
        "for i in range(500): logging.getLogger('x').info('line %d', i)\n"
        "raise RuntimeError('the end')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and len(lines) == 501
    assert (
        lines[499]["message"] == "line 499" and "RuntimeError: the end" in lines[500]["exception"]
    )
    shell = f'exec "{sys.executable}" -c "$CODE" 2>&-'
    code = (
        "import os, logging; from llmkit.gateway.ops.logs import log_to\n"
        "r, w = map(os.dup, os.pipe()); os.dup2(w, 2)\n"  # its number is somebody else's now
        "h = log_to('json', 'info'); logging.getLogger('x').info('line'); h.close()\n"
        "os.set_blocking(r, False)\n"
        "try: print(os.read(r, 100))\n"
        "except BlockingIOError: print('nothing')"
    )
    done = subprocess.run(
        ["sh", "-c", shell], env={**os.environ, "CODE": code}, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout == "nothing\n"


def test_a_descriptor_that_does_not_block_gets_all() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    data = b"x" * 300_000
    thread = threading.Thread(target=logs._to_descriptor(writer), args=(data,))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += os.read(reader, 65_536)
    thread.join()
    os.close(reader)
    os.close(writer)
    assert got == data


async def test_a_refusal_of_a_stage_is_logged_with_its_code(model: FakeClient, sink: Sink) -> None:
    log_to("json", "info", write=sink.write)

    def refuse(_: Exchange) -> Any:
        raise ApiError(429, "too many", "rate_limit_error", code="rate_limited")

    async for api in serve(None, stages=[refuse], observers=[access_log()]):
        await api.fetch("POST", "/v1/chat/completions", CHAT)
        (line,) = await entries(sink, 1)
        assert (line["status"], line["error"]) == (429, "rate_limited")


def test_addresses_of_downloads_are_not_logged(sink: Sink) -> None:
    handler = log_to("json", "debug", write=sink.write)
    for name in ("httpx", "httpx2", "httpcore2.http11", "huggingface_hub.utils._http"):
        logging.getLogger(name).info("GET https://cdn.example/file?X-Amz-Signature=not-shown")
        logging.getLogger(name).warning("it is slow")
    handler.close()
    assert b"not-shown" not in sink.data and sink.data.count(b"it is slow") == 4
