"""A model's quality on a text: perplexity, and the log-probabilities to compare two models by.

Runs on the caller's thread; the engine scores the prompts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from llmkit.errors import InvalidRequestError
from llmkit.protocol import GenerationRequest, SamplingParams, TokenLogprob
from llmkit.protocol.client import EngineClient
from llmkit.protocol.stream import Stream
from llmkit.sessions.batches import Batch

__all__ = ["SAMPLE_TEXT", "perplexity", "scores"]

_ids = itertools.count(1)
# Prose, facts, dialogue, numbers and code. Scores depend on the exact text: long lines are only
# joined with a backslash.
SAMPLE_TEXT = '''The harbour wakes before the town does. At four in the morning the first boats \
come in, their lamps swaying, and the gulls know it. By six the
fish are sold, the decks are washed, and the men drink coffee without talking much. "Will it \
rain?" asks the boy. "It always rains," says his uncle, "but
seldom on the day you expect it." Water boils at 100 degrees Celsius at sea level; on a mountain \
of 3,000 metres it boils at about 90. The reason is the
pressure of the air, which becomes less as one climbs. To compute the area of a circle, multiply \
the square of its radius by pi.

def mean(values):
    """The arithmetic mean of a list of numbers."""
    if not values:
        raise ValueError("the list is empty")
    return sum(values) / len(values)

There are seven days in a week, twelve months in a year, and sixty minutes in an hour. \
Photosynthesis turns light, water and carbon dioxide into sugar and
oxygen. The French Revolution began in 1789. If all cats are mammals and all mammals are animals, \
then all cats are animals.'''


def scores(
    client: EngineClient, tokens: Sequence[int], n_ctx: int | None = None, top: int = 0
) -> list[TokenLogprob]:
    """Log-probabilities of all tokens but the first.

    Scored in windows of ``n_ctx`` tokens; after the first window, each token has at least half a
    window before it.
    """
    limit = client.description.n_ctx - 1
    size = limit if n_ctx is None else min(n_ctx, limit)
    if size < 16 or len(tokens) < 2:
        raise InvalidRequestError(
            "perplexity needs a text of at least 2 tokens and windows of at least 16.",
            "n_ctx" if size < 16 else "text",
        )
    params = SamplingParams(max_tokens=0, prompt_logprobs=top)
    starts = (
        range(0, max(len(tokens) - size, 0) + size // 2, size // 2)
        if len(tokens) > size
        else range(1)
    )
    entries: list[TokenLogprob] = []

    def submit(start: int) -> Stream:
        window = tuple(tokens[start : start + size])
        request_id = f"quality-{next(_ids)}-{time.time_ns()}"
        return client.submit(GenerationRequest(request_id, params, prompt=window))

    batch = Batch(submit, 2 * client.description.n_slots)
    try:
        for start, scored in zip(starts, batch.results(starts), strict=True):
            if isinstance(scored, Exception):
                raise scored
            entries += scored.prompt_logprobs[max(1, len(entries) + 1 - start) :]
    finally:
        for stream in batch.running:
            stream.close()
    return entries


def perplexity(client: EngineClient, tokens: Sequence[int], n_ctx: int | None = None) -> float:
    """exp of the mean negative log-probability."""
    entries = scores(client, tokens, n_ctx)
    return math.exp(-sum(entry.logprob or 0.0 for entry in entries) / len(entries))
