"""otron's ways, with the setting ``compat = "otron"``: its error for an unknown model.

That it also stops repetition is in `llmkit.gateway.composition`. Tornado loop only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmkit.errors import ModelNotFoundError
from llmkit.gateway.failures import NO_RETRY, ApiError

if TYPE_CHECKING:
    from llmkit.gateway.exchange import Exchange

__all__ = ["MAX_REPETITIONS", "matching"]

MAX_REPETITIONS = 8  # of a loop, before an answer ends


@contextlib.contextmanager
def matching(exchange: Exchange) -> Iterator[None]:
    """A stage that answers a request for an unknown model with 400."""
    try:
        yield
    except ModelNotFoundError as error:
        if exchange.method != "POST":
            raise
        raise ApiError(
            400,
            str(error),
            "model_mismatch",
            param="model",
            code="model_mismatch",
            headers=dict(NO_RETRY),
        ) from error
