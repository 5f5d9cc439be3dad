"""How good a model is at a text: perplexity, and agreement of two models on the likeliest token. On the caller's thread; the engine scores prompts."""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Sequence

from llmkit.client import EngineClient
from llmkit.errors import InvalidRequestError
from llmkit.stream import Stream
from llmkit.types import GenerationRequest, SamplingParams, TokenLogprob

__all__ = ["SAMPLE_TEXT", "perplexity", "scores"]

_ids = itertools.count(1)
# A little of everything: prose, facts, a dialogue, numbers, code.
SAMPLE_TEXT = '''The harbour wakes before the town does. At four in the morning the first boats come in, their lamps swaying, and the gulls know it. By six the
fish are sold, the decks are washed, and the men drink coffee without talking much. "Will it rain?" asks the boy. "It always rains," says his uncle, "but
seldom on the day you expect it." Water boils at 100 degrees Celsius at sea level; on a mountain of 3,000 metres it boils at about 90. The reason is the
pressure of the air, which becomes less as one climbs. To compute the area of a circle, multiply the square of its radius by pi.

def mean(values):
    """The arithmetic mean of a list of numbers."""
    if not values:
        raise ValueError("the list is empty")
    return sum(values) / len(values)

There are seven days in a week, twelve months in a year, and sixty minutes in an hour. Photosynthesis turns light, water and carbon dioxide into sugar and
oxygen. The French Revolution began in 1789. If all cats are mammals and all mammals are animals, then all cats are animals.'''


def scores(client: EngineClient, tokens: Sequence[int], n_ctx: int | None = None, top: int = 0) -> list[TokenLogprob]:
    """Log-probabilities of all tokens but the first: in windows of ``n_ctx`` tokens, each token with at least half a window before it."""
    most = client.description.n_ctx - 1
    size = most if n_ctx is None else min(n_ctx, most)
    if size < 16 or len(tokens) < 2:
        raise InvalidRequestError("a text of at least two tokens, and windows of at least 16, are needed.", "n_ctx" if size < 16 else "text")
    params = SamplingParams(max_tokens=0, prompt_logprobs=top)
    starts = range(0, max(len(tokens) - size, 0) + size // 2, size // 2) if len(tokens) > size else range(1)
    under_way: deque[tuple[int, Stream]] = deque()
    found: list[TokenLogprob] = []
    try:
        for start in [*starts, None]:
            while under_way and (start is None or len(under_way) >= 2 * client.description.n_slots):
                begin, stream = under_way.popleft()
                found += stream.result().prompt_logprobs[max(1, len(found) + 1 - begin) :]
            if start is not None:
                window = tuple(tokens[start : start + size])
                under_way.append((start, client.submit(GenerationRequest(f"quality-{next(_ids)}-{time.time_ns()}", params, prompt=window))))
    finally:
        for _, stream in under_way:
            stream.close()
    return found


def perplexity(client: EngineClient, tokens: Sequence[int], n_ctx: int | None = None) -> float:
    """e to the mean negative log-probability."""
    found = scores(client, tokens, n_ctx)
    return math.exp(-sum(entry.logprob or 0.0 for entry in found) / len(found))
