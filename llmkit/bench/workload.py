"""`llmkit bench`: a load client for any OpenAI-compatible ``/v1/completions`` endpoint.

Plain asyncio streams: while a reply runs, lines are only time-stamped; JSON is parsed after its end, so that the client takes little of a small machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import ssl
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from llmkit.errors import InvalidRequestError

__all__ = ["LoadResult", "Reply", "add_arguments", "main", "prompt_text", "run_load"]

VOCABULARY = """
able air art bank bird blue boat book bread bridge brother cause chair child circle city clear cloud coast color corner cost country cup
dance dark deal door dream dry earth east edge energy engine fact fall farm field fire fish floor flower form friend fruit game glass gold
grass green group hand heart heat hill history home horse hour house idea inch iron island job key king lake land law leaf letter life line
list machine map mark mile milk mind model moon morning mouth music name night noise north note ocean office oil order paint pair paper part
path people piece plan plant point power price queen question rain reason rest ring river road rock roof room root rule salt sand school sea
seat ship side sign sky sleep snow song sound south space stage star state step stone store story street summer sun table task tea test
thing thought town trade train tree truth valley value village voice wall war watch water wave week west wheel wind window winter wish word
""".split()  # noqa: SIM905


@dataclass(slots=True)
class Reply:
    """One reply: seconds since the start of the run for ``times`` of text events."""

    start: float
    times: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """One load run. Rates in tokens a second, times in milliseconds; ``itl`` are gaps between text events of one stream."""

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

    def line(self) -> str:
        return (
            f"{self.concurrency:3d} clients  {self.tok_s:7.1f} tok/s  TTFT p50 {self.ttft_p50_ms:7.0f} p95 {self.ttft_p95_ms:7.0f} ms  "
            f"ITL p50 {self.itl_p50_ms:6.1f} p95 {self.itl_p95_ms:6.1f} max {self.itl_max_ms:7.1f} ms  errors {self.errors}"
        )


def prompt_text(seed: int, index: int, num_words: int) -> str:
    """A prompt of about one token a word, different for each (seed, index): no prefix cache helps."""
    rng = random.Random(f"{seed}/{index}")
    return " " + " ".join(rng.choices(VOCABULARY, k=num_words))


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the nearest ranks; nan for nothing."""
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
) -> LoadResult:
    """Send ``requests`` unique prompts, ``concurrency`` at a time, greedy and of equal length (``ignore_eos``), and time their streams."""
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise InvalidRequestError(f"--base-url must look like http://127.0.0.1:3000/v1, not {base_url!r}.", "base_url")
    replies: list[Reply] = []
    todo = iter(range(requests))
    begin = time.perf_counter()

    async def worker() -> None:
        for index in todo:
            body = {
                "model": model,
                "prompt": prompt_text(seed, index, prompt_words),
                "max_tokens": max_tokens,
                "temperature": 0,
                "seed": index,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
            }
            reply = Reply(time.perf_counter() - begin)
            try:
                async with asyncio.timeout(timeout_s):
                    await _one(url, api_key, body, reply, begin)
            except (OSError, ValueError, asyncio.IncompleteReadError, TimeoutError) as error:
                reply.error = repr(error)
            reply.end = time.perf_counter() - begin
            replies.append(reply)

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return _summary(replies, concurrency, time.perf_counter() - begin)


async def _one(url: Any, api_key: str, body: dict[str, Any], reply: Reply, begin: float) -> None:
    secure = ssl.create_default_context() if url.scheme == "https" else None
    reader, writer = await asyncio.open_connection(url.hostname, url.port or (443 if secure else 80), ssl=secure, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        head = f"POST {url.path.rstrip('/')}/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {api_key}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split(b" ", 2)[1])
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
            reply.prompt_tokens, reply.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reply.completion_tokens = reply.completion_tokens or len(reply.times)
    if not reply.times and reply.error is None:
        reply.error = f"HTTP {status}: no text came"


def _summary(replies: list[Reply], concurrency: int, wall_s: float) -> LoadResult:
    good = [r for r in replies if r.error is None]
    ttft = [1000 * (r.times[0] - r.start) for r in good]
    gaps = [1000 * (b - a) for r in good for a, b in zip(r.times, r.times[1:], strict=False)]
    tokens = sum(r.completion_tokens for r in good)
    return LoadResult(
        concurrency=concurrency,
        requests=len(replies),
        errors=len(replies) - len(good),
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
        error=next((r.error for r in replies if r.error), None),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-url", required=True, help="the endpoint, such as http://127.0.0.1:3000/v1")
    parser.add_argument("--model", default="default")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="default: $OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="clients at a time; several values are run one after the other")
    parser.add_argument("--requests", type=int, help="requests for each concurrency (default: twice the concurrency, at least 3)")
    parser.add_argument("--prompt-words", type=int, default=256, help="words of each prompt, about one token each")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="other seeds are other prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def main(args: argparse.Namespace) -> int:
    failed = False
    for concurrency in args.concurrency:
        if concurrency < 1:
            raise InvalidRequestError("--concurrency must be at least 1.", "concurrency")
        result = asyncio.run(
            run_load(
                args.base_url,
                model=args.model,
                api_key=args.api_key,
                concurrency=concurrency,
                requests=args.requests or max(3, 2 * concurrency),
                prompt_words=args.prompt_words,
                max_tokens=args.max_tokens,
                seed=args.seed + concurrency,
            )
        )
        print(json.dumps(asdict(result)) if args.json else result.line(), flush=True)
        if result.error:
            failed = True
            print(f"llmkit: {result.errors} of {result.requests} requests failed; the first: {result.error}", file=sys.stderr)
    return int(failed)
