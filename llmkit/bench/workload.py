"""`llmkit bench`: a load client for any OpenAI-compatible ``/v1/completions`` endpoint.

Plain asyncio streams: lines are only timestamped while a reply runs; JSON is parsed afterwards, so
that the client takes little of a small machine.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmkit.bench.prompts import body, prompt_text
from llmkit.errors import InvalidRequestError
from llmkit.system.text import printable

__all__ = ["LoadResult", "Reply", "main", "run_load"]

LONG_DELAY_S = 2.0


@dataclass(slots=True)
class Reply:
    """One reply; ``times`` of its text events are in seconds since the start of the run."""

    start: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One load run; rates in tokens per second, times in milliseconds.

    ``itl`` is the gap between text events of one stream. For the workload "long": the long prompt's
    time to first token, and until then the streams' largest gap (``stall_ms``) and rate; it counts
    among the requests and errors.
    """

    concurrency: int
    requests: int
    errors: int
    wall_s: float
    tok_s: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    itl_p95_ms: float
    itl_max_ms: float
    completion_tokens: int
    prompt_tokens: int
    cached_tokens: int
    error: str | None = None
    long_ttft_ms: float | None = None
    stall_ms: float | None = None
    tok_s_during: float | None = None

    def line(self) -> str:
        return (
            f"{self.concurrency:3d} clients  {self.tok_s:7.1f} tok/s  "
            f"TTFT p50 {self.ttft_p50_ms:7.0f} p95 {self.ttft_p95_ms:7.0f} ms  "
            f"ITL p50 {self.itl_p50_ms:6.1f} p95 {self.itl_p95_ms:6.1f} "
            f"max {self.itl_max_ms:7.1f} ms  errors {self.errors}"
        ) + (
            f"  long TTFT {self.long_ttft_ms:.0f} ms, stall {self.stall_ms:.0f} ms"
            if self.long_ttft_ms is not None
            else ""
        )


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the nearest ranks; nan for an empty list."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    at = (len(ordered) - 1) * share
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


async def run_load(
    base_url: str,
    *,
    model: str = "default",
    api_key: str = "",
    concurrency: int = 8,
    requests: int = 16,
    prompt_words: int = 256,
    max_tokens: int = 128,
    seed: int = 0,
    timeout_s: float = 600,
    workload: str = "unique",
    prefix_words: int = 1500,
    long_words: int = 3000,
) -> LoadResult:
    """Send a workload's prompts, ``concurrency`` at a time, and time their streams.

    Greedy; of equal length (``ignore_eos``) but for the workload "json".
    """
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InvalidRequestError(
            f"--base-url must look like http://127.0.0.1:3000/v1, not {base_url!r}.", "base_url"
        )
    replies: list[Reply] = []
    todo = iter(range(requests))
    begin = time.perf_counter()

    async def ask(what: dict[str, Any], max_tokens: int = max_tokens) -> Reply:
        reply = Reply(time.perf_counter() - begin)
        usual = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with asyncio.timeout(timeout_s):
                await _one(url, api_key, {**usual, **what}, reply, begin)
        except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError) as error:
            reply.error = repr(error)
        reply.end = time.perf_counter() - begin
        return reply

    async def worker() -> None:
        for index in todo:
            what = body(workload, seed, index, prompt_words=prompt_words, prefix_words=prefix_words)
            replies.append(await ask({**what, "seed": index}))

    async def late() -> Reply:
        await asyncio.sleep(LONG_DELAY_S)
        return await ask({"prompt": prompt_text(seed, "long", long_words), "ignore_eos": True}, 8)

    arriving = asyncio.create_task(late()) if workload == "long" else None
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    wall_s = time.perf_counter() - begin
    long = await arriving if arriving is not None else None
    return _summary(replies, concurrency, wall_s, long)


