"""Where editors want an answer to end: after some time, or where the code's indentation does.

Tornado loop only.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from llmkit.protocol import Completion, FinishReason, RequestMetrics, Usage

__all__ = ["Stopping"]


class Stopping:
    """One answer's text, and whether it is to end.

    >>> stopping = Stopping(indent=4)
    >>> stopping.take("    a = 1\\n", 5), stopping.is_over
    ('    a = 1\\n', False)
    >>> stopping.take("b = 2", 3), stopping.is_over, stopping.text
    ('', True, '    a = 1')

    ``max_ms`` counts from the first token, and ends an answer only once it has a line; negative is
    no limit. ``indent`` is the least indentation of a further line, in characters.
    """

    def __init__(
        self, max_ms: int = -1, indent: int = 0, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_ms, self._indent, self._now = max_ms, indent, now
        self._first_at: float | None = None
        self._last_at = 0.0
        self.text, self.num_tokens, self.is_over = "", 0, False

    def take(self, text: str, num_tokens: int) -> str:
        """What of further text belongs to the answer."""
        self._last_at = self._now()
        if self._first_at is None:
            self._first_at = self._last_at
        before = len(self.text)
        self.text += text
        self.num_tokens += num_tokens
        end = self._dedent(before) if self._indent else None
        if end is not None:
            self.text, self.is_over = self.text[:end], True
        elif self._max_ms >= 0 and "\n" in self.text:
            self.is_over = (self._last_at - self._first_at) * 1000 > self._max_ms
        return self.text[before:]

    def _dedent(self, before: int) -> int | None:
        """Where the first line begins that is indented less, looking at new text only."""
        start = self.text.rfind("\n", 0, before)
        if start < 0:
            start = self.text.find("\n", before)
        while start >= 0:
            end = self.text.find("\n", start + 1)
            line = self.text[start + 1 : end if end >= 0 else None]
            words = line.lstrip(" \t")
            if words and len(line) - len(words) < self._indent:
                return start
            start = end
        return None

    def so_far(self, prompt_tokens: int) -> Completion:
        """The answer as if it ended here."""
        decode_s = self._last_at - (self._first_at or self._last_at)
        usage = Usage(prompt_tokens, self.num_tokens)
        metrics = RequestMetrics(
            decode_s=decode_s, prompt_tokens=prompt_tokens, completion_tokens=self.num_tokens
        )
        return Completion(self.text, FinishReason.LENGTH, usage, metrics)
