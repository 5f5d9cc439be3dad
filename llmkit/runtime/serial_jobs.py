"""One request to a model that works on one at a time, and what came of it so far."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmkit.protocol import (
    Completion,
    Delta,
    FinishReason,
    GenerationRequest,
    RequestMetrics,
    Usage,
)
from llmkit.protocol.stream import Channel

__all__ = ["Job"]


@dataclass(slots=True, eq=False)
class Job:
    """A request, and what came of it."""

    request: GenerationRequest
    channel: Channel
    arrived: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    first: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    is_over: bool = False
    resumed: float = 0.0  # when it last had its turn
    lines: Iterator[tuple[str, int]] | None = None  # its work, while others have their turn
    redone_s: float = 0.0  # seconds that the next request takes longer if this one is left

    def push(self, line: str, num_tokens: int) -> None:
        self.first = self.first or time.monotonic()
        self.tokens += num_tokens
        self.channel.push(Delta(line, num_tokens))
        self.channel.wake()

    def finish(self, reason: FinishReason) -> None:
        now = time.monotonic()
        begun, first = self.begun or now, self.first or now
        self.channel.finish(
            Completion(
                "".join(self.channel.text_parts),
                reason,
                Usage(self.prompt_tokens, self.tokens),
                RequestMetrics(
                    begun - self.arrived,
                    first - self.arrived,
                    now - first,
                    0.0,
                    self.prompt_tokens,
                    0,
                    self.tokens,
                ),
                request_id=self.request.request_id,
            )
        )