async def _one(url: Any, api_key: str, body: dict[str, Any], reply: Reply, begin: float) -> None:
    secure = ssl.create_default_context() if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(
        url.hostname, url.port or (443 if secure else 80), ssl=secure, limit=1 << 20
    )
    try:
        data = json.dumps(body).encode()
        head = (
            f"POST {url.path.rstrip('/')}/completions HTTP/1.1\r\nHost: {url.netloc}\r\n"
            f"Content-Type: application/json\r\nAuthorization: Bearer {api_key}\r\n"
            f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        words = (await reader.readline()).split(b" ", 2)
        # 0: the server closed the connection without a status line.
        status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
        events: list[tuple[float, bytes]] = []
        while line := await reader.readline():
            if line.startswith(b"data: "):
                events.append((time.perf_counter() - begin, line[6:].strip()))
                if line.startswith(b"data: [DONE]"):
                    break
            elif status != 200 and line.startswith(b"{"):
                reply.error = f"HTTP {status} {line.decode(errors='replace')[:200]}"
    finally:
        writer.close()
    _read_events(events, reply, status)


def _read_events(events: list[tuple[float, bytes]], reply: Reply, status: int) -> None:
    for at, data in events:
        if data == b"[DONE]":
            break
        event = json.loads(data)
        if event.get("error"):
            reply.error = str(event["error"])[:200]
        if any(choice.get("text") for choice in event.get("choices") or []):
            reply.times.append(at)
        usage = event.get("usage")
        if usage:
            reply.prompt_tokens, reply.completion_tokens = (
                usage["prompt_tokens"],
                usage["completion_tokens"],
            )
            reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get(
                "cached_tokens"
            ) or 0
    reply.completion_tokens = reply.completion_tokens or len(reply.times)
    if not reply.times and reply.error is None:
        reply.error = f"HTTP {status}: the reply has no text"


def _summary(
    replies: list[Reply], concurrency: int, wall_s: float, long: Reply | None
) -> LoadResult:
    good = [r for r in replies if r.error is None]
    every = [*replies, *([] if long is None else [long])]
    failures = [r.error for r in every if r.error is not None]
    ttft = [1000 * (r.times[0] - r.start) for r in good]
    gaps = [1000 * (b - a) for r in good for a, b in zip(r.times, r.times[1:], strict=False)]
    tokens = sum(r.completion_tokens for r in good)
    return LoadResult(
        concurrency=concurrency,
        requests=len(every),
        errors=len(failures),
        wall_s=wall_s,
        tok_s=tokens / wall_s,
        ttft_p50_ms=percentile(ttft, 0.5),
        ttft_p95_ms=percentile(ttft, 0.95),
        itl_p50_ms=percentile(gaps, 0.5),
        itl_p95_ms=percentile(gaps, 0.95),
        itl_max_ms=max(gaps, default=float("nan")),
        completion_tokens=tokens,
        prompt_tokens=sum(r.prompt_tokens for r in good),
        cached_tokens=sum(r.cached_tokens for r in good),
        error=next(iter(failures), None),
        **(_beside(good, long) if long is not None and long.times else {}),
    )


def _beside(streams: list[Reply], long: Reply) -> dict[str, float]:
    """The other streams while the long prompt was being computed."""
    begin, end = long.start, long.times[0]
    gaps = [
        (a, b)
        for r in streams
        for a, b in zip(r.times, r.times[1:], strict=False)
        if b > begin and a < end
    ]
    return {
        "long_ttft_ms": 1000 * (end - begin),
        "stall_ms": 1000 * max((b - a for a, b in gaps), default=0.0),
        "tok_s_during": len(gaps) / max(end - begin, 1e-9),
    }


def main(
    base_url: str,
    *,
    clients: Sequence[int],
    requests: int | None,
    seed: int,
    as_json: bool,
    **load: Any,
) -> int:
    """Run one load for each number of clients and print its figures; 1 where a request failed.
    ``load`` are the keywords of `run_load`."""
    failed = False
    for concurrency in clients:
        if concurrency < 1:
            raise InvalidRequestError("--concurrency must be at least 1.", "concurrency")
        count = requests or max(3, 2 * concurrency)
        result = asyncio.run(
            run_load(
                base_url, concurrency=concurrency, requests=count, seed=seed + concurrency, **load
            )
        )
        print(json.dumps(asdict(result)) if as_json else result.line(), flush=True)
        if result.error:
            failed = True
            print(
                f"llmkit: {result.errors} of {result.requests} requests failed; "
                f"the first: {printable(result.error)}",
                file=sys.stderr,
            )
    return int(failed)
