"""How long a step waits for the masks of grammars. Engine thread only."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future

__all__ = ["Late", "Patience"]


class Late(Exception):
    """The grammar's mask was not ready in time."""


class Patience:
    """How long a step waits for grammars, all of its requests together."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self, work: Future[None]) -> None:
        """Wait for ``work``. Raises `Late`, or what the work raised."""
        if work.done():
            return work.result()
        start = time.perf_counter()
        try:
            work.result(None if self._left == math.inf else self._left)
        except TimeoutError:
            raise Late from None
        finally:
            self._left = max(0.0, self._left - (time.perf_counter() - start))
