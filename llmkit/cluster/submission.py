"""A generation at a remote gateway: its answers, and how much of them has come.

Loop of its `RemoteEngine` only, but for what a channel allows others.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

from llmkit.bridge import wire
from llmkit.errors import EngineGoneError
from llmkit.protocol import Completion, FinishReason, RequestMetrics, Usage
from llmkit.protocol.stream import Channel

__all__ = ["Submission"]


class Submission:
    """``body`` is the message, ``channels`` are its answers; ``is_begun``: something has come."""

    __slots__ = ("_by_id", "_counts", "body", "channels", "is_begun", "task")

    def __init__(self, body: bytes, channels: Sequence[Channel]) -> None:
        self.body, self.channels = body, channels
        self.task: asyncio.Task[None] | None = None
        self.is_begun = False
        self._by_id = {channel.request_id: channel for channel in channels}
        self._counts: Counter[str] = Counter()

    @property
    def is_over(self) -> bool:
        """Whether no answer is awaited any more."""
        return all(channel.finished for channel in self.channels)

    def deliver(self, events: wire.Events) -> None:
        """Pass on what has come."""
        self.is_begun = True
        touched: list[Channel] = []
        for news in events.news:
            channel = self._by_id.get(news.id)
            if channel is not None and not channel.finished:
                self._counts[news.id] += news.num_tokens
                channel.push(news.delta())
                touched.append(channel)
        for end in events.ends:
            channel = self._by_id.get(end.id)
            if channel is None:
                continue
            error = end.failure.error() if end.failure else None
            completion = end.completion("".join(channel.text_parts), tuple(channel.logprobs))
            if completion is None:
                channel.fail(error or EngineGoneError("the server ended this without a result"))
            else:
                channel.finish(completion, error)
            touched.append(channel)
        for channel in dict.fromkeys(touched):
            channel.wake()

    def fail(self, error: Exception) -> None:
        """End what has not ended."""
        for channel in self.channels:
            if not channel.finished:
                channel.fail(error)
                channel.wake()

    def abort(self, request_id: str) -> bool:
        """End one answer with what has come of it. Whether it was the last."""
        channel = self._by_id[request_id]
        count = self._counts[request_id]
        channel.finish(
            Completion(
                "".join(channel.text_parts),
                FinishReason.ABORT,
                Usage(completion_tokens=count),
                RequestMetrics(completion_tokens=count),
                request_id=request_id,
                logprobs=tuple(channel.logprobs),
            )
        )
        channel.wake()
        return self.is_over
