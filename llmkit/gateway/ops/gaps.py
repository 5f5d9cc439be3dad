"""The gaps between the tokens of an answer, from what the engine has measured of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from llmkit.protocol import RequestMetrics

__all__ = ["gaps"]


def gaps(times: RequestMetrics) -> Iterator[tuple[float, int]]:
    """Gaps in seconds, and how many there are of each.

    Only the longest is known by itself; the others are counted at their mean.

    >>> list(gaps(RequestMetrics(decode_s=5.0, max_itl_s=2.0, completion_tokens=5)))
    [(1.0, 3), (2.0, 1)]
    """
    number = times.completion_tokens - 1
    longest = min(times.max_itl_s, times.decode_s)
    if number > 1:
        yield (times.decode_s - longest) / (number - 1), number - 1
        yield longest, 1
    elif number == 1:
        yield times.decode_s, 1
